"""bitsandbytes' optimizers: 32-bit and block-wise 8-bit states, paged or not.

Counted: elements × itemsize of `state1`, `state2`, `absmax1`, `absmax2`; 32-bit states are fp32 for bf16 parameters too.
Source: bitsandbytes `optim/optimizer.py` (`init_state`, `get_state_buffer`), `optim/ademamix.py`; transformers
5.24 `Trainer.create_optimizer`, `_get_bitsandbytes_optimizer`.
Left out: `step`, a Python int; the code tables while they still lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

from peftplan.ledger import Allocation, Place
from peftplan.optim.optimizer import OptimArgs, Param, StatesFunction
from peftplan.units import ceil_div

MIN_8BIT_SIZE = 4096
"""Parameters with fewer elements keep fp32 states (`min_8bit_size`)."""
BLOCKSIZE = 256
"""Elements that share one fp32 absmax (`blocksize` in `init_state`)."""
MIN_PAGED_SIZE = 100_000
"""Parameters with fewer elements keep their states on the device (`get_state_buffer`: `p.numel() < 1e5`)."""
CODE_TABLE_SIZE = 256
"""fp32 entries of a dynamic quantization map (`create_dynamic_map`): 1024 B."""

Bits = int
BnbStates = Callable[[Param, Bits, Place], tuple[Allocation, ...]]


def is_8bit(param: Param, bits: Bits) -> bool:
    """Whether this parameter gets 8-bit states.

    transformers' Trainer registers `optim_bits=32` for the `weight` of every `nn.Embedding` in the model, so for a tied
    head too, and for the virtual tokens that peft keeps in an `nn.Embedding` (prompt and prefix tuning, p-tuning).
    """
    return bits == 8 and prod(param.shape) >= MIN_8BIT_SIZE and not param.in_embedding


def two_state(param: Param, bits: Bits, place: Place) -> tuple[Allocation, ...]:
    """AdamW: 8n B at 32 bits; 2n + 8⌈n/256⌉ B at 8 bits."""
    return quantized_pair(param.shape, is_8bit(param, bits), place)


def quantized_pair(shape: tuple[int, ...], quantized: bool, place: Place) -> tuple[Allocation, ...]:
    """`Optimizer2State.init_state`: two buffers of the given shape, and an absmax each if they are 8-bit."""
    dtype = "uint8" if quantized else "fp32"
    states = (Allocation("state1", dtype, shape, place), Allocation("state2", dtype, shape, place))
    blocks = ceil_div(prod(shape), BLOCKSIZE)
    absmax = (Allocation("absmax1", "fp32", (blocks,)), Allocation("absmax2", "fp32", (blocks,)))
    return states + absmax if quantized else states


def one_state(param: Param, bits: Bits, place: Place) -> tuple[Allocation, ...]:
    """Lion, RMSprop: 4n B at 32 bits; n + 4⌈n/256⌉ B at 8 bits."""
    if not is_8bit(param, bits):
        return (Allocation("state1", "fp32", param.shape, place),)
    blocks = ceil_div(prod(param.shape), BLOCKSIZE)
    return (Allocation("state1", "uint8", param.shape, place), Allocation("absmax1", "fp32", (blocks,)))


def ademamix(param: Param, bits: Bits, place: Place) -> tuple[Allocation, ...]:
    """AdEMAMix: `state1` holds the fast and the slow average, so 12n B, or 3n + 12⌈n/256⌉ B."""
    quantized = is_8bit(param, bits)
    dtype = "uint8" if quantized else "fp32"
    states = (
        Allocation("state1", dtype, (2, *param.shape), place),
        Allocation("state2", dtype, param.shape, place),
    )
    blocks = ceil_div(prod(param.shape), BLOCKSIZE)
    absmax = (Allocation("absmax1", "fp32", (2, blocks)), Allocation("absmax2", "fp32", (blocks,)))
    return absmax + states if quantized else states


def bnb(states: BnbStates, *, bits: Bits, paged: bool = False) -> StatesFunction:
    """The states function of one bitsandbytes name; paged states of large parameters lie in managed memory."""

    def param_states(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
        place: Place = "managed" if paged and prod(param.shape) >= MIN_PAGED_SIZE else "device"
        return states(param, bits, place)

    return param_states


def code_tables(states: Iterable[Allocation]) -> tuple[Allocation, ...]:
    """`qmap1` (signed) and `qmap2` (unsigned): once per optimizer, moved to the device by the first 8-bit state.

    All parameters hold the same tensor; only `load_state_dict` gives each its own copy (not counted).
    """
    names = {state.name for state in states}
    return tuple(code_table(f"qmap{i}") for i in (1, 2) if f"absmax{i}" in names)


def code_table(name: str) -> Allocation:
    """One table on the device: 256 × 4 B."""
    return Allocation(name, "fp32", (CODE_TABLE_SIZE,))

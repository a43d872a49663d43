"""torchao's AdamW4bit and AdamW8bit: a state is a tensor subclass of codes, scales and its own table.

Counted: the inner tensors of `exp_avg` and `exp_avg_sq`. The tables are made per state, not shared: 2 × 1024 B (8-bit) or
2 × 64 B (4-bit) per parameter, which the allocator rounds to 512 B.
Source: torchao `optim/adam.py` (`_new_buffer`), `subclass_{4,8}bit.py` (`zeros`); transformers
`_get_torchao_optimizer`, which sets `block_size` 256 for both (torchao's own default for 4-bit is 128).
Left out: `lr`, one fp32 CPU scalar per parameter group.

The step is compiled for each shape (`torch.compile(single_param_adam)`). What it allocates was read from rehearsals with torch's
own compiler: scales and moments in fp32 of a matrix that has quantized states; nothing of another parameter, which is one kernel.
Left out: copies of what a kernel changes, while the first step times it.
"""

from __future__ import annotations

from math import prod

from peftplan.errors import RefusedError
from peftplan.ledger import Allocation
from peftplan.optim.optimizer import OptimArgs, Param, StatesFunction, like, scalar
from peftplan.versions import named

BLOCK_SIZE = 256
"""transformers' default for `block_size`."""
MIN_QUANTIZED_SIZE = 4096
"""Parameters with fewer elements, or not a multiple of the block size, keep states like themselves (`_new_buffer`)."""

MOMENTS = ("exp_avg", "exp_avg_sq")
FLUSHED = 2**28
"""Bytes of the buffer that clears the card's cache while the first step times its kernels (torch,
_inductor/runtime/benchmarking.py, `benchmark_gpu`). A program that finds the times of an earlier run on its disk has none."""


def torchao(*, bits: int) -> StatesFunction:
    """n ≥ 4096 and n a multiple of 256: n·bits/8 B of codes + 4n/256 B of scales + a table of 2^bits fp32, per moment."""

    def param_states(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
        if "block_size" in optim_args:
            raise RefusedError(
                f"optim_args: {named('transformers')} hands block_size to torchao as a string, which torchao refuses"
            )
        step = scalar("step", place="host")
        return (step, *_moment(param, "exp_avg", bits), *_moment(param, "exp_avg_sq", bits))

    return param_states


def step_in_8_bits(shape: tuple[int, ...]) -> tuple[Allocation, ...]:
    """What `AdamW8bit` allocates to step one parameter: new scales and both moments in fp32. Of a vector it is one kernel."""
    n = prod(shape)
    if not is_matrix(shape):
        return ()
    scales = tuple(Allocation(f"{name}.scale", "fp32", (n // BLOCK_SIZE,)) for name in MOMENTS)
    return (*scales, *(Allocation(name, "fp32", shape) for name in MOMENTS))


def step_in_4_bits(shape: tuple[int, ...]) -> tuple[Allocation, ...]:
    """What `AdamW4bit` allocates: new scales, both moments in fp32, and codes in int64 before two of them share a byte."""
    n = prod(shape)
    if not is_quantized(n):
        return ()
    scales = tuple(Allocation(f"{name}.scale", "fp32", (n // BLOCK_SIZE,)) for name in MOMENTS)
    wide = tuple(Allocation(f"{name}.codes", "int64", shape) for name in MOMENTS)
    return (*scales, *(Allocation(name, "fp32", shape) for name in MOMENTS), *wide)


def copies_in_8_bits(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...] | None:
    """Both moments' codes and the parameter, or both moments and the parameter, each as an input and as an output. The kernel of
    a vector in 8 bits has one way to run, and is not timed."""
    n = prod(shape)
    if not is_quantized(n):
        return 2 * (itemsize * n,) * 3
    return 2 * (n, n, itemsize * n) if is_matrix(shape) else None


def copies_in_4_bits(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...] | None:
    """The codes of one moment, two of which share a byte, in the only kernel of several that is timed."""
    n = prod(shape)
    return (n // 2,) if is_quantized(n) else copies_in_8_bits(shape, itemsize)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a matrix with quantized states, which several kernels step."""
    return len(shape) > 1 and is_quantized(prod(shape))


def is_quantized(n: int) -> bool:
    """Whether a parameter of n elements has quantized states."""
    return n >= MIN_QUANTIZED_SIZE and n % BLOCK_SIZE == 0


def _moment(param: Param, name: str, bits: int) -> tuple[Allocation, ...]:
    n = prod(param.shape)
    if not is_quantized(n):
        return (like(param, name),)
    codes = param.shape if bits == 8 else (n // 2,)
    return (
        Allocation(f"{name}.codes", "uint8", codes),
        Allocation(f"{name}.scale", "fp32", (n // BLOCK_SIZE,)),
        Allocation(f"{name}.qmap", "fp32", (2**bits,)),
    )

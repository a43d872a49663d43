"""Optimizers from small packages: schedulefree, torch-optimi (StableAdamW), grokadamw, flashoptim.

Counted: every tensor in `optimizer.state[p]` (grokadamw: in the parameter group).
Source: schedulefree 1.4.1 `{adamw,radam,sgd}_schedulefree.py`; torch-optimi 0.3.3 `stableadamw.py`; grokadamw 0.1.2
`grokadamw.py`; flashoptim 0.1.4 `optimizers.py` (`_MaybeQuantizedTensor`, `quantize`); transformers `trainer_optimizer.py`.
Left out: optimi's `step`, one int32 CPU scalar per parameter group; temporaries of the step.
"""

from __future__ import annotations

from math import prod

from peftplan.ledger import Allocation
from peftplan.optim.optimizer import OptimArgs, Param, like, scalar
from peftplan.units import ceil_div

HALF_PRECISION = ("bf16", "fp16")
SCALED_TOGETHER = 32
"""Elements of a moment that share one scale of flashoptim (`quantize`)."""
MASTER_BITS = 24
"""Bits of its master weights where none are named."""


def schedule_free_adamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """AdamWScheduleFree and RAdamScheduleFree: the base point `z`, a copy of the parameter, and one moment."""
    return (like(param, "z"), like(param, "exp_avg_sq"))


def schedule_free_sgd(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """SGDScheduleFree: the base point `z` only."""
    return (like(param, "z"),)


def stable_adamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """Two moments, a Kahan compensation for half precision, and device scalars.

    On CUDA optimi takes its Triton path (Triton comes with torch there), which adds `mean_square` and replaces a missing
    compensation by one byte. transformers reads `kahan_sum` with `bool(text)`: any text is true, even "False".
    """
    wants_kahan = optim_args.get("kahan_sum") != ""
    if wants_kahan and param.dtype in HALF_PRECISION:
        kahan_comp = like(param, "kahan_comp")
    else:
        kahan_comp = Allocation("kahan_comp", "uint8", (1,))
    return (
        like(param, "exp_avg"),
        like(param, "exp_avg_sq"),
        scalar("eps_sq", dtype=param.dtype),
        kahan_comp,
        Allocation("mean_square", "fp32", (1,)),
    )


def grokadamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """Three averages of the parameter's shape, kept on the CPU. The step moves those of one parameter at a time to the device."""
    return tuple(like(param, name, place="host") for name in ("exp_avg", "exp_avg_sq", "grok_ema"))


def flash_adamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """FlashAdamW: two moments in 8 bits with their scales, and what a weight in 16 bits lacks of a master weight of 24 or 32.

    A weight in fp32 has no such bits. `step` is on the host.
    """
    scales = (ceil_div(prod(param.shape), SCALED_TOGETHER),)
    moments = (("exp_avg", "int8"), ("exp_avg_sq", "uint8"))
    states = [
        a for name, dtype in moments for a in (like(param, name, dtype=dtype), Allocation(f"{name} scales", "fp16", scales))
    ]
    bits = int(optim_args.get("master_weight_bits", MASTER_BITS))
    if param.dtype in HALF_PRECISION:
        states.append(like(param, "error_bits", dtype="int8" if bits == MASTER_BITS else "int16"))
    return (*states, scalar("step", dtype="int64", place="host"))

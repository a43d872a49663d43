"""Optimizers from small packages: schedulefree, torch-optimi (StableAdamW), grokadamw.

Counted: every tensor in `optimizer.state[p]` (grokadamw: in the parameter group).
Source: schedulefree 1.4.1 `{adamw,radam,sgd}_schedulefree.py`; torch-optimi 0.3.3 `stableadamw.py`; grokadamw 0.1.2
`grokadamw.py`; transformers `trainer_optimizer.py`.
Left out: optimi's `step`, one int32 CPU scalar per parameter group; temporaries of the step.
"""

from __future__ import annotations

from peftplan.ledger import Allocation
from peftplan.optim.optimizer import OptimArgs, Param, like, scalar

HALF_PRECISION = ("bf16", "fp16")


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

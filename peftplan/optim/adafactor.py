"""Adafactor as transformers ships it, and AdaLomo, which keeps the same factored second moment.

Counted: elements × 4 B, whatever the dtype of the parameter: both turn the gradient into fp32 first.
Source: transformers `optimization.py` (`Adafactor.step`); lomo-optim 0.1.1 `adalomo.py`, `AdaLomo.__init__`.
Trainer sets `scale_parameter=False, relative_step=False` and leaves `beta1` None: no first moment.
Left out: the fp32 copies of gradient and parameter during the step, one parameter at a time.
"""

from __future__ import annotations

from peftplan.errors import RefusedError
from peftplan.ledger import Allocation
from peftplan.optim.optimizer import OptimArgs, Param, scalar


def adafactor(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """Row and column means over the last two dims (everything for vectors), and `RMS`, a scalar on the device."""
    return (*second_moment(param.shape), scalar("RMS"))


def second_moment(shape: tuple[int, ...]) -> tuple[Allocation, ...]:
    """Adafactor's second moment: rows `shape[:-1]` and columns `shape[:-2] + shape[-1:]`; unfactored below 2-D."""
    if len(shape) < 2:
        return (Allocation("exp_avg_sq", "fp32", shape),)
    return (
        Allocation("exp_avg_sq_row", "fp32", shape[:-1]),
        Allocation("exp_avg_sq_col", "fp32", (*shape[:-2], shape[-1])),
    )


def lomo(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """LOMO updates the parameter inside backward and keeps nothing."""
    return ()


def adalomo(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """AdaLomo: fp32 vectors over dims 0 and 1, of every parameter of the model, frozen and packed 4-bit ones too.

    They are made when the optimizer is constructed, from `p.data.shape`. A 4-bit weight is stored as (n/2, 1), so its
    row vector costs 2 B per real parameter.
    """
    if len(param.shape) == 1:
        return (Allocation("exp_avg_sq", "fp32", param.shape),)
    if len(param.shape) != 2:
        raise RefusedError(f"optim: lomo-optim 0.1.1 (AdaLomo) handles vectors and matrices only, not shape {param.shape}")
    rows, columns = param.shape
    return (Allocation("exp_avg_sq_row", "fp32", (rows,)), Allocation("exp_avg_sq_col", "fp32", (columns,)))

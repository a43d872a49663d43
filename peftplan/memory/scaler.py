"""The gradient scaler of fp16 training: numbers on the device, and a refusal.

Source: torch `amp/grad_scaler.py`; accelerate makes it for `mixed_precision="fp16"`. Gradients are unscaled in place.
"""

from __future__ import annotations

from collections.abc import Collection

from peftplan.errors import RefusedError
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor


def cannot_unscale(dtype: str) -> str:
    """Why gradients of this dtype are refused."""
    return f"autocast: fp16 training cannot unscale {dtype} gradients; accepted: trained parameters in fp32, or autocast bf16"


class Scaler:
    """`GradScaler`: a scale and a counter that last, their inverse and a mark of infinity per step."""

    def __init__(self, f: Tape) -> None:
        f.module = "scaler"
        self.scale = f.new((), "fp32", "scale")
        self.growth_tracker = f.new((), "int32", "growth_tracker")
        self.found_inf: Tensor | None = None

    def scaled(self, f: Tape, loss: Tensor) -> Tensor:
        """`scale`: what backward starts from."""
        return ops.mul(f, loss, self.scale)

    def unscale(self, f: Tape, dtypes: Collection[str], *, takes_fp16: bool = False) -> None:
        """`unscale_` of gradients of these dtypes. Raises RefusedError as torch raises ValueError for fp16 ones, unless it takes
        them; for bf16 its kernel (`_amp_foreach_non_finite_check_and_unscale_cuda`) raises NotImplementedError."""
        if narrow := {"bf16", *(() if takes_fp16 else ("fp16",))}.intersection(dtypes):
            raise RefusedError(cannot_unscale(max(narrow)))
        wide = f.new((), "fp64", "double")
        inverse = f.new((), "fp64", "reciprocal")
        del wide
        inverse = f.new((), "fp32", "float")
        self.found_inf = f.new((), "fp32", "found_inf")
        del inverse

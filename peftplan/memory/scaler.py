"""The gradient scaler of fp16 training: numbers on the device, and a refusal.

Source: torch `amp/grad_scaler.py`; accelerate makes it for `mixed_precision="fp16"`. Gradients are unscaled in place.
"""

from __future__ import annotations

from collections.abc import Collection

from peftplan.errors import RefusedError
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor


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

    def unscale(self, f: Tape, dtypes: Collection[str]) -> None:
        """`unscale_` of gradients of these dtypes. Raises RefusedError for fp16 gradients, as torch raises ValueError."""
        if "fp16" in dtypes:
            raise RefusedError(
                "autocast: fp16 training cannot unscale fp16 gradients; accepted: trained parameters in fp32, or bf16"
            )
        wide = f.new((), "fp64", "double")
        inverse = f.new((), "fp64", "reciprocal")
        del wide
        inverse = f.new((), "fp32", "float")
        self.found_inf = f.new((), "fp32", "found_inf")
        del inverse

"""The gradient scaler of fp16 training: numbers on the device, and a refusal.

Source: torch `amp/grad_scaler.py`; accelerate makes it for `mixed_precision="fp16"`. Gradients are unscaled in place.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from peftplan.errors import RefusedError
from peftplan.memory.scaler import cannot_unscale

INITIAL_SCALE = 2.0**16
GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL = 2.0, 0.5, 2000


class Scaler:
    """`GradScaler`: a scale and a counter that last, their inverse and a mark of infinity per step."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL_SCALE, dtype=torch.float32, device=device)
        self.growth_tracker = torch.full((), 0, dtype=torch.int32, device=device)
        self.found_inf: torch.Tensor | None = None

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """`scale`: what backward starts from."""
        return loss * self.scale

    def unscale(self, parameters: Iterable[torch.nn.Parameter], *, takes_fp16: bool = False) -> None:
        """`unscale_`. Raises RefusedError as torch does for gradients of 16 bits that it does not take (`memory.scaler`)."""
        inverse = self.scale.double().reciprocal().float()
        self.found_inf = torch.full((), 0.0, dtype=torch.float32, device=self.scale.device)
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
            if dtype in by_dtype and not (takes_fp16 and name == "fp16"):
                raise RefusedError(cannot_unscale(name))
        for gradients in by_dtype.values():
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.found_inf, inverse)

    def update(self) -> None:
        """`update`: the scale for the next step."""
        if self.found_inf is not None:
            growth = GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL
            torch._amp_update_scale_(self.scale, self.growth_tracker, self.found_inf, *growth)
        self.found_inf = None

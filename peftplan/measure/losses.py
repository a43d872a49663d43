"""Install a loss library's own code in place of the model's loss, as the library does, before peft wraps the model."""

from __future__ import annotations

from typing import Any

from peftplan.errors import MissingExtraError, RefusedError
from peftplan.job.setup import Setup

OUTPUTS_OF_SFT = ("log_probs", "entropy", "is_top1")
"""What SFTTrainer asks of its fused head (trl `SFTTrainer.__init__`)."""


def install(base: Any, setup: Setup) -> None:
    """Install the setup's loss. Raises RefusedError for a library that would change more than the loss."""
    if setup.loss == "trl-chunked":
        try:
            from trl.trainer.utils import add_fused_lm_head
        except ImportError:
            raise MissingExtraError("loss trl-chunked", "trl") from None
        add_fused_lm_head(base, outputs=OUTPUTS_OF_SFT)
    elif setup.loss == "liger":
        try:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance  # type: ignore[import-not-found]
        except ImportError:
            raise RefusedError("loss: liger needs liger-kernel, which is not installed; accepted: full, trl-chunked") from None
        _apply_liger_kernel_to_instance(model=base)
    elif setup.loss != "full":
        raise RefusedError(
            f"loss: {setup.loss} cannot be measured: it patches the whole model; accepted: full, trl-chunked, liger"
        )


def arguments(setup: Setup) -> dict[str, bool]:
    """Arguments of the forward besides the batch that turn the loss on."""
    return {"fused_lm_head": True} if setup.loss == "trl-chunked" else {}

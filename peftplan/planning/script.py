"""What a program did around the step that was measured, where no option of a setup says it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from peftplan.errors import InputError

VERSION = r"^\d+\.\d+"
"""What a version of torch begins with."""


class Script(BaseModel):
    """Facts about a hand-written program; a run of today's `plain` loop has none of them.

    Reserved bytes depend on what ran before, so a record of somebody else's run needs them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    earlier_seq_lens: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Tokens per sequence of the steps before the counted one; without them one step of the same length."""
    outputs_outlive_step: bool = False
    """Whether the name of the outputs is rebound only when the next forward has returned."""
    empties_cache: bool = False
    """Whether `torch.cuda.empty_cache()` runs after each step, before the gradients of that step are freed."""
    repeats_kv: bool = False
    """Whether grouped keys and values are repeated before torch's sdpa sees them, as kernels without grouped queries need it."""
    enables_adapters_again: bool = False
    """Whether adapters are disabled and enabled (`with model.disable_adapter():`) between the optimizer's making and the first
    step, as where the base is evaluated. peft then lets all of an active adapter require gradients (tuners/tuners_utils.py,
    `enable_adapters`): of LoRA-FA A too, whose inputs are saved again and whose gradients its optimizer does not take."""
    torch: Annotated[str, Field(pattern=VERSION)] | None = None
    """The torch that ran, as `2.10.0`; None: one like 2.13. Decides `cublaslt_apart` and `ties_by_address`."""

    @property
    def cublaslt_apart(self) -> bool:
        """Whether cuBLASLt has workspaces of its own: before torch 2.12. Since then it takes cuBLAS's (`tools/emulated_card`)."""
        return self._before(2, 12)

    @property
    def ties_by_address(self) -> bool:
        """Whether the allocator orders equal free blocks by address: before torch 2.13. Since then by age of their segment."""
        return self._before(2, 13)

    @classmethod
    def on(cls, torch: str | None) -> Script:
        """A loop of today on this torch, as somebody typed it. Raises InputError for what is no version."""
        if torch is not None and not re.match(VERSION, torch):
            raise InputError("torch", torch, "accepted: a version such as 2.10")
        return NO_SCRIPT.ran_on(torch)

    def ran_on(self, torch: str | None) -> Script:
        """The same with this torch, where the script itself does not say and this is a version (a record may say anything)."""
        if self.torch is not None or not re.match(VERSION, torch or ""):
            return self
        return self.model_copy(update={"torch": torch})

    def _before(self, major: int, minor: int) -> bool:
        return self.torch is not None and tuple(map(int, re.findall(r"\d+", self.torch)[:2])) < (major, minor)


NO_SCRIPT = Script.model_construct()

"""A job: a model, a method and a setup, checked and resolved, before an engine looks at it."""

from typing import TYPE_CHECKING, NamedTuple

import peftplan.methods as methods
from peftplan.arch.modules import Architecture
from peftplan.job.request import Request
from peftplan.job.script import Script
from peftplan.job.setup import Setup
from peftplan.job.trainer_words import Reference
from peftplan.methods.adaptation import Adaptation, MethodConfig
from peftplan.storage import QuantConfig
from peftplan.storage.config import FOUR_BIT

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed


class Job(NamedTuple):
    """The input of every engine: what `estimate` counts, `trace` traces and `measure` runs.

    `method` and `config` are None if only peft itself can count the `adapter` config; `adapter` is empty where a method was
    named and no adapter config given.
    """

    request: Request
    method: methods.Method | None
    config: MethodConfig | None
    adapter: dict[str, object]
    setup: Setup
    quant: QuantConfig | None
    architecture: Architecture
    adaptation: Adaptation
    warnings: tuple[str, ...] = ()
    """Options that have no effect, shown with every result."""
    chosen: frozenset[str] = frozenset()
    """Options and fields of the method that the user set. The others were filled in."""
    distributed: "Distributed | None" = None
    """The strategy that divides the job over several GPUs; None on one."""
    multiprocessors: int | None = None
    """How many the card has; None takes those of `hardware.processors` for its compute capability."""
    second_config: str | None = None
    """The config of a teacher or a reward model that a file holds (`teacher.second_config`)."""

    @property
    def model(self) -> object:
        """The model as the user passed it; the config of a loaded model or of a file."""
        return self.request.model

    @property
    def script(self) -> Script:
        """Facts about the program around the step. A trainer that keeps the reference's logits keeps them beyond it,
        and one whose loop keeps the loss its graph."""
        by, sharded = self.setup.by, self.distributed is not None and self.distributed.strategy == "fsdp2"
        lasts = self.reference_lasts or (by.weighs_tokens and sharded)
        return self.request.script.model_copy(update={"outputs_outlive_step": True}) if lasts else self.request.script

    @property
    def reference_lasts(self) -> bool:
        """Whether the reference's logits stay until those of the next micro batch are there: torchtune's recipe with a second
        model deletes them."""
        return self.setup.by.reference_lasts and self.reference == "adapter_off"

    def on_card(self, multiprocessors: int | None) -> "Job":
        """The job on a card with so many multiprocessors, by which kernels are chosen and size their buffers."""
        return self if multiprocessors == self.multiprocessors else self._replace(multiprocessors=multiprocessors)

    @property
    def may_fuse(self) -> bool:
        """Whether the card decides which products with 4-bit weights are fused (`storage.fused_products`)."""
        return self.quant is not None and self.quant.layout in FOUR_BIT and not self.script.dequantizes_4bit

    @property
    def replicas(self) -> int:
        """The number of ranks that read batches of their own."""
        return 1 if self.distributed is None else self.distributed.replicas

    @property
    def reference(self) -> Reference:
        """Where the reference model of a preference or RL trainer comes from (trl `DPOTrainer.__init__`)."""
        if not any(forward.of == "reference" for forward in self.setup.forwards):
            return "none"
        if self.setup.by.teaches:
            return "copy" if self.setup.teacher_model is not None else "adapter_off"
        return "copy" if self.method is not None and self.method.name in ("full", "partial") else "adapter_off"

    @property
    def method_name(self) -> str:
        """The method's name as it is shown."""
        return self.method.name if self.method else str(self.adapter.get("peft_type")).lower()

    @property
    def is_full_or_lora(self) -> bool:
        """Whether the method trains weights of the model itself, or is LoRA without DoRA."""
        of_type = self.method is not None and self.method.peft_type in (None, "LORA")
        return of_type and not getattr(self.config, "use_dora", False)

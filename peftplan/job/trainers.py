"""What each trainer does around a model's step, as facts. Code asks for a fact; only this file compares names."""

from __future__ import annotations

from typing import Literal, NamedTuple

from peftplan.versions import named

TrainerName = Literal["plain", "transformers", "trl", "qlora-paper"]
Loss = Literal["auto", "full", "trl-chunked", "liger", "unsloth"]
Autocast = Literal["none", "bf16", "fp16"]


class Defaults(NamedTuple):
    """Values that a trainer sets unless the user does, by the names of the setup's options."""

    autocast: Autocast = "bf16"
    gradient_checkpointing: bool = True
    optim: str = "adamw_torch_fused"
    loss: Loss = "full"
    keep_outputs: bool = False
    use_cache: bool | None = False
    """None: as the model's config says."""
    kbit_prepare: bool = True


class Trainer(NamedTuple):
    """A trainer's defaults, and what it does that no option changes. The facts unset are those of transformers' Trainer under
    accelerate (`Trainer.training_step`, `Trainer.create_optimizer`).
    """

    name: TrainerName
    called: str
    """Its name in error messages."""
    defaults: Defaults = Defaults()
    drops_outputs: bool = True
    """Whether the loss is computed in a function of its own, which drops the model's outputs before backward."""
    prepares_model: bool = True
    """Whether accelerate prepares the model: autocast returns fp32 copies of 16-bit outputs, and the loss of fp16 is scaled."""
    clips_gradients: bool = True
    makes_optimizer: bool = True
    """Whether `Trainer.create_optimizer` makes the optimizer: its 8-bit optimizers keep embeddings in 32 bits."""
    collates: bool = True
    """Whether a collator makes the batches: transformers then makes no mask of its own (`Script.masks_unpadded`)."""
    always_masks: bool = False
    """Whether every batch has an attention mask, of ones where nothing is padded."""
    loads_on_device: bool = False
    """Whether the model is on its device before the adapter is made; Trainer moves both, unless the model is quantized."""
    loads_in_fp32: bool = False
    """Whether a model that is given by its name is loaded in fp32, whatever its config says."""
    turns_cache_off: bool = False
    """Whether the forward is called without a KV cache, whatever `use_cache` says."""
    casts: tuple[str, ...] = ()
    """Formats of the base on which all that trains is cast to bf16, DoRA's magnitudes excepted."""
    losses: tuple[Loss, ...] | None = None
    """The losses that it can compute; None: any."""
    sums_tokens: bool = False
    """Whether it makes the chunked loss itself, from the log-probabilities of the tokens that the forward returns."""
    only_causal: bool = False
    """Whether it trains causal language models only."""
    package: str | None = None
    """The package whose other trainers are not counted."""
    arguments: str | None = None
    """The class of its arguments, where it has one of its own."""

    def adapter_on_host(self, *, quantized: bool) -> bool:
        """Whether buffers that peft makes on the host stay there."""
        return self.loads_on_device or quantized

    def casts_adapter(self, quant: str | None) -> bool:
        """Whether all that trains is cast to bf16 on a base of this format."""
        return quant in self.casts


TRAINERS: dict[TrainerName, Trainer] = {
    trainer.name: trainer
    for trainer in (
        Trainer("transformers", "Trainer"),
        # trl `SFTTrainer.__init__` asks for `is_loaded_in_4bit` and `is_loaded_in_8bit` before it casts, projects in chunks
        # whatever `loss_type` says, and refuses Liger's fused loss (it keeps Liger's layer kernels). Unsloth replaces its
        # `compute_loss` by Trainer's.
        Trainer(
            "trl",
            f"SFTTrainer of {named('trl')}",
            Defaults(loss="trl-chunked", kbit_prepare=False),
            always_masks=True,
            loads_in_fp32=True,
            turns_cache_off=True,
            casts=("nf4", "fp4", "int8"),
            losses=("trl-chunked", "unsloth"),
            sums_tokens=True,
            only_causal=True,
            package="trl",
            arguments="SFTConfig",
        ),
        Trainer(
            "plain",
            "a hand-written loop",
            Defaults("none", gradient_checkpointing=False, optim="adamw_torch", keep_outputs=True, use_cache=None),
            drops_outputs=False,
            prepares_model=False,
            clips_gradients=False,
            makes_optimizer=False,
            collates=False,
            loads_on_device=True,
        ),
        Trainer("qlora-paper", "Trainer as the QLoRA paper ran it (arXiv 2305.14314)", Defaults(optim="paged_adamw_32bit")),
    )
}

DEFAULT: TrainerName = "transformers"
"""The trainer if none is set."""

CHUNKED: dict[str, object] = {"trainer": "trl", "loss": "trl-chunked"}
"""Options for a loss that never holds all logits: only SFTTrainer has it."""

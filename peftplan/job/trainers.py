"""What each trainer does around a model's step, as facts. Code asks for a fact; only this file compares names."""

from __future__ import annotations

from typing import Literal, NamedTuple

from peftplan.versions import named

TrainerName = Literal[
    "plain",
    "transformers",
    "trl",
    "qlora-paper",
    "trl-dpo",
    "trl-kto",
    "trl-reward",
    "trl-grpo",
    "trl-rloo",
    "trl-orpo",
    "trl-cpo",
    "torchtune",
]
Reference = Literal["none", "adapter_off", "copy"]
"""Where the reference model comes from: there is none, the policy without its adapter, or a second model."""
Loss = Literal["auto", "full", "trl-chunked", "liger", "unsloth", "torchtune-linear"]
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


class Forward(NamedTuple):
    """A forward of a step: of the policy, which trains, or of the reference model, which does not."""

    of: Literal["policy", "reference"]
    trains: bool = False
    """Whether its graph is kept for backward; else it runs under `no_grad`, and leaves a sum for each row."""
    batch: str = ""
    """The prefix of the batch's tensors that it reads. What a forward of such rows gives is dropped but for a sum of each row."""


LOSS = (Forward("policy", trains=True),)
"""A step that runs the model once, with its loss."""


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
    rows: int = 1
    """Rows of the batch for each example of `batch_size`: 2 where it is a pair of completions."""
    forwards: tuple[Forward, ...] = LOSS
    """The forwards of a step, in order; what those before it gave is alive while one runs."""
    token_outputs: tuple[str, ...] = ("entropy", "is_top1")
    """What the chunked head gives for each token besides its log-probability (`add_fused_lm_head`)."""
    sums_rows: bool = False
    """Whether its loss is made of the log-probabilities of whole rows, summed from those of their tokens."""
    of_logits: bool = False
    """Whether its loss is made of all logits of pairs, which the model returns without a loss."""
    without_extra_rows: tuple[str, ...] = ()
    """Values of `loss_type` that leave out the forwards of extra rows (`Forward.batch`)."""
    task: str | None = None
    """The task of the models that it trains, where it is one."""
    num_labels: int | None = None
    """Scores of its head."""
    completion: int | None = None
    """The default of `max_completion_length`, where the policy writes the completions that it is trained on."""
    beta: float | None = None
    """The default of `beta`; 0 leaves the reference model out."""
    num_generations: int | None = None
    """The default of `num_generations`, completions of a prompt, all of which one generation holds."""
    options: frozenset[str] = frozenset()
    """The options of preference and RL trainers that it has."""
    loss_types: tuple[str, ...] = ()
    """What it accepts as `loss_type`."""
    many_losses: bool = False
    """Whether it adds up losses of several types."""
    expandable_segments: bool = False
    """Whether its package sets `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` (torchtune/__init__.py)."""
    own_modules: bool = False
    """Whether it builds the model of modules of its own, on the card, with adapters in the model's dtype."""
    package: str | None = None
    """The package whose other trainers are not counted."""
    arguments: str | None = None
    """The class of its arguments, where it has one of its own."""

    @property
    def generates(self) -> bool:
        """Whether the policy writes the completions that it is trained on."""
        return self.completion is not None

    @property
    def of_preferences(self) -> bool:
        """Whether it trains on preferences or rewards: a step is more than a forward with its loss."""
        return bool(self.options) or self.rows > 1

    def adapter_on_host(self, *, quantized: bool) -> bool:
        """Whether buffers that peft makes on the host stay there."""
        return self.loads_on_device or quantized

    def casts_adapter(self, quant: str | None) -> bool:
        """Whether all that trains is cast to bf16 on a base of this format."""
        return quant in self.casts


# trl `SFTTrainer.__init__` asks for `is_loaded_in_4bit` and `is_loaded_in_8bit` before it casts, projects in chunks
# whatever `loss_type` says, and refuses Liger's fused loss (it keeps Liger's layer kernels). Unsloth replaces its
# `compute_loss` by Trainer's.
TRL = Trainer(
    "trl",
    f"SFTTrainer of {named('trl')}",
    Defaults(loss="trl-chunked", kbit_prepare=False),
    always_masks=True,
    loads_in_fp32=True,
    turns_cache_off=True,
    casts=("nf4", "fp4", "int8"),
    losses=("trl-chunked", "unsloth"),
    sums_tokens=True,
    task="CAUSAL_LM",
    package="trl",
    arguments="SFTConfig",
)
# The reference model scores what was generated before the step, when nothing of it is alive (`_generate_and_score_completions`).
GENERATING = TRL._replace(
    losses=("trl-chunked",),
    forwards=(Forward("reference"), *LOSS),
    token_outputs=("entropy",),
    completion=512,
    options=frozenset(
        {
            *("max_completion_length", "max_prompt_length", "beta", "num_generations", "steps_per_generation"),
            *("use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"),
        }
    ),
)
OF_PREFERENCES = TRL._replace(
    losses=("trl-chunked",),
    sums_rows=True,
    token_outputs=("entropy", "mean_logits", "is_top1"),
    options=frozenset({"max_completion_length", "precompute_ref_log_probs", "beta", "loss_type"}),
)

# Pairs without a reference model; they keep all logits (`experimental/orpo`, `experimental/cpo`).
OF_LOGITS = TRL._replace(
    defaults=TRL.defaults._replace(loss="full", kbit_prepare=True),
    loads_in_fp32=False,
    casts=(),
    losses=("full",),
    sums_tokens=False,
    rows=2,
    of_logits=True,
    options=frozenset({"beta"}),
)
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero"),
    *("apo_down", "discopop", "sft", "sigmoid_norm"),
)
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
"""The names that trl's `compute_loss` compares with (dpo_trainer.py, grpo_trainer.py)."""

TRAINERS: dict[TrainerName, Trainer] = {
    trainer.name: trainer
    for trainer in (
        Trainer("transformers", "Trainer"),
        TRL,
        # Chosen and rejected completion of a prompt are rows of one batch (`DataCollatorForPreference`).
        OF_PREFERENCES._replace(
            name="trl-dpo",
            called=f"DPOTrainer of {named('trl')}",
            rows=2,
            forwards=(*LOSS, Forward("reference")),
            loss_types=DPO_LOSSES,
            many_losses=True,
            arguments="DPOConfig",
        ),
        # Completions of other prompts are scored too, by both models (`_compute_kl_logps`).
        OF_PREFERENCES._replace(
            name="trl-kto",
            called=f"KTOTrainer of {named('trl')}",
            forwards=(Forward("policy", batch="KL_"), *LOSS, Forward("reference", batch="KL_"), Forward("reference")),
            without_extra_rows=("apo_zero_unpaired",),
            loss_types=("kto", "apo_zero_unpaired"),
            arguments="KTOConfig",
        ),
        TRL._replace(
            name="trl-reward",
            called=f"RewardTrainer of {named('trl')}",
            defaults=TRL.defaults._replace(loss="full"),
            losses=("full",),
            sums_tokens=False,
            rows=2,
            task="SEQ_CLS",
            num_labels=1,
            arguments="RewardConfig",
        ),
        OF_LOGITS._replace(name="trl-orpo", called=f"ORPOTrainer of {named('trl')}", arguments="ORPOConfig"),
        OF_LOGITS._replace(
            name="trl-cpo",
            called=f"CPOTrainer of {named('trl')}",
            options=OF_LOGITS.options | {"loss_type"},
            loss_types=("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
            arguments="CPOConfig",
        ),
        GENERATING._replace(
            name="trl-grpo",
            called=f"GRPOTrainer of {named('trl')}",
            beta=0.0,
            num_generations=8,
            options=GENERATING.options | {"loss_type"},
            loss_types=GRPO_LOSSES,
            arguments="GRPOConfig",
        ),
        GENERATING._replace(
            name="trl-rloo", called=f"RLOOTrainer of {named('trl')}", beta=0.05, num_generations=2, arguments="RLOOConfig"
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
        # Recipes on one device (`lora_finetune_single_device`, `full_finetune_single_device`).
        Trainer(
            "torchtune",
            "torchtune's recipe",
            Defaults("none", gradient_checkpointing=False, loss="torchtune-linear", kbit_prepare=False),
            prepares_model=False,
            clips_gradients=False,
            makes_optimizer=False,
            loads_on_device=True,
            turns_cache_off=True,
            losses=("torchtune-linear", "full"),
            task="CAUSAL_LM",
            expandable_segments=True,
            own_modules=True,
        ),
        Trainer("qlora-paper", "Trainer as the QLoRA paper ran it (arXiv 2305.14314)", Defaults(optim="paged_adamw_32bit")),
    )
}

ONE_FORWARD = tuple(trainer.name for trainer in TRAINERS.values() if not trainer.of_preferences)
"""Trainers whose step is a forward with its loss."""

DEFAULT: TrainerName = "transformers"
"""The trainer if none is set."""

CHUNKED: dict[str, object] = {"trainer": "trl", "loss": "trl-chunked"}
"""Options for a loss that never holds all logits: only SFTTrainer has it."""

"""Each trainer's facts. Other code reads a fact; only the tables of trainers use names."""

from __future__ import annotations

from peftplan.distributed.layout import LLAMA_FACTORY_V1, TORCHTUNE
from peftplan.job.axolotl_trainers import BEFORE_0_21, OF_AXOLOTL, PINS_OF_0_19
from peftplan.job.swift_trainers import OF_SWIFT
from peftplan.job.tool_trainers import (
    AUTOMODEL_BI_ENCODER,
    AUTOMODEL_CROSS_ENCODER,
    AUTOMODEL_KD,
    AUTOMODEL_RECIPE,
    IN_LLAMA_FACTORY,
    OF_SENTENCES,
    TORCHTUNE_RECIPE,
)
from peftplan.job.trainer import LOSS, Defaults, Forward, Trainer
from peftplan.job.trainer_words import TrainerName
from peftplan.job.trl_trainers import OF_TRL
from peftplan.versions import AXOLOTL_KEEPS_TABLES

TRAINERS: dict[TrainerName, Trainer] = {
    trainer.name: trainer
    for trainer in (
        Trainer("transformers", "Trainer", search="all", traced_on_ranks=True),
        *OF_TRL,
        # llamafactory 0.9.5, train/sft/trainer.py, model/adapter.py:52 (`_setup_full_tuning`), hparams/parser.py:517.
        Trainer(
            "llamafactory",
            "Seq2SeqTrainer of LLaMA-Factory 0.9.5",
            Defaults(kbit_prepare=False, device_map="cuda"),
            full_in_fp32=True,
            widens=True,
            turns_cache_off=True,
            pins_accelerate=True,
            deepspeed="0.18.4",
            search="full",
        ),
        # train/sft/trainer.py:151; accelerate moves it under DeepSpeed, where it was rehearsed.
        Trainer(
            "llamafactory-asft",
            "LLaMA-Factory 0.9.5 with ASFT",
            losses=("full",),
            task="CAUSAL_LM",
            anchors=True,
            forwards=(Forward("reference"), *LOSS),
            search="full",
        ),
        # model/model_utils/checkpointing.py:80, train/trainer_utils.py (`_create_badam_optimizer`).
        Trainer(
            "llamafactory-partial",
            "LLaMA-Factory 0.9.5 that trains some layers",
            checkpoints_frozen=False,
            pins_accelerate=True,
            search="full",
        ),
        *OF_AXOLOTL,
        IN_LLAMA_FACTORY._replace(
            name="llamafactory-dpo",
            called="DPOTrainer of LLaMA-Factory 0.9.5",
            rows=2,
            forwards=(*LOSS, Forward("reference")),
            without_reference=("orpo", "simpo"),
            loss_types=("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"),
        ),
        IN_LLAMA_FACTORY._replace(
            name="llamafactory-kto",
            called="KTOTrainer of LLaMA-Factory 0.9.5",
            forwards=(*LOSS, Forward("policy", batch="KL_"), Forward("reference"), Forward("reference", batch="KL_")),
            keeps_logits=("policy", "reference"),
            kinds="after its forwards",
            options=IN_LLAMA_FACTORY.options - {"loss_type"},
        ),
        # train/rm/trainer.py (`PairwiseTrainer.compute_loss`), model/loader.py:186; the model makes its own loss too.
        Trainer(
            "llamafactory-reward",
            "PairwiseTrainer of LLaMA-Factory 0.9.5",
            Defaults(kbit_prepare=False, device_map="cuda"),
            rows=2,
            losses=("full",),
            task="CAUSAL_LM",
            scores_values=True,
            always_masks=True,
            turns_cache_off=True,
            pins_accelerate=True,
            search="full",
        ),
        *OF_SWIFT,
        Trainer(
            "plain",
            "a hand-written loop",
            Defaults("none", gradient_checkpointing=False, optim="adamw_torch", keep_outputs=True, use_cache=None),
            drops_outputs=False,
            prepares_model=False,
            clips_gradients=False,
            makes_optimizer=False,
            updates_ranks=True,
            collates=False,
            collects_batches=False,
            loads_on_device=True,
        ),
        TORCHTUNE_RECIPE,
        # torchtune 0.6.1, recipes/lora_dpo_single_device.py, rlhf/sequence_processing.py (`get_batch_log_probs`).
        TORCHTUNE_RECIPE._replace(
            name="torchtune-dpo",
            called="torchtune's DPO recipe",
            defaults=TORCHTUNE_RECIPE.defaults._replace(loss="full"),
            losses=("full",),
            rows=2,
            forwards=(*LOSS, Forward("reference")),
            sums_rows=True,
            scoring="divided softmax",
            reference_lasts=True,
            under_fsdp2=("adapter_off", "copy"),
            layout=TORCHTUNE._replace(frees_root=True),
        ),
        # The same commit, recipes/knowledge_distillation_single_device.py, knowledge_distillation_distributed.py.
        TORCHTUNE_RECIPE._replace(
            name="torchtune-kd",
            called="torchtune's distillation recipe",
            defaults=TORCHTUNE_RECIPE.defaults._replace(loss="torchtune-kl"),
            losses=("torchtune-kl",),
            teaches=True,
            forwards=(*LOSS, Forward("reference")),
            under_ddp=(),
            under_zero2=(),
            under_fsdp2=("copy",),
            options=frozenset({"teacher_model"}),
        ),
        AUTOMODEL_BI_ENCODER,
        AUTOMODEL_CROSS_ENCODER,
        AUTOMODEL_RECIPE,
        AUTOMODEL_RECIPE._replace(
            name="automodel-hf", called=f"{AUTOMODEL_RECIPE.called} with transformers' models", own_decoders=False
        ),
        # recipes/vlm/finetune.py (`_forward_backward_step`): the other recipe deletes the outputs before backward.
        AUTOMODEL_RECIPE._replace(
            name="automodel-vlm", called=f"{AUTOMODEL_RECIPE.called} for vision-language models", holds_outputs=True
        ),
        AUTOMODEL_KD,
        # The same with one mesh for both models.
        AUTOMODEL_KD._replace(
            name="automodel-kd-beside",
            called=f"{AUTOMODEL_KD.called} with one mesh",
            teaches=True,
            freezes_teacher=True,
            forwards=(*LOSS, Forward("reference")),
            under_fsdp2=("copy",),
            options=frozenset({"teacher_model"}),
        ),
        # llamafactory 0.9.5, v1/core/base_trainer.py, v1/core/model_engine.py, v1/trainers/sft_trainer.py; its launcher
        # (v1/launcher.py) sets expandable segments where it starts several processes.
        Trainer(
            "llamafactory-v1",
            "LLaMA-Factory v1's trainer",
            Defaults("none", optim="adamw_torch", use_cache=None, kbit_prepare=False),
            prepares_model=False,
            makes_optimizer=False,
            collects_batches=False,
            always_masks=True,
            loads_on_device=True,
            full_in_fp32=True,
            losses=("full",),
            weighs_tokens=True,
            task="CAUSAL_LM",
            expandable_segments=True,
            layout=LLAMA_FACTORY_V1,
        ),
        OF_SENTENCES,
        OF_SENTENCES._replace(
            name="unsloth-sentence-transformers",
            called="SentenceTransformerTrainer under Unsloth 2026.10.9",
            expandable_segments=True,
            arguments=None,
        ),
        Trainer(
            "qlora-paper",
            "Trainer as the QLoRA paper ran it (arXiv 2305.14314)",
            Defaults(optim="paged_adamw_32bit"),
            collects_batches=False,
        ),
    )
}

OLDER = {trainer.name: (AXOLOTL_KEEPS_TABLES, BEFORE_0_21) for trainer in OF_AXOLOTL} | {
    "axolotl": (AXOLOTL_KEEPS_TABLES, BEFORE_0_21 | PINS_OF_0_19)
}
"""Trainer → the release of its tool that changed it, and what was otherwise before."""


def of_release(trainer: Trainer, version: str | None) -> Trainer:
    """The trainer as this release of its tool has it; None is today's."""
    change, facts = OLDER.get(trainer.name, (None, BEFORE_0_21))
    return trainer._replace(**facts) if change is not None and change.after(version) else trainer  # type: ignore[arg-type]


ONE_FORWARD = tuple(trainer.name for trainer in TRAINERS.values() if not trainer.of_preferences)
"""Trainers whose step is a forward with its loss."""

DEFAULT: TrainerName = "transformers"
"""The trainer if none is set."""

OF_PROGRAMS: tuple[TrainerName, ...] = ("transformers", "plain", "qlora-paper")
"""Trainers of a user's own program, which can take SFTTrainer instead; others are chosen together with a tool."""

CHUNKED: dict[str, object] = {"trainer": "trl", "loss": "trl-chunked"}
"""Options for a loss that never materializes all logits: only SFTTrainer has it."""

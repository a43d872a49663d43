"""Each trainer's facts. Other code reads a fact; only this file and `trl_trainers.py` use names."""

from __future__ import annotations

from peftplan.distributed.layout import LLAMA_FACTORY_V1, TORCHTUNE
from peftplan.job.loss_sizes import CHORD
from peftplan.job.tool_trainers import (
    AUTOMODEL_KD,
    AUTOMODEL_RECIPE,
    EBFT_IN_AXOLOTL,
    EBFT_IN_STRIDES,
    EBFT_IN_STRIDES_IN_FULL,
    EBFT_IN_STRIDES_SCORED,
    GRPO_IN_AXOLOTL,
    IN_AXOLOTL,
    IN_LLAMA_FACTORY,
    IN_SWIFT,
    OF_LOGITS_IN_AXOLOTL,
    OF_SENTENCES,
    SWIFT_DPO,
    SWIFT_GKD,
    SWIFT_GRPO,
    SWIFT_PAIRS,
    SWIFT_RERANKER,
    TORCHTUNE_RECIPE,
)
from peftplan.job.trainer import LOSS, Defaults, Forward, Trainer, TrainerName
from peftplan.job.trl_trainers import DPO_LOSSES, OF_LOGITS, OF_REWARDS, OF_TRL

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
        Trainer(
            "axolotl",
            "Trainer of axolotl 0.19",
            Defaults(kbit_prepare=False),
            turns_cache_off=True,
            own_fsdp2=True,
            recasts_tables=True,
            hooks_adapted=True,
            wide_ends=True,
            pins_liger=True,
            transformers="5.16",
            deepspeed="0.18.9",
            expandable_segments=True,
        ),
        IN_AXOLOTL._replace(
            name="axolotl-dpo",
            called="DPOTrainer of axolotl 0.19",
            rows=2,
            forwards=(*LOSS, Forward("reference")),
            loss_types=DPO_LOSSES,
            many_losses=True,
            empties_cache=True,
            beside_copy=True,
        ),
        IN_AXOLOTL._replace(
            name="axolotl-kto",
            called="KTOTrainer of axolotl 0.19",
            forwards=(Forward("policy", batch="KL_"), *LOSS, Forward("reference", batch="KL_"), Forward("reference")),
            without_extra_rows=("apo_zero_unpaired",),
            loss_types=("kto", "apo_zero_unpaired"),
            kinds="in the log",
        ),
        OF_REWARDS._replace(
            name="axolotl-reward",
            called="RewardTrainer of axolotl 0.19",
            defaults=OF_REWARDS.defaults._replace(kbit_prepare=False),
            recasts_tables=True,
            hooks_adapted=True,
            expandable_segments=True,
            loads_in_fp32=False,
            narrow_under_zero3=False,
            under_ddp=(),
            under_zero2=(),
            package=None,
            arguments=None,
        ),
        GRPO_IN_AXOLOTL,
        EBFT_IN_AXOLOTL,
        EBFT_IN_STRIDES,
        EBFT_IN_STRIDES_IN_FULL,
        EBFT_IN_STRIDES_SCORED,
        OF_LOGITS_IN_AXOLOTL._replace(name="axolotl-orpo", called="ORPOTrainer of axolotl 0.19"),
        OF_LOGITS_IN_AXOLOTL._replace(
            name="axolotl-cpo",
            called="CPOTrainer of axolotl 0.19",
            options=OF_LOGITS.options | {"loss_type"},
            loss_types=("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
        ),
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
        # The text part of a vision-language model, whose tower it shows a picture (template/base.py:2450).
        Trainer(
            "swift-text-part",
            "Seq2SeqTrainer of ms-swift 4.6 over rows without pictures",
            search="all",
            traced_on_ranks=True,
            shows_picture=True,
        ),
        SWIFT_DPO,
        # Rows of pairs without padding, one behind the other (`padding_free`, `packing`): `batch_size` is that of such rows.
        SWIFT_DPO._replace(name="swift-dpo-packed", called="DPOTrainer of ms-swift 4.6 without padding", rows=1),
        IN_SWIFT._replace(
            name="swift-kto",
            called="KTOTrainer of ms-swift 4.6",
            forwards=(Forward("policy", batch="KL_"), *LOSS, Forward("reference", batch="KL_"), Forward("reference")),
            without_extra_rows=("apo_zero_unpaired",),
            others_in_data=True,
            sums_rows=True,
            completions_alone=True,
            disables_dropout=True,
            under_zero2=("adapter_off",),
            options=frozenset({"max_completion_length", "beta", "loss_type"}),
            loss_types=("kto", "apo_zero_unpaired"),
        ),
        IN_SWIFT._replace(
            name="swift-reward",
            called="RewardTrainer of ms-swift 4.6",
            rows=2,
            scoring=None,
            task="SEQ_CLS",
            num_labels=1,
            disables_dropout=True,
            under_ddp=("none",),
            under_zero2=("none",),
            under_zero3=("none",),
        ),
        # Pairs of texts, all those of a batch in one row (trainers/embedding_trainer.py, loss/embedding.py).
        IN_SWIFT._replace(
            name="swift-embedding",
            called="EmbeddingTrainer of ms-swift 4.6",
            scoring=None,
            embeds_rows=True,
            under_zero2=("none",),
        ),
        # `sequence_parallel_size`: a rank reads a part of the row, of which all hidden states come together (mixin.py:832).
        IN_SWIFT._replace(
            name="swift-embedding-shared-rows",
            called="EmbeddingTrainer of ms-swift 4.6 whose rows ranks share",
            scoring=None,
            embeds_rows=True,
            shares_rows=True,
            under_ddp=("none",),
        ),
        SWIFT_RERANKER,
        # Texts without padding, one behind the other (`padding_free`, `packing`; trainers/mixin.py:825).
        SWIFT_RERANKER._replace(
            name="swift-generative-reranker-packed",
            called="RerankerTrainer of ms-swift 4.6 without padding",
            scores_words="texts of a row",
        ),
        SWIFT_RERANKER._replace(
            name="swift-generative-reranker-shared-rows",
            called="RerankerTrainer of ms-swift 4.6 whose rows ranks share",
            scores_words="texts of a row",
            shares_rows=True,
        ),
        SWIFT_PAIRS._replace(name="swift-orpo", called="ORPOTrainer of ms-swift 4.6"),
        SWIFT_PAIRS._replace(
            name="swift-cpo",
            called="CPOTrainer of ms-swift 4.6",
            options=frozenset({"beta", "loss_type"}),
            loss_types=("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
        ),
        SWIFT_GRPO,
        SWIFT_GRPO._replace(
            name="swift-grpo-reloading",
            called=f"{SWIFT_GRPO.called} whose weights wait on the host",
            reloads_weights=True,
            under_zero1=("adapter_off", "copy"),
            loss_types=(*SWIFT_GRPO.loss_types, CHORD),
        ),
        # `deepspeed zero3_offload` with `offload_model`: rotary tables go to the host and back, and take weights along
        # (rlhf_trainers/rollout_mixin.py:1454, :1475).
        SWIFT_GRPO._replace(
            name="swift-grpo-unhosted",
            called=f"{SWIFT_GRPO.called} whose weights leave the host",
            under_ddp=(),
            under_zero2=(),
            under_zero3=("adapter_off",),
            options=SWIFT_GRPO.options | {"move_model_batches"},
        ),
        SWIFT_GRPO._replace(
            name="swift-grpo-grouped",
            called=f"{SWIFT_GRPO.called} that sends groups of layers",
            under_ddp=(),
            under_zero2=(),
            under_zero3=("copy",),
            options=SWIFT_GRPO.options | {"move_model_batches"},
        ),
        # `sequence_parallel_size`, with weights that wait on the host (rlhf_trainers/grpo_trainer.py:1468).
        SWIFT_GRPO._replace(
            name="swift-grpo-shared-rows",
            called=f"{SWIFT_GRPO.called} whose rows ranks share",
            completions_alone=False,
            shares_rows=True,
            reloads_weights=True,
            under_ddp=(),
            under_zero2=(),
        ),
        # `teacher_model`, with `teacher_deepspeed` (rlhf_trainers/rollout_mixin.py:239, grpo_trainer.py:541).
        SWIFT_GRPO._replace(
            name="swift-grpo-taught",
            called=f"{SWIFT_GRPO.called} with a teacher",
            taught=True,
            freezes_teacher=True,
            under_ddp=(),
            under_zero2=("none", "copy"),
            under_zero3=(),
            options=SWIFT_GRPO.options | {"teacher_model"},
        ),
        SWIFT_GRPO._replace(name="swift-grpo-entropies", called=f"{SWIFT_GRPO.called} with entropies", scores_entropies=True),
        SWIFT_GKD,
        # What it learns is in the data (`lmbda` 0).
        SWIFT_GKD._replace(
            name="swift-gkd-of-data",
            called="GKDTrainer of ms-swift 4.6 without completions of its own",
            completion=None,
            options=frozenset({"teacher_model"}),
        ),
        # The same with the cross entropy of labels (`sft_alpha`; rlhf_trainers/gkd_trainer.py:144, :190).
        SWIFT_GKD._replace(
            name="swift-gkd-with-labels",
            called="GKDTrainer of ms-swift 4.6 with the loss of labels",
            completion=None,
            adds_own_loss=True,
            under_ddp=(),
            options=frozenset({"teacher_model"}),
        ),
        # The teacher is the student without its adapter, and all completions are the student's (`lmbda` 1).
        SWIFT_GKD._replace(
            name="swift-gkd-of-itself",
            called="GKDTrainer of ms-swift 4.6 whose student is its own teacher",
            completions_alone=True,
            under_ddp=(),
            under_zero0=("adapter_off",),
            under_zero3=(),
            options=SWIFT_GKD.options - {"teacher_model"},
        ),
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

ONE_FORWARD = tuple(trainer.name for trainer in TRAINERS.values() if not trainer.of_preferences)
"""Trainers whose step is a forward with its loss."""

DEFAULT: TrainerName = "transformers"
"""The trainer if none is set."""

CHUNKED: dict[str, object] = {"trainer": "trl", "loss": "trl-chunked"}
"""Options for a loss that never materializes all logits: only SFTTrainer has it."""

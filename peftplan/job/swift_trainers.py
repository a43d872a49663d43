"""The trainers of ms-swift 4.6: what they have in common, and each one's facts."""

from __future__ import annotations

from peftplan.job.loss_sizes import CHORD
from peftplan.job.trainer import LOSS, Defaults, Forward, Trainer
from peftplan.job.trl_trainers import DPO_LOSSES, GENERATING

# ms-swift 4.6.0 and the newest trl that it accepts (rlhf_trainers/dpo_trainer.py, grpo_trainer.py, orpo_trainer.py): its
# own Trainer, and `selective_log_softmax` of all logits.
IN_SWIFT = Trainer(
    "transformers",
    "ms-swift 4.6",
    Defaults(device_map="cuda"),
    losses=("full",),
    turns_cache_off=True,
    task="CAUSAL_LM",
    scoring="rows",
    token_outputs=(),
    reentrant=True,
    search="all",
    shows_picture=True,
)
SWIFT_DPO = IN_SWIFT._replace(
    name="swift-dpo",
    called="DPOTrainer of ms-swift 4.6",
    rows=2,
    forwards=(*LOSS, Forward("reference")),
    sums_rows=True,
    completions_alone=True,
    disables_dropout=True,
    under_ddp=("adapter_off",),
    under_zero2=("adapter_off", "copy"),
    under_zero3=("adapter_off", "copy"),
    options=frozenset({"max_completion_length", "beta", "loss_type"}),
    loss_types=DPO_LOSSES,
    many_losses=True,
)
SWIFT_PAIRS = IN_SWIFT._replace(  # without a reference model
    rows=2, disables_dropout=True, under_zero2=("none",), under_zero3=("none",), options=frozenset({"beta"})
)
# Scores of texts (trainers/reranker_trainer.py): those of a batch are rows.
SWIFT_RERANKER = Trainer(
    "swift-generative-reranker",
    "RerankerTrainer of ms-swift 4.6",
    losses=("full",),
    task="CAUSAL_LM",
    scores_words="rows",
    search="all",
    traced_on_ranks=True,
)
SWIFT_GRPO = IN_SWIFT._replace(
    name="swift-grpo",
    called="GRPOTrainer of ms-swift 4.6",
    collects_batches=False,
    forwards=GENERATING.forwards,
    completions_alone=True,
    completion=512,
    beta=0.04,
    num_generations=8,
    under_ddp=("none", "adapter_off", "copy"),
    under_zero2=("adapter_off", "copy"),
    under_zero3=("none", "adapter_off", "copy"),
    sends_at_once=True,
    gathers_when_called=True,
    options=GENERATING.options | {"loss_type", "move_model_batches"},
    loss_types=("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"),
)
SWIFT_GKD = IN_SWIFT._replace(
    name="swift-gkd",
    called="GKDTrainer of ms-swift 4.6",
    collects_batches=False,
    teaches=True,
    freezes_teacher=True,
    compares_at_once=512,
    forwards=(*LOSS, Forward("reference")),
    completion=512,
    sends_at_once=True,
    under_ddp=("copy",),
    under_zero3=("copy",),
    options=GENERATING.options - {"beta", "num_generations"} | {"teacher_model"},
)

OF_SWIFT = (
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
        sends_from_host=True,
        under_ddp=(),
        under_zero2=(),
        under_zero3=("adapter_off",),
    ),
    SWIFT_GRPO._replace(
        name="swift-grpo-grouped",
        called=f"{SWIFT_GRPO.called} that sends groups of layers",
        sends_from_host=True,
        under_ddp=(),
        under_zero2=(),
        under_zero3=("copy",),
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
)

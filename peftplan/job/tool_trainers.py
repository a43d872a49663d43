"""Trainers of other tools, which the table of trainers varies."""

from __future__ import annotations

from peftplan.distributed.layout import AUTOMODEL, TORCHTUNE
from peftplan.job.loss_sizes import RECEIVED
from peftplan.job.trainer import LOSS, Defaults, Forward, Trainer
from peftplan.job.trl_trainers import DPO_LOSSES, GENERATING, OF_LOGITS, OF_PREFERENCES, TRL

# axolotl 0.19 and the trl that it pins. axolotl puts kernels of its own in place of `selective_log_softmax` and
# `entropy_from_logits` (loaders/patch_manager.py, monkeypatch/trainer/utils.py).
IN_AXOLOTL = OF_PREFERENCES._replace(
    defaults=TRL.defaults._replace(loss="full", kbit_prepare=False),
    loads_in_fp32=False,
    narrow_under_zero3=False,
    losses=("full",),
    sums_tokens=False,
    scoring="flat kernel",
    keeps_logits=("policy", "reference"),
    token_outputs=(),
    recasts_tables=True,
    hooks_adapted=True,
    searches_behind_towers=False,
    expandable_segments=True,
    package=None,
    arguments=None,
)


OF_LOGITS_IN_AXOLOTL = OF_LOGITS._replace(
    defaults=OF_LOGITS.defaults._replace(kbit_prepare=False),
    scoring="flat kernel",
    recasts_tables=True,
    hooks_adapted=True,
    expandable_segments=True,
    package=None,
    arguments=None,
)


# GRPO of the trl that axolotl pins, of rewards that hold nothing on the card.
GRPO_IN_AXOLOTL = IN_AXOLOTL._replace(
    name="axolotl-grpo",
    called="GRPOTrainer of axolotl 0.19",
    collects_batches=False,
    sums_rows=False,
    keeps_logits=(),
    forwards=GENERATING.forwards,
    completions_alone=True,
    disables_dropout=False,
    completion=512,
    beta=0.0,
    num_generations=8,
    wide_reference=True,
    options=GENERATING.options | {"loss_type"},
    loss_types=("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"),
)


# GRPO of the trl that axolotl pins, whose reward compares what layers hold of completions and of the data (axolotl 0.19.0,
# core/trainers/ebft/trainer.py). Adapted models alone: without an adapter it compares with a copy of the model.
EBFT_IN_AXOLOTL = GRPO_IN_AXOLOTL._replace(
    name="axolotl-ebft",
    called="EBFTTrainer of axolotl 0.19",
    forwards=LOSS,
    wide_reference=False,
    reads_features=True,
)


# The same package's Trainer of documents (core/trainers/ebft/strided.py), with its defaults: four rollouts of a document, and
# `stride`, `context_length` and `generate_max_len` 8. Each rollout is a forward with a graph of its own.
EBFT_IN_STRIDES = IN_AXOLOTL._replace(
    name="axolotl-ebft-strided",
    called="strided EBFT of axolotl 0.19",
    balances_experts=False,
    sums_rows=False,
    scoring=None,
    keeps_logits=(),
    forwards=LOSS * 4,
    disables_dropout=False,
    completions_alone=True,
    completion=1016,
    block=8,
    options=frozenset({"max_completion_length"}),
    loss_types=(),
)


# With a share of cross entropy (`ce_coef`; strided.py:670, `compute_start`).
EBFT_IN_STRIDES_SCORED = EBFT_IN_STRIDES._replace(
    name="axolotl-ebft-strided-scored", called="strided EBFT of axolotl 0.19 with a cross entropy", scores_documents=True
)


# Without an adapter the model has no `lm_head` beside its backbone (strided.py:661), so all rollouts are one forward with all
# logits; a copy of the model in 16 bits reads them. Norms and embeddings: loaders/model.py:434.
EBFT_IN_STRIDES_IN_FULL = EBFT_IN_STRIDES._replace(
    name="axolotl-ebft-strided-full",
    called="strided EBFT of axolotl 0.19 without adapters",
    rows=len(EBFT_IN_STRIDES.forwards),
    forwards=(*LOSS, Forward("reference")),
    beta=1.0,
    wide_ends=True,
)


# LLaMA-Factory 0.9.5 (hparams/parser.py, `get_train_args`; train/dpo/trainer.py, train/kto/trainer.py; train/trainer_utils.py,
# `get_batch_logps`), whose adapters stay as they are.
IN_LLAMA_FACTORY = IN_AXOLOTL._replace(
    balances_experts=False,
    recasts_tables=False,
    hooks_adapted=False,
    expandable_segments=False,
    reentrant_under_zero3=False,
    defaults=IN_AXOLOTL.defaults._replace(device_map="cuda"),
    casts=(),
    scoring="softmax",
    keeps_logits=("policy",),
    options=frozenset({"max_completion_length", "beta", "loss_type"}),
)


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
    under_zero3=("none", "copy"),
    sends_at_once=True,
    gathers_when_called=True,
    options=GENERATING.options | {"loss_type"},
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


# recipes/llm/train_ft.py: a loop that computes the loss apart from the model, which it calls without labels.
AUTOMODEL_RECIPE = Trainer(
    "automodel",
    "NeMo Automodel's recipe",
    Defaults("none", gradient_checkpointing=False, optim="adamw_torch", use_cache=None, kbit_prepare=False),
    prepares_model=False,
    clips_gradients=False,
    makes_optimizer=False,
    collects_batches=False,
    always_masks=True,
    loads_on_device=True,
    losses=("full", "te-parallel", "cut-apart"),
    loss_apart=True,
    hooks_inputs=False,
    own_decoders=True,
    own_lora=True,
    adapters_as_base=True,
    layout=AUTOMODEL,
)
# recipes/llm/kd.py (`_forward_backward_step`), where other GPUs run the teacher; `student_out` lives until it returns.
AUTOMODEL_KD = AUTOMODEL_RECIPE._replace(
    name="automodel-kd",
    called="NeMo Automodel's distillation recipe",
    defaults=AUTOMODEL_RECIPE.defaults._replace(loss=RECEIVED),
    losses=(RECEIVED,),
    holds_outputs=True,
)


# torchtune at bd2a0fc7. Recipes on one device (`lora_finetune_single_device`, `full_finetune_single_device`).
TORCHTUNE_RECIPE = Trainer(
    "torchtune",
    "torchtune's recipe",
    Defaults("none", gradient_checkpointing=False, loss="torchtune-linear", kbit_prepare=False),
    prepares_model=False,
    clips_gradients=False,
    makes_optimizer=False,
    collects_batches=False,
    loads_on_device=True,
    turns_cache_off=True,
    losses=("torchtune-linear", "torchtune-chunked", "full"),
    task="CAUSAL_LM",
    expandable_segments=True,
    own_modules=True,
    hooks_inputs=False,
    adapters_as_base=True,
    layout=TORCHTUNE,
)


# sentence-transformers 6.2 over transformers' Trainer, with MultipleNegativesRankingLoss of two columns.
OF_SENTENCES = Trainer(
    "sentence-transformers",
    "SentenceTransformerTrainer of sentence-transformers 6.2",
    Defaults(gradient_checkpointing=False),
    loads_on_device=True,
    losses=("full",),
    embeds=True,
    forwards=(*LOSS, *LOSS),
    task="FEATURE_EXTRACTION",
    arguments="SentenceTransformerTrainingArguments",
)

"""Trainers of other tools, which the table of trainers varies."""

from __future__ import annotations

from peftplan.distributed.layout import AUTOMODEL, OF_ENCODERS, TORCHTUNE
from peftplan.job.axolotl_trainers import IN_AXOLOTL
from peftplan.job.loss_sizes import RECEIVED
from peftplan.job.trainer import LOSS, Defaults, Trainer

# LLaMA-Factory 0.9.5 (hparams/parser.py, `get_train_args`; train/dpo/trainer.py, train/kto/trainer.py; train/trainer_utils.py,
# `get_batch_logps`), whose adapters stay as they are.
IN_LLAMA_FACTORY = IN_AXOLOTL._replace(
    balances_experts=False,
    casts_ends=False,
    hooks_adapted=False,
    expandable_segments=False,
    reentrant_under_zero3=False,
    defaults=IN_AXOLOTL.defaults._replace(device_map="cuda"),
    casts=(),
    scoring="softmax",
    keeps_logits=("policy",),
    options=frozenset({"max_completion_length", "beta", "loss_type"}),
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
    losses=("full", "full-no-upcast", "te-parallel", "cut-apart"),
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
# recipes/retrieval/train_bi_encoder.py: models are transformers', or a subclass that lets each token see all others.
AUTOMODEL_BI_ENCODER = AUTOMODEL_RECIPE._replace(
    name="automodel-bi-encoder",
    called="NeMo Automodel's bi-encoder recipe",
    losses=("full",),
    loss_apart=False,
    own_decoders=False,
    passages="apart",
    n_passages=5,  # components/datasets/llm/retrieval_dataset.py:978
    layout=OF_ENCODERS,
    task="FEATURE_EXTRACTION",
    under_fsdp2=("none",),
    options=frozenset({"n_passages"}),
)
# recipes/retrieval/train_cross_encoder.py.
AUTOMODEL_CROSS_ENCODER = AUTOMODEL_BI_ENCODER._replace(
    name="automodel-cross-encoder",
    called="NeMo Automodel's cross-encoder recipe",
    passages="with query",
    holds_outputs=True,
    task="SEQ_CLS",
    num_labels=1,
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

"""The trainers of axolotl 0.19, and of the trl that it pins: what they have in common, and each one's facts."""

from __future__ import annotations

from peftplan.job.trainer import LOSS, Defaults, Forward, Trainer
from peftplan.job.trl_trainers import DPO_LOSSES, GENERATING, OF_LOGITS, OF_PREFERENCES, OF_REWARDS, TRL

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
    casts_ends=True,
    hooks_adapted=True,
    searches_behind_towers=False,
    expandable_segments=True,
    package=None,
    arguments=None,
)
OF_LOGITS_IN_AXOLOTL = OF_LOGITS._replace(
    defaults=OF_LOGITS.defaults._replace(kbit_prepare=False),
    scoring="flat kernel",
    casts_ends=True,
    hooks_adapted=True,
    expandable_segments=True,
    package=None,
    arguments=None,
)
# GRPO of the trl that axolotl pins, of rewards that hold nothing on the card.
GRPO_IN_AXOLOTL = IN_AXOLOTL._replace(
    name="axolotl-grpo",
    called="GRPOTrainer of axolotl",
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
    called="EBFTTrainer of axolotl",
    forwards=LOSS,
    wide_reference=False,
    reads_features=True,
)
# The same package's Trainer of documents (core/trainers/ebft/strided.py), with its defaults: four rollouts of a document, and
# `stride`, `context_length` and `generate_max_len` 8. Each rollout is a forward with a graph of its own.
EBFT_IN_STRIDES = IN_AXOLOTL._replace(
    name="axolotl-ebft-strided",
    called="strided EBFT of axolotl",
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
    name="axolotl-ebft-strided-scored", called="strided EBFT of axolotl with a cross entropy", scores_documents=True
)
# Without an adapter the model has no `lm_head` beside its backbone (strided.py:661), so all rollouts are one forward with all
# logits; a copy of the model in 16 bits reads them. Norms and embeddings: loaders/model.py:434.
EBFT_IN_STRIDES_IN_FULL = EBFT_IN_STRIDES._replace(
    name="axolotl-ebft-strided-full",
    called="strided EBFT of axolotl without adapters",
    rows=len(EBFT_IN_STRIDES.forwards),
    forwards=(*LOSS, Forward("reference")),
    beta=1.0,
    wide_ends=True,
)

OF_AXOLOTL = (
    Trainer(
        "axolotl",
        "Trainer of axolotl",
        Defaults(kbit_prepare=False),
        turns_cache_off=True,
        own_fsdp2=True,
        casts_ends=True,
        hooks_adapted=True,
        wide_ends=True,
        expandable_segments=True,
    ),
    IN_AXOLOTL._replace(
        name="axolotl-dpo",
        called="DPOTrainer of axolotl",
        rows=2,
        forwards=(*LOSS, Forward("reference")),
        loss_types=DPO_LOSSES,
        many_losses=True,
        empties_cache=True,
        beside_copy=True,
    ),
    IN_AXOLOTL._replace(
        name="axolotl-kto",
        called="KTOTrainer of axolotl",
        forwards=(Forward("policy", batch="KL_"), *LOSS, Forward("reference", batch="KL_"), Forward("reference")),
        without_extra_rows=("apo_zero_unpaired",),
        loss_types=("kto", "apo_zero_unpaired"),
        kinds="in the log",
    ),
    OF_REWARDS._replace(
        name="axolotl-reward",
        called="RewardTrainer of axolotl",
        defaults=OF_REWARDS.defaults._replace(kbit_prepare=False),
        casts_ends=True,
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
    OF_LOGITS_IN_AXOLOTL._replace(name="axolotl-orpo", called="ORPOTrainer of axolotl"),
    OF_LOGITS_IN_AXOLOTL._replace(
        name="axolotl-cpo",
        called="CPOTrainer of axolotl",
        options=OF_LOGITS.options | {"loss_type"},
        loss_types=("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
    ),
)

BEFORE_0_21: dict[str, object] = {"recasts_tables": True, "other_heads": ("gpt_neox",)}
"""What was otherwise before `versions.AXOLOTL_KEEPS_TABLES` (0.19.0, loaders/model.py:446 and :486, loaders/utils.py:309)."""
PINS_OF_0_19: dict[str, object] = {"pins_liger": True, "transformers": "5.16", "deepspeed": "0.18.9"}
"""What formulas go by of the libraries that 0.19.0 pins; those of 0.21.0 (transformers of 5.20, Liger 0.8.4, DeepSpeed to 0.20)
do what the newest ones do."""

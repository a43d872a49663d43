"""The trainers of trl: what its Trainers have in common, and each one's facts."""

from __future__ import annotations

from peftplan.job.trainer import LOSS, Defaults, Forward, Trainer
from peftplan.job.trainer_words import Reference
from peftplan.versions import named

# trl `SFTTrainer.__init__` asks for `is_loaded_in_4bit` and `is_loaded_in_8bit` before it casts, projects in chunks
# whatever `loss_type` says, and refuses Liger's fused loss (it keeps Liger's layer kernels). Unsloth replaces its
# `compute_loss` by Trainer's.
TRL = Trainer(
    "trl",
    f"SFTTrainer of {named('trl')}",
    Defaults(loss="trl-chunked", kbit_prepare=False, device_map="auto"),
    balances_experts=True,
    always_masks=True,
    loads_in_fp32=True,
    turns_cache_off=True,
    narrow_under_zero3=True,
    reentrant_under_zero3=True,
    casts=("nf4", "fp4", "int8"),
    losses=("trl-chunked", "unsloth"),
    sums_tokens=True,
    task="CAUSAL_LM",
    search="all",
    searches_behind_towers=True,
    package="trl",
    traced_on_ranks=True,
    arguments="SFTConfig",
)
# The reference model scores what was generated before the step, when nothing of it is alive (`_generate_and_score_completions`).
ANY_REFERENCE: tuple[Reference, ...] = ("none", "adapter_off", "copy")
GENERATING = TRL._replace(
    losses=("trl-chunked",),
    collects_batches=False,
    under_ddp=ANY_REFERENCE,
    under_zero2=("none", "copy"),
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
    disables_dropout=True,
    sums_rows=True,
    token_outputs=("entropy", "mean_logits", "is_top1"),
    options=frozenset({"max_completion_length", "precompute_ref_log_probs", "beta", "loss_type"}),
)

# Trainers of trl whose models keep all logits.
WITH_ALL_LOGITS = TRL._replace(
    defaults=TRL.defaults._replace(loss="full"),
    balances_experts=False,
    searches_behind_towers=False,
    losses=("full",),
    sums_tokens=False,
    disables_dropout=True,
)
# Those that take the model and its adapter as they are.
AS_LOADED = WITH_ALL_LOGITS._replace(loads_in_fp32=False, narrow_under_zero3=False, reentrant_under_zero3=False, casts=())
# Those of them whose policy writes what it learns; a script loads it without a `device_map`.
WRITING = AS_LOADED._replace(
    defaults=AS_LOADED.defaults._replace(device_map="none"), collects_batches=False, writes_under_autocast=True
)
# Pairs without a reference model (`experimental/orpo`, `experimental/cpo`).
OF_LOGITS = AS_LOADED._replace(
    defaults=AS_LOADED.defaults._replace(kbit_prepare=True),
    rows=2,
    scoring="kernel",
    options=frozenset({"beta"}),
)
OF_REWARDS = WITH_ALL_LOGITS._replace(
    name="trl-reward",
    called=f"RewardTrainer of {named('trl')}",
    rows=2,
    task="SEQ_CLS",
    num_labels=1,
    under_ddp=ANY_REFERENCE,
    under_zero2=("none",),
    under_zero3=("none",),
    arguments="RewardConfig",
)
# Forward, loss and what it holds: experimental/gkd/gkd_trainer.py. The script's teacher has the dtype of the student.
DISTILLING = WITH_ALL_LOGITS._replace(
    name="trl-gkd",
    called=f"GKDTrainer of {named('trl')}",
    teaches=True,
    empties_before=True,
    forwards=(*LOSS, Forward("reference")),
    beta=0.5,
    options=frozenset({"max_completion_length", "teacher_model", "beta"}),
    arguments="GKDConfig",
)
# Policy, reference and reward model, all on the card (experimental/nash_md/nash_md_trainer.py, experimental/xpo/xpo_trainer.py).
REWARDED = WRITING._replace(
    sums_rows=True,
    scoring="rows of completions",
    forwards=(*LOSS, Forward("reference")),
    writes_without_cache=True,
    rewards=True,
    under_zero2=("copy",),
    completion=64,
    beta=0.1,
    options=frozenset({"max_completion_length", "reward_model"}),
    traced_on_ranks=False,
)
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero"),
    *("apo_down", "discopop", "sft", "sigmoid_norm"),
)
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
"""The names that trl's `compute_loss` compares with (dpo_trainer.py, grpo_trainer.py)."""

OF_TRL = (
    TRL,
    # Best-fit packing: `batch_size` is that of rows without padding (`DataCollatorForLanguageModeling`).
    TRL._replace(
        name="trl-packed",
        called=f"SFTTrainer of {named('trl')} that packs",
        packs=True,
        always_masks=False,
        traced_on_ranks=False,
        arguments=None,
    ),
    # Chosen and rejected completion of a prompt are rows of one batch (`DataCollatorForPreference`).
    OF_PREFERENCES._replace(
        name="trl-dpo",
        called=f"DPOTrainer of {named('trl')}",
        losses=("trl-chunked", "unsloth"),
        rows=2,
        forwards=(*LOSS, Forward("reference")),
        loss_types=DPO_LOSSES,
        many_losses=True,
        patches_layers=True,
        under_ddp=ANY_REFERENCE,
        under_zero2=ANY_REFERENCE,
        under_zero3=("adapter_off", "copy"),
        arguments="DPOConfig",
    ),
    # Completions of other prompts are scored too, by both models (`_compute_kl_logps`).
    OF_PREFERENCES._replace(
        name="trl-kto",
        called=f"KTOTrainer of {named('trl')}",
        forwards=(Forward("policy", batch="KL_"), *LOSS, Forward("reference", batch="KL_"), Forward("reference")),
        without_extra_rows=("apo_zero_unpaired",),
        loss_types=("kto", "apo_zero_unpaired"),
        under_ddp=ANY_REFERENCE,
        under_zero2=("none", "copy"),
        under_zero3=("adapter_off",),
        arguments="KTOConfig",
    ),
    OF_REWARDS,
    # Unsloth makes its log-probabilities of hidden states (unsloth, models/rl_replacements.py: `_unsloth_pref_chunked_forward`).
    OF_LOGITS._replace(
        name="trl-orpo",
        called=f"ORPOTrainer of {named('trl')}",
        losses=("full", "unsloth"),
        options=OF_LOGITS.options | {"max_completion_length"},
        arguments="ORPOConfig",
    ),
    OF_LOGITS._replace(
        name="trl-cpo",
        called=f"CPOTrainer of {named('trl')}",
        options=OF_LOGITS.options | {"loss_type"},
        loss_types=("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
        arguments="CPOConfig",
    ),
    # Triples of completions, the third of which is learned too (experimental/tpo/tpo_trainer.py).
    OF_LOGITS._replace(
        name="trl-tpo",
        called=f"TPOTrainer of {named('trl')}",
        defaults=WITH_ALL_LOGITS.defaults,
        loads_in_fp32=True,
        narrow_under_zero3=True,
        rows=3,
        options=frozenset({"max_completion_length", "beta", "loss_type"}),
        loss_types=("sigmoid", "hinge", "ipo", "tpo-l"),
        arguments="TPOConfig",
    ),
    DISTILLING,
    # The same divergence, with a teacher of any vocabulary (experimental/gold/gold_trainer.py, `use_uld_loss=False`).
    DISTILLING._replace(name="trl-gold", called=f"GOLDTrainer of {named('trl')}", resizes_teacher=True, arguments="GOLDConfig"),
    # Unsloth's GRPO (unsloth_zoo `grpo_accumulated_loss`) packs the completions of a step into one row.
    GENERATING._replace(
        name="trl-grpo",
        called=f"GRPOTrainer of {named('trl')}",
        losses=("trl-chunked", "unsloth"),
        beta=0.0,
        num_generations=8,
        options=GENERATING.options | {"loss_type", "tool_turns"},
        loss_types=GRPO_LOSSES,
        patches_layers=True,
        under_zero3=("none",),
        arguments="GRPOConfig",
    ),
    GENERATING._replace(
        name="trl-rloo", called=f"RLOOTrainer of {named('trl')}", beta=0.05, num_generations=2, arguments="RLOOConfig"
    ),
    # One completion of each prompt, whose cross entropy is the loss (experimental/ssd/ssd_trainer.py, in trl before 1.11).
    WRITING._replace(
        name="trl-ssd",
        called="SSDTrainer of trl",
        scoring="rows",
        leaves_temperature=True,
        completions_alone=True,
        completion=256,
        num_generations=1,
        options=frozenset({"max_completion_length", "max_prompt_length", "steps_per_generation"}),
        traced_on_ranks=False,
        arguments="SSDConfig",
    ),
    # The student writes what it learns; both heads are read in tiles (trainer/distillation_trainer.py).
    GENERATING._replace(
        name="trl-distillation",
        called=f"DistillationTrainer of {named('trl')}",
        balances_experts=False,
        teaches=True,
        skips_autocast=True,
        writes_under_autocast=True,
        sums_tokens=False,
        forwards=(*LOSS, Forward("reference")),
        under_ddp=(),
        under_zero2=(),
        options=(GENERATING.options - {"beta", "num_generations", "steps_per_generation"}) | {"teacher_model"},
        arguments="DistillationConfig",
    ),
    # Two completions of each prompt, all of which a reward model scores (experimental/online_dpo/online_dpo_trainer.py).
    REWARDED._replace(
        name="trl-online-dpo",
        called=f"OnlineDPOTrainer of {named('trl')}",
        rows=2,
        scoring="completions",
        options=REWARDED.options | {"loss_type"},
        loss_types=("sigmoid", "ipo"),
        under_ddp=ANY_REFERENCE,
        arguments="OnlineDPOConfig",
        traced_on_ranks=WRITING.traced_on_ranks,
    ),
    # Completions of the policy, and those of policy and reference together, of which it learns the first (in trl before 1.16).
    REWARDED._replace(name="trl-nash-md", called="NashMDTrainer of trl", mixes=True, arguments="NashMDConfig"),
    # Completions of the policy and of the reference, each a batch of its own.
    REWARDED._replace(
        name="trl-xpo",
        called="XPOTrainer of trl",
        forwards=(*LOSS, *LOSS, Forward("reference"), Forward("reference")),
        options=REWARDED.options | {"loss_type"},
        loss_types=("sigmoid", "ipo"),
        arguments="XPOConfig",
    ),
    # Completions of all micro batches are written, and scored by three other models, before the step. Its `Accelerator` gets no
    # precision, and transformers 5 leaves `bf16` in its arguments, so that nothing runs under autocast.
    REWARDED._replace(
        name="trl-ppo",
        called="PPOTrainer of trl",
        defaults=REWARDED.defaults._replace(autocast="none", gradient_checkpointing=False, use_cache=None),
        clips_gradients=False,
        turns_cache_off=False,
        writes_under_autocast=False,
        writes_without_cache=False,
        values=True,
        sums_rows=False,
        completion=53,
        arguments=None,
        options=REWARDED.options | {"rollout_batch_size"},
    ),
)

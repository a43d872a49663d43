"""A step of trainers that compare completions: rows, forwards and the reference model, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate, fit
from peftplan.errors import InputError, RefusedError
from peftplan.memory.reference_load import warm_up
from tests.memory.engines import LLAMA

MODEL = {**LLAMA, "vocab_size": 32_000, "num_hidden_layers": 3}
S, C = 256, 100
DPO: dict[str, Any] = {"trainer": "trl-dpo", "batch_size": 2, "seq_len": S}


def peak(**options: Any) -> int:
    peaks = estimate(MODEL, **{**DPO, **options}).peaks
    assert peaks is not None
    return peaks.allocated


def lines(phase: str, **options: Any) -> dict[str, int]:
    peaks = estimate(MODEL, **{**DPO, **options}).peaks
    assert peaks is not None
    by_name: dict[str, int] = {}
    for line in peaks.ledgers[phase]:
        by_name[line.name] = by_name.get(line.name, 0) + line.bytes()
    return by_name


def test_a_pair_is_two_rows() -> None:
    """Two pairs: 4 rows of int64."""
    assert lines("backward", method="lora")["input_ids"] == 8 * 4 * S
    assert lines("backward", method="lora", trainer="trl-kto")["input_ids"] == 8 * 2 * S


def test_labels_of_mismatched_pairs_pass_beside_those_of_the_rows() -> None:
    """KTO's reference reads mismatched pairs first, whose labels are gone when `_compute_kl_logps` returns; `_compute_loss` holds
    those of its rows (trl, kto_trainer.py). The peak has 2 rows of either."""
    assert lines("forward", method="lora", trainer="trl-kto")["masked_fill"] == 8 * (2 + 2) * S


def test_only_completions_are_scored() -> None:
    """Hidden states and labels of 4 x 100 tokens, once for the policy and once for the reference; else of every label."""
    for options, scored in (({"max_completion_length": C}, 4 * C), ({}, 4 * (S - 1))):
        by_name = lines("forward", method="full", **options)
        assert by_name["index"] == 2 * (2 * scored * 256 + -(-8 * scored // 512) * 512)


def test_swift_scores_completions_row_by_row() -> None:
    """Four rows of 101 tokens: their logits in fp32, the gradients of each row, and these in one tensor."""
    by_name = lines("backward", method="lora", trainer="swift-dpo", max_completion_length=C)
    row = 4 * (C + 1) * MODEL["vocab_size"]
    assert [by_name[name] // row for name in ("to", "mul", "stack")] == [4, 4, 4]


@pytest.mark.parametrize(
    ("completion", "why"), [(S - 1, []), (S, ["256 leaves no prompt within seq_len 256"]), (None, ["is not set"])]
)
def test_a_completion_as_long_as_the_row_has_a_note(completion: int | None, why: list[str]) -> None:
    """The first token of a row has no label, so 255 of 256 tokens are scored at most."""
    result = estimate(MODEL, method="lora", **DPO, max_completion_length=completion)
    notes = [note for note in result.assumptions["notes"] if note.startswith("max_completion_length")]
    assert [note.removeprefix("max_completion_length ").partition(":")[0] for note in notes] == why
    assert peak(method="lora", max_completion_length=completion) == peak(method="lora", max_completion_length=S - 1)


def test_a_full_run_holds_a_second_model() -> None:
    with_copy = estimate(MODEL, method="full", **DPO)
    without = estimate(MODEL, method="full", precompute_ref_log_probs=True, **DPO)
    copied = [line for line in with_copy.static if line.name.startswith("reference model: ")]
    weights = sum(line.bytes() for line in without.static if line.category in ("weights", "buffers"))
    assert sum(line.bytes() for line in copied) == weights
    assert with_copy.static.bytes() == without.static.bytes() + weights
    assert (with_copy.assumptions["reference"], without.assumptions["reference"]) == ("copy", "none")
    assert with_copy.trainable_parameters == without.trainable_parameters


def test_an_adapter_is_switched_off_for_the_reference() -> None:
    result = estimate(MODEL, method="lora", **DPO)
    assert result.assumptions["reference"] == "adapter_off"
    assert not [line for line in result.static if line.name.startswith("reference model")]
    assert peak(method="lora") >= peak(method="lora", precompute_ref_log_probs=True)


def test_a_reward_model_scores_a_pair_and_projects_no_vocabulary() -> None:
    result = estimate(MODEL, method="lora", trainer="trl-reward", batch_size=2, seq_len=S)
    assert result.peaks is not None
    assert result.assumptions["model_class"] == "LlamaForSequenceClassification"
    assert next(line.shape for line in result.static if line.name.startswith("score")) == (1, MODEL["hidden_size"])
    assert not [line for line in result.peaks.ledgers["forward"] if MODEL["vocab_size"] in line.shape[1:]]


def test_the_warm_up_leaves_out_what_is_cached() -> None:
    """Qwen2.5-0.5B beside its policy, on the emulated card: 988,065,536 bytes of weights, 43,865,088 cached."""
    assert warm_up(988_065_536, 43_865_088) == 944_200_448
    assert warm_up(1_000, 600) == 0
    assert warm_up(4 * 2**30, int(2.2 * 2**30)) == (int(2.2 * 2**30) + 1) // 2 * 2  # whole elements of fp16


def test_orpo_holds_the_logits_of_both_and_their_gradients() -> None:
    """At the peak of backward the slice of the chosen rows adds its gradient, of all rows, to that of the log-probabilities:
    4 x 256 rows of 32,000 numbers twice in fp32, and the chosen half of them once."""
    for trainer in ("trl-orpo", "trl-cpo"):
        ledger = estimate(MODEL, method="lora", trainer=trainer, batch_size=2, seq_len=S).peaks.ledgers["backward"]
        sizes = sorted(line.bytes() for line in ledger if line.category == "logits")
        assert sizes[-1] + (sizes[-2] if len(sizes) > 2 else 0) >= 2 * 4 * 4 * S * 32_000
        assert sum(sizes) == 4 * 32_000 * (2 * 4 * S + 2 * S)


@pytest.mark.parametrize(("trainer", "drops"), [("trl-dpo", False), ("trl-reward", False), ("trl-orpo", False), ("trl", True)])
def test_trainers_of_preferences_disable_dropout(trainer: str, *, drops: bool) -> None:
    """`disable_dropout` is on by default: adapters then keep no dropped copy of their input."""
    options: dict[str, Any] = {"method": "lora", "trainer": trainer, "gradient_checkpointing": False}
    assert (peak(**options, lora_dropout=0.05) > peak(**options)) is drops


def logits_of(phase: str, **options: Any) -> int:
    peaks = estimate(MODEL, **options).peaks
    assert peaks is not None
    return sum(line.bytes() for line in peaks.ledgers[phase] if line.category == "logits")


def test_dpo_in_axolotl_copies_the_logits_of_both_models() -> None:
    """Two pairs, 4 rows: fp32 logits of 256 positions and a copy of 255, of the policy and then of the reference model."""
    options: dict[str, Any] = {"method": "lora", "trainer": "axolotl-dpo", "batch_size": 2, "seq_len": S}
    assert logits_of("forward", **options) == 2 * 4 * 4 * 32_000 * (S + S - 1)


def test_kto_in_llama_factory_keeps_what_the_policy_gave() -> None:
    """Two rows. The reference model scores completions of other prompts while these are alive: the policy's log-probabilities
    of 255 positions and copies of its logits by kind, the reference's own logits, those of the others, and their slice, which
    `log_softmax` copies, beside its result."""
    options: dict[str, Any] = {"method": "lora", "trainer": "llamafactory-kto", "batch_size": 2, "seq_len": S}
    assert logits_of("forward", **options) == 2 * 4 * 32_000 * (S - 1 + S + S + S + 2 * (S - 1))


def test_simpo_in_llama_factory_has_no_reference_model() -> None:
    options: dict[str, Any] = {"method": "lora", "trainer": "llamafactory-dpo", "batch_size": 2, "seq_len": S}
    assert logits_of("forward", **options, loss_type="simpo") < logits_of("forward", **options)


def test_a_second_model_of_other_tools_has_no_formula_yet() -> None:
    result = estimate(MODEL, method="full", trainer="axolotl-kto", batch_size=2, seq_len=S)
    assert (result.peaks, "a second model under KTOTrainer of axolotl" in result.not_modelled[0]) == (None, True)


GRPO: dict[str, Any] = {"trainer": "trl-grpo", "batch_size": 2, "seq_len": S, "max_completion_length": C}


def test_the_policy_writes_completions_into_a_cache() -> None:
    """3 layers of keys and values, 4 heads of 32 numbers in 16 bits, for 4 x 2 completions of 255 tokens, since the last is not
    fed; and what a token's scores take. The optimizer's states are there meanwhile."""
    long = {**GRPO, "max_completion_length": 250, "method": "lora", "gradient_accumulation_steps": 4}
    result = estimate(MODEL, **long)
    assert result.peaks is not None
    cache = [line for line in result.peaks.ledgers["generate"] if "KV cache" in line.name]
    heads, width = MODEL["num_key_value_heads"], MODEL["hidden_size"] // MODEL["num_attention_heads"]
    assert sum(line.bytes() for line in cache) == 3 * 2 * 2 * (4 * 2) * heads * (S - 1) * width
    states = result.peaks.ledgers["generate"].by_category()["optimizer_states"]
    assert states == result.static.by_category()["optimizer_states"]
    fewer = estimate(MODEL, **long, steps_per_generation=2)
    assert fewer.peaks is not None
    assert sum(line.bytes() for line in fewer.peaks.ledgers["generate"] if "KV cache" in line.name) == sum(
        line.bytes() // 2 for line in cache
    )


def test_where_tools_answer_a_later_turn_begins_at_the_longest_completion() -> None:
    """It takes what a prompt of all tokens would, before as long a completion; what is scored and trained on stays."""
    options = {**GRPO, "method": "lora"}
    once, in_turns, longer = (
        estimate(MODEL, **{**options, **changed}).peaks for changed in ({}, {"tool_turns": True}, {"seq_len": S + C})
    )
    assert once is not None
    assert in_turns is not None
    assert longer is not None
    assert in_turns.by_phase == {**once.by_phase, "generate": longer.by_phase["generate"]}
    assert longer.by_phase["generate"] > once.by_phase["generate"]


def test_a_weight_of_the_reference_makes_a_second_model() -> None:
    by_beta = {beta: estimate(MODEL, method="full", beta=beta, **GRPO).assumptions["reference"] for beta in (None, 0.0, 0.04)}
    assert by_beta == {None: "none", 0.0: "none", 0.04: "copy"}
    assert estimate(MODEL, method="full", **{**GRPO, "trainer": "trl-rloo"}).assumptions["reference"] == "copy"


def test_prompt_and_completion_make_the_sequence() -> None:
    assert estimate(MODEL, **{**GRPO, "seq_len": None}, max_prompt_length=60).assumptions["seq_len"] == 60 + C
    assert estimate(MODEL, trainer="trl-grpo").assumptions["max_completion_length"] == 512


def test_vllm_takes_its_share_of_the_card() -> None:
    def needed(**options: Any) -> int:
        return estimate(MODEL, gpu="a100-80gb", **GRPO, **options).gpus[0].needed_bytes

    usable = estimate(MODEL, gpu="a100-80gb", **GRPO).gpus[0].usable_bytes
    trainer = needed(use_vllm=True, vllm_mode="server")
    assert needed(use_vllm=True) == trainer + int(0.3 * usable)
    assert needed(use_vllm=True, vllm_gpu_memory_utilization=0.5) == trainer + int(0.5 * usable)
    assert trainer < needed(use_vllm=True, vllm_enable_sleep_mode=True) < needed(use_vllm=True)
    result = estimate(MODEL, gpu="a100-80gb", use_vllm=True, **GRPO)
    assert result.gpus[0].to_dict()["vllm_bytes"] == int(0.3 * usable)
    assert result.peaks is not None
    assert "generate" not in result.peaks.by_phase


SENT = 152_064 * 3_584 * 2
"""Bytes of the embedding of Qwen2.5 7B, the largest flat copy that a server gets: more than 512 MiB."""
TAIL = -SENT % 2**21
"""What is left of its block, whose size is a multiple of 2 MiB: too little for torch to split off."""


def test_swift_gathers_all_weights_before_vllm_writes() -> None:
    """`_move_full_model_to_vllm`: 7,615,616,512 weights in bf16 on each rank, and a server's flat copies on the first one."""
    job = {"model": "qwen2.5-7b", "trainer": "swift-grpo", "method": "full", "dtype": "bf16", "use_reentrant": True}
    job |= {"gpus": 4, "strategy": "zero3", "gpu": "h200", "batch_size": 2, "seq_len": 640, "use_vllm": True}
    asleep_while_training = {"vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": 0.15}
    of_server, asleep = (estimate(**job, **mode) for mode in ({"vllm_mode": "server"}, asleep_while_training))
    assert of_server.peaks is not None
    assert asleep.peaks is not None
    tails = of_server.peaks.by_phase["generate"] - asleep.peaks.by_phase["generate"] - SENT
    assert tails == TAIL + 2**17  # the cache of one whose vLLM sleeps is emptied first: blocks of its weights have no such tail
    gathered = (line for line in asleep.peaks.ledgers["generate"] if line.name.endswith(" gathered"))
    assert sum(line.bytes() for line in gathered) == 2 * 7_615_616_512
    # beside them vLLM holds weights of its own, or its share where that is more
    card = asleep.gpus[0]
    assert card.vllm_bytes == 2 * 7_615_616_512
    assert card.needed_bytes == asleep.peaks.by_phase["generate"] + card.vllm_bytes + card.context_bytes


def test_options_of_vllm_without_it_are_one_warning() -> None:
    unread = {"vllm_mode": "server", "vllm_gpu_memory_utilization": 0.5}
    (warning,) = estimate(MODEL, gpus=4, **GRPO, **unread).warnings
    assert warning == "vllm_mode, vllm_gpu_memory_utilization: without effect, since vLLM does not generate; add --use-vllm"
    assert not estimate(MODEL, gpus=4, **GRPO, **unread, use_vllm=True).warnings


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        (
            {"trainer": "trl", "beta": 0.1},
            InputError,
            "SFTTrainer of trl 1.16 has no such option; accepted: with --trainer trl-dpo",
        ),
        ({"trainer": "trl-reward", "max_completion_length": 9}, InputError, "RewardTrainer of trl 1.16 has no such option"),
        ({"engine": "trace"}, RefusedError, "engine: trace follows a step of one forward, not that of DPOTrainer of trl 1.16"),
        ({"loss": "liger"}, RefusedError, "loss: DPOTrainer of trl 1.16 cannot compute the liger loss; accepted: trl-chunked"),
        ({**GRPO, "max_completion_length": 300}, InputError, "accepted: below the 256 tokens of prompt and completion"),
        ({**GRPO, "max_prompt_length": 9}, InputError, "seq_len is prompt and completion; give one of the two"),
        (
            {"use_vllm": True},
            InputError,
            "DPOTrainer of trl 1.16 has no such option; accepted: with --trainer trl-grpo, trl-rloo",
        ),
        ({"beta": float("inf")}, InputError, "beta must be a finite number"),
        ({"loss_type": "nonsense"}, InputError, "loss_type: 'nonsense' is not valid; accepted: aot"),
        ({"loss_type": "sigmoid,nonsense"}, InputError, "loss_type: 'nonsense' is not valid"),
        ({"trainer": "trl-orpo", "loss_type": "sigmoid"}, InputError, "loss_type: ORPOTrainer of trl 1.16 has no such option"),
        ({**GRPO, "num_generations": 1}, InputError, "num_generations must be at least 2 (got 1)"),
        ({"trainer": "trl-reward", "task_type": "CAUSAL_LM"}, RefusedError, "trains classes that score a sequence, not Llama"),
    ],
)
def test_what_a_trainer_has_not_is_refused(options: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error) as refused:
        estimate(MODEL, **{**DPO, **options})
    assert reason in str(refused.value)


def test_a_quantized_base_of_orpo_has_no_formula_yet() -> None:
    result = estimate("llama-3.2-1b", trainer="trl-orpo", method="qlora")
    assert (result.peaks, "a quantized base under ORPOTrainer" in result.not_modelled[0]) == (None, True)


def test_several_gpus_have_no_formula_yet() -> None:
    result = estimate("llama-3.2-1b", trainer="trl-dpo", gpus=2, strategy="fsdp2")
    assert result.peaks is None
    assert "a step with FSDP2 over 2 GPUs and DPOTrainer of trl 1.16" in result.not_modelled[0]


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
@pytest.mark.parametrize("trainer", ["trl-dpo", "trl-reward", "trl-rloo", "trl-kto"])
def test_full_fine_tuning_under_ddp_and_zero2(trainer: str, strategy: str) -> None:
    """Beside a second model, loaded on the host and moved: rehearsed."""
    options: dict[str, Any] = {"trainer": trainer, "seq_len": S, "batch_size": 2}
    options |= {"num_generations": 2} if trainer == "trl-rloo" else {}
    result = estimate(MODEL, method="full", gpus=4, strategy=strategy, **options)
    assert result.peaks is not None


def test_all_weights_are_whole_while_a_policy_writes_under_zero3() -> None:
    """`unwrap_model_for_generation` gathers them (trl, models/utils.py): beside the shards 2 bytes of each parameter at least.
    With QLoRA, with vLLM or beside a reference it was not rehearsed. TRL turns checkpoints of an adapter on again as reentrant
    ones, which it asks for under ZeRO-3; rehearsed without them, backward would be 3 % lower (tests/rehearse)."""
    job: dict[str, Any] = {"trainer": "trl-grpo", "seq_len": S, "batch_size": 8, "gpus": 4, "strategy": "zero3"}
    result = estimate(MODEL, method="full", **job)
    assert result.peaks is not None
    assert result.peaks.by_phase["generate"] > result.static.bytes() + 2 * result.total_parameters
    adapter = estimate(MODEL, method="lora", **job)
    assert (adapter.peaks is not None, adapter.assumptions["use_reentrant"]) == (True, True)
    for others in ({"method": "qlora"}, {"method": "full", "use_vllm": True}, {"method": "full", "beta": 0.1}):
        assert estimate(MODEL, **job, **others).peaks is None


KTO: dict[str, Any] = {"trainer": "trl-kto", "seq_len": S}


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({**KTO, "batch_size": 1}, "KTOTrainer of trl 1.16 refuses a batch of one; use --batch-size 2"),
        ({**KTO, "batch_size": 2}, None),
        ({**KTO, "batch_size": 1, "loss_type": "apo_zero_unpaired"}, None),
        ({**GRPO, "batch_size": 3, "gradient_accumulation_steps": 1}, "which is not a multiple of num_generations 8"),
        ({**GRPO, "batch_size": 3, "gradient_accumulation_steps": 1, "num_generations": 3}, None),
        ({**GRPO, "batch_size": 1, "gradient_accumulation_steps": 8}, None),
        ({**GRPO, "batch_size": 2, "gradient_accumulation_steps": 1, "gpus": 4}, None),
        ({**GRPO, "batch_size": 2, "gradient_accumulation_steps": 1, "gpus": 3}, "use --batch-size 8"),
        ({**GRPO, "trainer": "trl-rloo", "batch_size": 1, "gradient_accumulation_steps": 1}, "generates 1 completion at once"),
    ],
)
def test_a_batch_that_trl_refuses_does_not_run(options: dict[str, Any], refused: str | None) -> None:
    """kto_trainer.py: batch size must be > 1; grpo_config.py: generation_batch_size must be divisible by num_generations."""
    (verdict,) = estimate("llama-3.2-1b", gpu="h100", **options).gpus
    assert (verdict.verdict == "does_not_run") == (refused is not None)
    assert refused is None or refused in (verdict.reason or "")
    warnings = estimate("llama-3.2-1b", **options).warnings
    assert [f"batch_size: {verdict.reason}"] == list(warnings) if refused else not warnings


def test_the_largest_batch_is_one_that_trl_accepts() -> None:
    grpo = fit("llama-3.2-1b", gpu="l4", trainer="trl-grpo", methods=["lora"])
    assert grpo.plans[0].size > 0
    assert grpo.plans[0].size % 8 == 0
    assert grpo.plans[0].next_larger == f"Batch size {grpo.plans[0].size + 8}"
    kto = fit("llama-3.2-1b", gpu="l4", trainer="trl-kto", methods=["lora"])
    assert (kto.plans[0].size > 2, kto.plans[0].verdict) == (True, "fits")
    assert all("trainer" not in plan.changes for plan in (*grpo.plans, *kto.plans)), "another trainer trains another objective"


def test_a_trainer_whose_task_a_model_has_not_is_named() -> None:
    with pytest.raises(
        RefusedError, match=r"^trainer: RewardTrainer of trl 1.16 trains classes that score a sequence, and this model has none"
    ):
        estimate("vit-base-patch16-224", trainer="trl-reward")


def test_torchtune_takes_no_kernels_and_one_gpu() -> None:
    with pytest.raises(RefusedError, match=r"^kernels: torchtune's recipe runs modules of its own"):
        estimate("llama-3.2-1b", trainer="torchtune", kernels="liger")
    assert estimate("llama-3.2-1b", trainer="torchtune", gpus=2).peaks is None


@pytest.mark.parametrize(
    ("options", "batch_size"),
    [
        ({"trainer": "trl-kto"}, 2),
        ({"trainer": "trl-kto", "loss_type": "apo_zero_unpaired"}, 1),
        ({"trainer": "trl-rloo"}, 2),
        ({"trainer": "trl-grpo"}, 8),
        ({"trainer": "trl-grpo", "num_generations": 6}, 6),
        ({"trainer": "trl-grpo", "gradient_accumulation_steps": 4}, 2),
        ({"trainer": "trl-grpo", "gpus": 4}, 2),
        ({"trainer": "trl-dpo"}, 1),
    ],
)
def test_a_batch_size_that_nobody_set_is_one_that_trl_accepts(options: dict[str, Any], batch_size: int) -> None:
    result = estimate("llama-3.2-1b", gpu="h100", **options)
    assert result.assumptions["batch_size"] == batch_size
    assert result.gpus[0].verdict != "does_not_run"
    assert not result.warnings

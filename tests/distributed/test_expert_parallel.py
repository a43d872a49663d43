"""Experts that ranks divide beside FSDP2: what a rank holds, and what is refused."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError, PeftplanError, RefusedError
from peftplan.memory.models.automodel_exchange import received
from tools.rehearsed_automodel import options

JOB: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "nodes": 8, "ep_size": 32}
H, WIDTH, E, LAYERS = 4096, 1408, 128, 45
"""Of GLM-4.5-Air: hidden size, width and number of experts, layers that have experts."""


@pytest.mark.parametrize(("nodes", "ep_size"), [(8, 32), (8, 64), (4, 32), (1, 4)])
def test_ranks_share_the_experts_evenly(nodes: int, ep_size: int) -> None:
    """64 ranks of which 32 own 4 experts each: two share these by columns. A weight, its gradient and two moments
    in 16 bits."""
    static = peftplan.estimate("glm-4.5-air", **JOB | {"nodes": nodes, "ep_size": ep_size}, batch_size=1, seq_len=2048).static
    experts = sum(x.bytes() for x in static if ".mlp.experts." in x.name and not x.name.endswith(".step"))
    assert experts == 4 * 2 * LAYERS * E * 3 * H * WIDTH // (8 * nodes)


def test_what_others_own_is_gathered_of_the_same_experts_alone() -> None:
    """Two ranks hold each half of 4 experts, and gather 4 x 3 x 4,096 x 1,408 weights of a layer, which stay until backward."""
    peaks = peftplan.estimate("glm-4.5-air", **JOB, batch_size=1, seq_len=2048).peaks
    assert peaks is not None
    lines = peaks.ledgers["forward"].lines
    gathered = sum(x.bytes() for x in lines if x.category == "gathered_weights" and ".mlp.experts." in x.name)
    assert gathered == 2 * LAYERS * E // 32 * 3 * H * WIDTH


def test_a_rank_gets_a_row_for_each_expert_of_its_own_tokens() -> None:
    """Balanced: 2,048 tokens x 8 experts, in 16 bits; the exchange keeps 4 + 1 + 4 bytes a token for each of 32 ranks, of the
    last two 4 experts."""
    peaks = peftplan.estimate("glm-4.5-air", **JOB, batch_size=1, seq_len=2048).peaks
    assert peaks is not None
    lines = peaks.ledgers["forward"].lines
    kept = {x.name.rpartition("experts ")[2]: x.bytes() for x in lines if ".mlp.experts " in x.name}
    assert kept["dispatch"] == LAYERS * 2 * 2048 * 8 * H
    assert kept["swiglu"] == LAYERS * 2 * 2048 * 8 * WIDTH
    assert kept["sparse to dense"] == LAYERS * 4 * 2048 * 32
    assert kept["routing of own experts"] == LAYERS * 2048 * 32 * 4
    assert kept["dense to expert"] == LAYERS * 4 * 2048 * 32 * 4


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("glm-4.5-air", {"trainer": "transformers"}, InputError, "divides no experts beside FSDP2"),
        ("llama-3.1-8b", {}, RefusedError, "Expert parallelism requires a MoE model"),
        ("glm-4.5", {"ep_size": 64}, InputError, "a divisor of the model's 160 experts"),
        ("glm-4.5-air", {"pp_size": 4}, InputError, "a divisor of the 16 GPUs that share the weights"),
    ],
)
def test_what_is_refused(model: str, options: dict[str, Any], error: type[PeftplanError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        peftplan.estimate(model, **JOB | options, seq_len=2048)


@pytest.mark.parametrize(
    "options",
    [
        {"seq_len": 1024},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"method": "lora", "r": 8, "target_modules": "every-linear"},
        {"dtype": "fp32"},
        {"ep_size": None},
    ],
)
def test_what_was_not_rehearsed_has_no_peak(options: dict[str, Any]) -> None:
    """1,024 x 8 rows of experts are multiplied by their weights at once, 2,048 x 8 by chunks."""
    result = peftplan.estimate("glm-4.5-air", **JOB | {"batch_size": 1, "seq_len": 2048} | options)
    assert result.peaks is None


ROWS = (Path(__file__).parents[1] / "rehearse" / "worst_routing.jsonl").read_text(encoding="utf-8").splitlines()
WORST: list[dict[str, Any]] = list(map(json.loads, ROWS))


@pytest.mark.parametrize("row", WORST, ids=[f"{row['model']} {row['layers']}" for row in WORST])
def test_a_rank_that_gets_every_token_holds_what_the_recipe_holds(row: dict[str, Any]) -> None:
    """NeMo Automodel's recipe, whose exchange sends every token of all ranks to the rank that is played."""
    peaks = peftplan.estimate(**options(row), routing="worst", gpu=row["card"].rpartition("x")[2]).peaks
    assert peaks is not None
    near = {phase: 4e-3 if phase == "step" else 1e-3 for phase in row["by_phase"]}
    assert peaks.by_phase == {phase: pytest.approx(kept, rel=near[phase]) for phase, kept in row["by_phase"].items()}
    assert peaks.allocated == pytest.approx(row["allocated"], rel=3e-4)
    assert peaks.unreserved is not None


def test_the_worst_routing_stands_beside_that_in_balance() -> None:
    """Of 2,048 tokens, 16,384 rows in balance and 262,144 where 32 ranks send all to the 4 experts of one."""
    job: dict[str, Any] = {"batch_size": 1, "seq_len": 2048}
    balanced, worst = (peftplan.estimate("glm-4.5-air", **JOB, **job, routing=routing) for routing in (None, "worst"))
    assert balanced.distributed is not None
    assert worst.peaks is not None
    beside = balanced.distributed.to_dict()["worst_routing"]
    assert isinstance(beside, dict)
    assert beside["peak_allocated"] == worst.peaks.allocated
    assert "where all tokens go to one rank" in balanced.distributed.words
    (warning,) = (each for each in worst.warnings if "experts are counted" in each)
    assert warning == "routing: experts are counted on the rank to which all others send every token, 262,144 rows a layer"
    lines = worst.peaks.ledgers["forward"].lines
    (swiglu,) = (x.bytes() for x in lines if x.name.endswith(".mlp.experts swiglu"))
    assert swiglu == LAYERS * 2 * 262_144 * WIDTH
    with pytest.raises(InputError, match="with an ep_size of 2 or more"):
        peftplan.estimate("glm-4.5-air", **JOB | {"ep_size": None}, **job, routing="worst")


def test_equal_shares_of_the_tokens_are_a_warning() -> None:
    """Of 128 experts a rank owns 4 and a token chooses 8: 2,048 x 8 rows in balance, at worst 32 x 2,048 x 4, as 4 of a token's
    choices at most are of one rank."""
    warned = [peftplan.estimate("glm-4.5-air", **JOB | {"ep_size": size}, seq_len=2048).warnings for size in (None, 32)]
    assert [any("equal shares of the tokens" in warning for warning in each) for each in warned] == [False, True]
    (of_experts,) = (warning for warning in warned[1] if "equal shares" in warning)
    assert "16,384 rows a layer on each rank" in of_experts
    assert "262,144 rows where all send one rank every token" in of_experts


QWEN: dict[str, Any] = {
    **JOB | {"nodes": 1, "ep_size": 8},
    "batch_size": 4,
    "seq_len": 1024,
    "gradient_checkpointing": True,
    "kernels": "uccl,te-linear",
}
FLASH: dict[str, Any] = {"gradient_checkpointing": False, "kernels": "te,deepep,te-linear", "optim": "adam_one_by_one"}


@pytest.mark.parametrize(("ranks", "experts", "k"), [(2, 4, 1), (2, 4, 2), (4, 8, 3), (3, 6, 6)])
def test_a_rank_gets_a_token_once(ranks: int, experts: int, k: int) -> None:
    """Of all choices of k experts, as many ranks own at least one as a rank gets tokens for each of its own."""
    choices = [*combinations(range(experts), k)]
    reached = sum(len({expert * ranks // experts for expert in choice}) for choice in choices)
    tokens = received(ranks, experts, k).at({"b": 3, "s": len(choices)})
    assert 0 <= tokens - 3 * reached <= 1  # of 2**20 for each token, one more


def test_checkpoints_keep_what_routing_chose() -> None:
    """Of each of 48 layers, besides its input: logits of 128 experts in 16 bits, and top-k's 8 weights and indices of 4,096
    tokens; where they went (8 ranks), and where 21,870 came from: 8 choices of 128 experts reach 5.33937 of 8 ranks."""
    peaks = peftplan.estimate("qwen3-30b-a3b", **QWEN, gpu="h100-80gb").peaks
    assert peaks is not None
    lines = peaks.ledgers["forward"].lines
    kept = {x.name.partition(".mlp.")[2]: x.bytes() for x in lines if ".mlp." in x.name and x.copies == 48}
    tokens = 4096
    assert kept["gate linear"] == 48 * 2 * tokens * 128
    assert (kept["gate topk"], kept["gate topk indices"]) == (48 * 4 * tokens * 8, 48 * 8 * tokens * 8)
    assert (kept["experts is token in rank"], kept["experts send head"]) == (48 * tokens * 8, 48 * 4 * tokens * 8)
    assert kept["experts source"] == 48 * -(-4 * 21870 // 512) * 512


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("qwen3-30b-a3b", {"gradient_checkpointing": False}),
        ("qwen3-30b-a3b", {"kernels": None}),
        ("qwen3-30b-a3b", {"kernels": "te,deepep,te-linear,te-experts"}),
        ("glm-4.7-flash", FLASH | {"gradient_accumulation_steps": 2}),
        ("glm-4.7-flash", FLASH | {"optim": "adamw_torch"}),
        ("glm-4.7-flash", FLASH | {"seq_len": 768}),
        ("moonlight-16b-a3b", FLASH | {"kernels": "deepep,te-linear"}),
        ("moonlight-16b-a3b", FLASH | {"gradient_accumulation_steps": 2, "optim": "adamw_torch"}),
        ("glm-4.7-flash", {"kernels": "deepep,te-linear", "gradient_checkpointing": False}),
        ("moonlight-16b-a3b", FLASH | {"kernels": "deepep,te-linear,te-experts", "gradient_checkpointing": True}),
        ("glm-4.7-flash", FLASH | {"gradient_checkpointing": True}),
    ],
)
def test_what_of_other_exchanges_was_not_rehearsed_has_no_peak(model: str, options: dict[str, Any]) -> None:
    """4 experts for each of 4 x 768 tokens are 12,288 rows, which their weights multiply at once."""
    assert peftplan.estimate(model, **QWEN | options).peaks is None


def test_rows_of_experts_are_weighted_by_chunks() -> None:
    """Of GLM-4.7-Flash, behind the experts: 4 x 1,024 x 4 rows."""
    assert peftplan.estimate("glm-4.7-flash", **QWEN | FLASH).peaks is not None


NEMOTRON: dict[str, Any] = {
    **JOB | {"method": "lora", "r": 8, "target_modules": "every-linear", "nodes": 1, "ep_size": 8},
    "exclude_modules": r"(?:.*\.)?.*\.out_proj",
    "batch_size": 1,
    "seq_len": 2048,
    "kernels": "mamba-ssm,deepep,te-linear",
}


def test_experts_without_gate_keep_what_their_activation_reads() -> None:
    """Nemotron 3 Nano: 23 layers have 128 experts of width 1,856, 6 for each of 2,048 tokens. LoRA leaves experts as they are, so
    that only the first product's result is kept, which `relu2_deepep` reads; an adapter reads Mamba's 10,304 numbers a token."""
    peaks = peftplan.estimate("nvidia-nemotron-3-nano-30b-a3b-bf16", **NEMOTRON, gpu="h100-80gb").peaks
    assert peaks is not None
    lines = peaks.ledgers["forward"].lines
    kept = {x.name.partition(".mixer.")[2]: x.bytes() for x in lines if ".mixer." in x.name and x.copies == 23}
    assert kept["experts grouped_mm"] == 23 * 2 * 2048 * 6 * 1856
    assert "experts permute" not in kept
    assert kept["in_proj lora"] == 23 * 2 * 2048 * 10_304


@pytest.mark.parametrize(
    "options",
    [
        {"kernels": "mamba-ssm"},
        {"kernels": "mamba-ssm,uccl,te-linear"},
        {"gradient_checkpointing": True},
        {"dtype": "fp32"},
        {"optim": "adam_one_by_one"},
    ],
)
def test_what_of_nemotron_was_not_rehearsed_has_no_peak(options: dict[str, Any]) -> None:
    assert peftplan.estimate("nvidia-nemotron-3-nano-30b-a3b-bf16", **NEMOTRON | options).peaks is None


OSS: dict[str, Any] = {**JOB | {"nodes": 1, "ep_size": 8}, "kernels": "deepep,te-linear", "optim": "adam", "seq_len": 2048}


def test_experts_of_gpt_oss_in_4_bits_are_widened_on_each_rank() -> None:
    """Of 24 layers a rank has 4 experts with 2,880 x (5,760 + 2,880) numbers. All come in 17 bytes for each 32; in 16 bits
    those of all layers stay, the last beside 8 bytes for the place of each number of down_proj, a scale of 4 for each 32, and the
    numbers in 16 bits before they are transposed."""
    peaks = peftplan.estimate("gpt-oss-20b", **OSS, batch_size=1).peaks
    assert peaks is not None
    numbers, down = 24 * 4 * 2880 * 8640, 4 * 2880 * 2880
    kept = sum(line.bytes() for line in peaks.ledgers["load"].lines if line.category == "weights")
    assert peaks.by_phase["load"] - kept > 2 * numbers
    assert peaks.by_phase["load"] - kept < 2 * numbers + 17 * down // 32 + 2 * (8 + 2 + 1) * 2 * down


def test_ranks_gather_the_tokens_of_all_without_an_exchange() -> None:
    """Of each of 24 layers stays what 4 experts a token read, of 8 x 2,048 tokens: 2,880 numbers in 16 bits."""
    peaks = peftplan.estimate("gpt-oss-20b", **OSS | {"kernels": None, "optim": "adamw_torch"}, batch_size=8).peaks
    assert peaks is not None
    assert peaks.reserved is not None
    kept = [
        x.bytes() for x in peaks.ledgers["forward"].lines if x.name == "model.layers.{}.mlp.experts index" and x.dtype == "bf16"
    ]
    assert sum(kept) == 24 * 2 * 8 * 2048 * 4 * 2880


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"batch_size": 1}, True),
        ({"batch_size": 2}, False),
        ({"batch_size": 8}, True),
        ({"batch_size": 8, "kernels": "hybridep,te-linear"}, True),
        ({"batch_size": 1, "kernels": "hybridep,te-linear"}, False),
        ({"batch_size": 32, "kernels": None, "optim": "adamw_torch"}, True),
        ({"batch_size": 32, "kernels": None, "optim": "adamw_torch", "gpus": 16}, False),
        ({"batch_size": 1, "kernels": None, "optim": "adamw_torch"}, False),
        ({"batch_size": 1, "gradient_checkpointing": True}, False),
        ({"batch_size": 1, "gradient_accumulation_steps": 2}, False),
        ({"batch_size": 1, "method": "lora", "r": 8, "target_modules": r".*_proj"}, False),
        ({"batch_size": 1, "optim": "adam_one_by_one"}, False),
    ],
)
def test_what_of_gpt_oss_over_deepep_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    """2 x 2,048 x 4 rows of experts get their biases by chunks; 8 x 2,048 x 4 make 755 MB of gate and up, and run chunk by chunk.
    Without an exchange of tokens 16 GPUs of which 8 own the experts once were not rehearsed."""
    assert (peftplan.estimate("gpt-oss-20b", **OSS | options).peaks is not None) is known

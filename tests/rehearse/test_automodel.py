"""Formulas against NeMo Automodel's own recipe, rehearsed as rank 0 of 8 (`tools.rehearsed_automodel`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError, RefusedError
from peftplan.job.automodel import REHEARSED_QUANTIZED
from peftplan.job.beside_towers import WITH_TOWERS
from peftplan.job.exchanges import alike
from peftplan.memory.models.automodel_exchange import received
from peftplan.memory.te_attention import PLANNED
from tools.rank_grid import cut
from tools.rank_jobs import on_rehearsed_rank
from tools.rehearsed_automodel import options

ROWS = [json.loads(line) for line in Path(__file__).with_name("automodel.jsonl").read_text(encoding="utf-8").splitlines()]
LARGEST = {"allocated": 0.01, "reserved": 0.1}
TIMED = 2**28
"""Bytes that Triton's autotuner writes before it times a kernel, in the first step (triton, backends/nvidia/driver.py
`get_empty_cache_for_benchmark`)."""
SEGMENTS = 2**25
"""How much more the blocks that it leaves behind may come to."""
TAIL = {"qwen1.5-moe-a2.7b every-linear": 0.02}
"""Per cent of allocated bytes: 1.0 MB, which the allocator may leave of a block without splitting it (c10,
CUDACachingAllocator.cpp, `should_split`)."""
WIDER = {"shared_expert_intermediate_size": 520}
"""A shared expert whose projections have another shape than the router."""
IN_8_BITS = {"allocated": 0.02, "reserved": 0.8}
"""Per cent, of layers in 8 bits: at most 1.4 MB that the allocator leaves unsplit, and segments, since the first step, which has
no scales of a step before, leaves other blocks behind."""
LARGEST_OF_PHASE = 0.16
"""Per cent: of `step` of GLM-4.7-Flash with LoRA 0.152, 4 MB."""
SHARED_SEGMENTS = {"t5-large": 0.16}
"""Per cent of reserved bytes: 8 and 12 MiB. Shards of 512 KiB share segments of 2 MiB with those of norms, by which Adam's
temporaries, one parameter after the other, leave gaps; here those of each family lie side by side."""
LOOSE = {
    ("llama-3.3-70b", 2, 1): 0.056,
    ("qwen2.5-7b", 3, 2): 0.014,
    ("qwen2.5-7b", 3, 1): 0.014,
    ("qwen2.5-7b", 2, 1): 0.028,  # 3.2 MB and, of Llama, 6.6 MB of the last micro batch's backward
    ("llama-3.1-8b", 3, 1): 0.057,
    ("qwen2.5-1.5b", 9, 2): 0.3,
    ("ministral-3-3b-instruct-2512", 2, 1): 0.25,
    ("qwen2.5-vl-3b-instruct", 3, 1): 1.2,
    ("gemma-3-4b-it", 7, 1): 0.14,
    ("gpt-oss-20b", 24, 16): 0.6,
    ("gpt-oss-20b", 24, 8): 0.6,
    ("llama-3.1-8b", 3, 2): 0.11,
    ("glm-4.5-air", 5, 4): 0.11,
    ("glm-4.5-air", 4, 4): 0.13,
    ("glm-4.5", 5, 2): 0.3,
    ("nvidia-nemotron-nano-9b-v2", "M-*M-M-M*-M-", 4): 0.4,
    ("qwen3-30b-a3b", 4, 2): 2.25,
    ("qwen3-30b-a3b", 4, 4): 1.9,
    ("nvidia-nemotron-3-nano-30b-a3b-bf16", "MEM*E", 1): 0.31,
    ("nvidia-nemotron-3-nano-30b-a3b-bf16", "MEM*EM", 1): 0.06,
    ("nvidia-nemotron-3-nano-30b-a3b-bf16", "MEM*EME", 1): 0.04,
    ("nvidia-nemotron-3.5-lightning-30b-a3b-bf16", "MEM*EM", 1): 0.02,
    ("nvidia-nemotron-3.5-lightning-30b-a3b-bf16", "M*EME", 1): 0.31,
    ("nvidia-nemotron-3-super-120b-a12b-bf16", "MEM*EM", 1): 0.02,
    ("nvidia-nemotron-3-super-120b-a12b-bf16", "MEM*EM", 2): 0.5,
    ("nvidia-nemotron-3-nano-30b-a3b-bf16", "MEM*EMEM", 1): 0.2,
    ("nvidia-nemotron-3-nano-30b-a3b-bf16", "MEMEM*EM", 2): 0.03,
    ("qwen3-30b-a3b", 6, 2): 0.05,
    ("moonlight-16b-a3b", 3, 4): 0.37,
    ("qwen2.5-0.5b", 3, 1): 0.67,
    ("qwen2.5-0.5b", 5, 2): 0.61,
    ("gpt-oss-20b", 2, 1): 0.4,
    ("gpt-oss-20b", 3, 2): 0.22,
    ("gpt-oss-20b", 8, 2): 1.1,
    ("falcon-h1-0.5b-base", 2, 2): 0.29,
    ("falcon-h1-0.5b-base", 4, 2): 0.51,
    ("falcon-h1-34b-base", 3, 2): 0.25,
    ("falcon-h1-7b-base", 2, 2): 0.08,
    ("falcon-h1-1.5b-base", 3, 1): 0.19,
    ("falcon-h1-1.5b-base", 4, 3): 0.55,
    ("ernie-4.5-21b-a3b-pt", 4, 1): 0.02,
    ("gpt-oss-20b", 2, 8): 0.21,
    ("gpt-oss-20b", 2, 2): 0.04,
    ("gpt-oss-20b", 4, 1): 2.4,
    ("gpt-oss-20b", 4, 4): 0.03,
    ("glm-4.7-flash", 4, 8): 1.3,
    ("moonlight-16b-a3b", 4, 8): 0.16,
    ("qwen3-30b-a3b", 8, 4): 0.8,
    ("qwen3-30b-a3b", 3, 4): 0.09,
    ("glm-4.7-flash", 6, 4): 0.03,
    ("glm-4.7-flash", 3, 8): 0.03,
    ("nvidia-nemotron-nano-9b-v2", "M-*M-M*-M", 4): 0.04,
    ("minimax-m2.5", 3, 4): 0.3,
    ("moonlight-16b-a3b", 3, 2): 0.36,
    ("gemma-4-e2b-it", 10, 1): 0.08,
    ("gemma-4-12b-it", 6, 1): 0.03,
    ("gemma-4-e4b-it", 14, 1): 0.06,
    ("gemma-4-26b-a4b", 3, 1): 0.38,
    ("gemma-4-31b-it", 6, 1): 0.46,
    ("qwen3-vl-30b-a3b-instruct", 3, 1): 0.08,
    ("qwen3-vl-30b-a3b-instruct", 4, 2): 0.11,
    ("qwen3-vl-4b-instruct", 3, 1): 0.54,
    ("qwen3-vl-8b-instruct", 3, 1): 0.18,
    ("qwen3-4b", 4, 4): 0.23,
    ("llama-3.1-8b", 4, 2): 0.61,
    ("llama-2-7b", 6, 1): 0.12,
    ("llama-2-7b", 4, 1): 0.12,
    ("qwen2.5-32b", 3, 2): 0.03,
    ("qwen2.5-32b", 6, 2): 0.03,
    ("llama-3.3-70b", 3, 2): 0.04,
}
"""Model, layers and rows → per cent of all. dion makes the states layer by layer, of shards that leave 0.7 MB of blocks unsplit
and 16 MiB of segments; here they lie family by family. One row of Ministral 3 leaves 1.0 MB and 6 MiB less. Qwen2.5-VL: 0.11 of
allocated bytes, 0.5 of `load`, 1.16 of reserved ones.

gpt-oss, 16 rows: of reserved ones, among which are two blocks of 34 GB of the first step's masks; allocated ones are within
0.0001. 8 rows: of allocated ones, three times the queries, keys and values of a layer, which torch's compiler left to Python's
garbage collector; it came earlier with 16 rows. Over DeepEP: of reserved ones 0.4, over two nodes 0.21. With LoRA beside
Transformer Engine's layers: of reserved ones 0.12, over packed rows 2.4, of allocated ones 0.02. Without an exchange: of
allocated ones 5.3 MB beside `LEFT`; reserved ones -1.08 with eight layers in full, and else not stated.

Over packed rows with its experts and norms: of allocated ones 0.05, of reserved ones -0.02 and 0.21. With its norms, and
flashoptim's optimizer: of allocated ones 3.5 MB (0.01).

Qwen2.5 0.5B with torch's norms: of `load` and `step` 0.5 MB, which the allocator leaves of the embedding's segment behind a
matrix; of allocated ones 0.04 and -0.007, of reserved ones 0.24 and 0.06.

Falcon-H1: of forward 1.0 and 6.2 MB, of backward 0.6 and 5.6 (0.16 per cent), of `step` 0.8; of reserved ones 4 and 20 MiB. Of
34B with LoRA, of reserved ones 26 MiB.

GLM-4.7-Flash with checkpoints: of allocated bytes 4.9 MB; of reserved ones 244 MiB.

Gemma 4: of E2B 6.3 MB of allocated bytes, with LoRA 10.5; of 12B 2.5; of E4B 13; of 26B-A4B 62 to 70 MiB of reserved ones; of 31B
5.9 MB of `load`, with LoRA of `step` too, and 80 to 90 MiB of reserved ones (0.2 and 0.4 per cent). Qwen3-VL: of `load` 0.31, of
reserved ones 66 MiB; of 30B-A3B 7.5 MB of allocated ones.

ERNIE 4.5: of allocated ones 0.8 MB, of forward 4.8 (0.13 per cent); reserved ones are not stated.

MiniMax M2.5: of `load` 9.3 MB, an expert of 8 bits that is being stacked; of allocated ones 0.05, of reserved ones 0.09.

GLM-4.5: of reserved bytes, 20 to 80 MiB; of allocated ones at most 0.017. Nemotron Nano 9B, 12 layers: of reserved bytes, 70 MiB;
of allocated ones 0.002, with LoRA of 9 layers 2.9 MB.

Qwen 3's mixture: of reserved ones, 262 to 294 MiB where two micro batches wait for their reduction, and 138 MiB; of allocated
ones up to 0.02, of `load` 0.11. Moonlight in fp32 without an exchange: of reserved ones 46 MiB. Moonlight: of allocated ones up
to 0.08, of `load` and `step` up to 0.16, of blocks of experts that the allocator leaves unsplit; of reserved ones 0.37.
Nemotron 3 Nano: of reserved ones 34 MiB of five layers in
full, 24 with LoRA of eight; of allocated ones up to 0.035, of such blocks, and so 3.5 Lightning. Nemotron 3 Super: of
allocated ones 2.1 MB in full; of reserved ones 74 MiB with LoRA, and of five layers of Lightning 24. Qwen 3 4B with flashoptim:
of `step` 1.8 MB. Llama 3.1 8B with LoRA operation by operation and dropout: of reserved ones 62 MiB.

Layers gathered ahead: of Llama 2 7B 1.6 MB of allocated ones with LoRA, 4.2 MB in full; of Qwen2.5 32B and Llama 3.3 70B, whose
layers are compiled, 3.6 to 5.3 MB."""
IN_TURN = {
    ("qwen3-30b-a3b", 4, 2): 3.2,
    ("qwen3-30b-a3b", 12, 4): 1.4,
    ("qwen3-30b-a3b", 3, 4): 0.46,
    ("qwen3-30b-a3b", 8, 4): 1.4,
    ("moonlight-16b-a3b", 4, 2): 1.2,
    ("moonlight-16b-a3b", 5, 4): 0.19,
    ("moonlight-16b-a3b", 8, 4): 0.3,
    ("moonlight-16b-a3b", 4, 4): 0.15,
    ("gpt-oss-120b", 4, 1): 1.5,
}
"""The same of reserved bytes where tokens take experts in turn: at most 454 MiB of four layers. `load` of DeepSeek-V3, which is
7.7 per cent low, is not compared."""
ALLOCATED_IN_TURN = 0.15
"""Per cent of allocated bytes there: of GLM-4.7-Flash with LoRA 50 MB, as much as a compressed query; of Moonlight without
checkpoints 0.11; of two mixed layers of DeepSeek-V3 whose attention torch compiles 0.111, 21 MB, of which 18 are tails of blocks
that the allocator left unsplit, 14 in the rehearsal; of the others at most 0.1."""

OF_ENGINE_IN_8_BITS = {"te-mxfp8": (0.25, 14.3), "te-fp8": (0.23, 1.3), "te-fp8-blocks": (0.09, 0.17)}
"""Transformer Engine's experts in 8 bits → per cent of allocated bytes, and of phases. With current scaling at most 44 MB, of
copies of weights that the allocator leaves unsplit, in `step` too. With MXFP8 10 MB, and 32 MB of such copies of six layers over
four ranks; `step` is 31 to 708 MB too high, as much as the inputs in 8 bits of a layer that is computed again, which are freed
earlier."""

STEP_BESIDE_COMPILED_ATTENTION = 0.18
"""Per cent of `step`: 6.5 MB of three layers, of blocks that the allocator leaves unsplit; what is alive at the job's peak is
within 0.1 MB."""
FREED_BY_LATER_BACKWARDS = 6.5
"""Per cent of backward with LoRA where layers are freed after forward: `enable_fsdp_optimizations` leaves the head gathered in
the backward of each micro batch but the last, whose peak is 358 MB higher than here, and 34 % below that in forward."""
LEFT = 3 * 2 * (64 + 2 * 8) * 64
"""Bytes for each token of gpt-oss that torch's compiler left to Python's garbage collector in rehearsals over several GPUs
without an exchange: three times the queries, keys and values of a layer."""
SHARED_ROWS = {
    ("qwen3-8b", 1024, 0): 0.05,
    ("qwen3-8b", 2048, 0): 0.1,
    ("qwen3-0.6b", 2048, 0): 0.53,
    ("qwen3-4b", 2048, 0): 0.17,
    ("llama-3.2-1b", 1024, 0): 0.01,
    ("qwen2.5-0.5b", 1024, 0): 0.01,
    ("llama-3.2-1b", 1024, 1): 3.4,
    ("llama-3.2-1b", 4096, 0): 0.03,
    ("qwen3-32b", 8192, 0): 0.02,
    ("qwen3-32b", 8192, 15): 0.02,
    ("moonlight-16b-a3b", 2048, 0): 0.06,
    ("moonlight-16b-a3b", 4096, 0): 0.1,
    ("qwen3-30b-a3b-base", 2048, 0): 0.05,
    ("qwen3-30b-a3b-base", 4096, 0): 0.03,
}
"""Model, tokens of a row that ranks share, and rank → per cent of all. Beside experts that ranks divide, 5 MB of blocks with
shards of several sizes. With torch's attention up to 2.0 MB: tables of rotary
embedding are for as many positions as the largest of them says, a number that the emulated card does not hold. Packed rows: of
rank 1 the allocator leaves a block of logits in fp32 unused (16 layers: reserved -1.8 %)."""


NEXT = [json.loads(line) for line in Path(__file__).with_name("automodel_next.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("row", NEXT, ids=lambda row: row["layers"])
def test_a_projection_of_the_routers_shape_is_not_made_again(row: dict[str, Any]) -> None:
    """Four and eight layers of Qwen 3 Next over 32 GPUs, which has 512 experts, as many as its keys, its values and its shared
    expert are wide: checkpoints keep what these projections give, for the tool knows the router by its shape. `step` is 33 MB too
    high."""
    peaks, wider = (
        peftplan.estimate(**options(row) | {"model": cut(row["model"], row["layers"]) | sizes}).peaks for sizes in ({}, WIDER)
    )
    assert peaks is not None
    assert wider is not None
    near = {"step": 1.1e-2}
    assert peaks.by_phase == {phase: pytest.approx(n, rel=near.get(phase, 3e-4)) for phase, n in row["by_phase"].items()}
    assert (peaks.allocated, peaks.reserved) == (pytest.approx(row["allocated"], rel=1e-4), None)
    assert wider.by_phase["forward"] < peaks.by_phase["forward"]
    for other in ({"ep_size": 16}, {"gradient_checkpointing": False}, {"optim": "sgd"}, {"padding": True}):
        assert peftplan.estimate(**options(row) | other).peaks is None


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['model']} {row['options']['method']}" for row in ROWS])
def test_formulas_hold_what_the_recipe_holds(row: dict[str, Any]) -> None:
    card = row.get("card", "a100-80gb")
    peaks = peftplan.estimate(**options(row), gpu=card if options(row)["gpus"] == 1 else card.rpartition("x")[2]).peaks
    assert peaks is not None
    peaks = on_rehearsed_rank(peaks, row.get("rank", 0)) if "cp_size" in row["options"] else peaks
    gathers = row["model"] == "gpt-oss-20b" and "ep_size" in row["options"] and "kernels" not in row["options"]
    left = LEFT * row["options"]["batch_size"] * row["options"]["seq_len"] if gathers else 0
    phases = {phase: kept - (0 if phase == "load" else left) for phase, kept in row["by_phase"].items()}
    rehearsed = {"allocated": max(phases.values()), "reserved": row["reserved"]}
    stated = {"allocated": peaks.allocated, "reserved": peaks.reserved}
    drifts = {what: 100 * (value / rehearsed[what] - 1) for what, value in stated.items() if value is not None}
    if (
        row.get("recipe", {}).get("peft", {}).get("use_triton")
        and 0 < row["reserved"] - (peaks.reserved or 0) <= TIMED + SEGMENTS
    ):
        del drifts["reserved"]
    tail = TAIL.get(f"{row['model']} {row['options'].get('target_modules')}", 0.0)
    reserved = SHARED_SEGMENTS.get(row["model"], LARGEST["reserved"])
    key = row["model"], row["layers"], row["options"].get("batch_size", 1)
    in_turn = "balanced" in row["options"].get("kernels", "")
    loose = 0.0 if in_turn else LOOSE.get(key, 0.0)
    if "cp_size" in row["options"]:
        loose = SHARED_ROWS[(row["model"], row["options"]["seq_len"], row.get("rank", 0))]
    most = {"allocated": max(LARGEST["allocated"], tail, loose), "reserved": max(reserved, loose)}
    most = {"allocated": ALLOCATED_IN_TURN, "reserved": IN_TURN.get(key, 0.1)} if in_turn else most
    for name in {*row["options"].get("kernels", "").split(",")} & OF_ENGINE_IN_8_BITS.keys():
        most["allocated"], loose = OF_ENGINE_IN_8_BITS[name]
    loose = STEP_BESIDE_COMPILED_ATTENTION if "torch-compile-attn" in row["options"].get("kernels", "") else loose
    most = IN_8_BITS if "torchao-float8" in row["options"].get("kernels", "") else most
    assert all(abs(drift) <= most[what] for what, drift in drifts.items()), drifts
    phases = {phase: kept for phase, kept in phases.items() if (row["model"], phase) != ("deepseek-v3", "load")}
    by_phase = {phase: 100 * (peaks.by_phase[phase] / kept - 1) for phase, kept in phases.items()}
    freed = row["options"].get("reshard_after_forward") and row["options"]["method"] == "lora"
    largest = dict.fromkeys(by_phase, max(LARGEST_OF_PHASE, loose)) | ({"backward": FREED_BY_LATER_BACKWARDS} if freed else {})
    assert all(abs(drift) <= largest[phase] for phase, drift in by_phase.items()), by_phase


def test_a_teacher_lies_beside_the_student(tmp_path: Path) -> None:
    """Four layers of Llama 3.2 1B, whose teacher is as large. `load` and `step` of the rehearsal hold the teacher's forward too,
    which comes before that of the student."""
    row = json.loads(Path(__file__).with_name("automodel_beside.jsonl").read_text(encoding="utf-8"))
    job = options(row)
    (tmp_path / "config.json").write_text(json.dumps(job["model"]), encoding="utf-8")
    peaks = peftplan.estimate(**job, teacher_model=str(tmp_path), gpu="a100-80gb").peaks
    assert peaks is not None
    for phase in ("forward", "backward"):
        assert abs(peaks.by_phase[phase] / row["by_phase"][phase] - 1) < 1e-4
    assert peaks.allocated == peaks.by_phase["forward"]
    assert peaks.reserved is not None
    assert -0.01 < peaks.reserved / row["reserved"] - 1 < 0  # on the student's stream: -3.4 %


def test_a_job_of_true_size_holds_what_was_rehearsed() -> None:
    """All 28 layers of Qwen2.5 7B with Triton's kernels: what its autotuner takes in the first step is not at the peak."""
    (row,) = (row for row in ROWS if row["layers"] == 28)
    peaks = peftplan.estimate(**options(row), gpu="a100-80gb").peaks
    assert peaks is not None
    assert abs(peaks.allocated / row["allocated"] - 1) < 1e-6
    assert abs(peaks.reserved / row["reserved"] - 1) < 1e-3


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        ({}, None),
        ({"seq_len": 1536}, "gpt-oss"),
        ({"seq_len": 2354}, None),
        ({"seq_len": 2355}, "gpt-oss"),
        ({"target_modules": "every-linear"}, "gpt-oss"),
        ({"gradient_checkpointing": True}, "gpt-oss"),
        ({"gpus": 8, "strategy": "fsdp2"}, "gpt-oss"),
        ({"gpus": 8, "strategy": "fsdp2", "ep_size": 8}, None),
        ({"seq_len": 1536, "kernels": "te-linear"}, None),
        ({"kernels": "te-linear"}, "gpt-oss"),
        ({"seq_len": 1536, "kernels": "te-linear", "target_modules": "every-linear"}, "gpt-oss"),
    ],
)
def test_what_of_gpt_oss_was_rehearsed(options: dict[str, Any], unknown: str | None) -> None:
    """LoRA of attention on one GPU. 4 experts for each of 2 x 1,536 tokens are 12,288 rows, to which a bias is added at once.

    Masks of 64 heads have 64 x 17 bytes for each key and query; 24 layers keep 2 x (2 x 4 x 2,880 + 3 x 2,880 + 208 x 64) bytes
    a token, beside 2 x 201,088 of logits: 2,561,792 bytes, or 2,354 keys. Rehearsed, two layers (2 x 2,048 tokens) reserved 15.2
    GB, 4.3 GB of them twice for a mask; their later steps would need 12.3.
    """
    job: dict[str, Any] = {"method": "lora", "trainer": "automodel", "r": 8, "target_modules": r"(?:.*\.)?.*_proj"}
    result = peftplan.estimate("gpt-oss-20b", **job | {"batch_size": 2, "seq_len": 1537} | options)
    assert (result.peaks is None) is (unknown is not None)
    assert unknown is None or unknown in result.not_modelled[0]


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"tp_size": 2}, True),
        ({"gradient_checkpointing": True}, False),
        ({"method": "full"}, False),
        ({"lora_dropout": 0.1}, False),
        ({"target_parameters": ["experts.gate_up_proj"]}, False),
    ],
)
def test_what_of_mixtral_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    job: dict[str, Any] = {"method": "lora", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "seq_len": 512}
    job |= {} if options.get("method") == "full" else {"r": 8, "target_modules": "(?:.*\\.)?.*_proj"}
    result = peftplan.estimate("mixtral-8x7b-v0.1", **job | options)
    assert (result.peaks is not None) is known
    assert known or "mixtral as it was not rehearsed" in result.not_modelled[0]


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"gradient_checkpointing": True}, False),
        ({"tp_size": 2}, False),
        ({"dtype": "fp32"}, False),
        ({"method": "lora"}, False),
        ({"gpus": 1, "strategy": None}, False),
        ({"seq_len": 1000}, False),
    ],
)
def test_what_of_falcon_h1_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "seq_len": 512}
    result = peftplan.estimate("falcon-h1-0.5b-base", **job | options)
    assert (result.peaks is not None) is known


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"ep_size": 4}, False),
        ({"kernels": "deepep,te-linear"}, False),
        ({"kernels": None}, False),
        ({"dtype": "fp32"}, False),
    ],
)
def test_what_of_ernie_with_experts_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "ep_size": 8, "seq_len": 512}
    job |= {"kernels": "deepep", "optim": "adamw_torch", "gradient_checkpointing": True} | options
    model = cut("ernie-4.5-21b-a3b-pt", 3)
    peaks = peftplan.estimate(model, **job).peaks
    assert (peaks is not None) is known
    assert peaks is None or peaks.reserved is None
    if peaks is not None:  # one mixture, not two
        for layers in ({"moe_layer_interval": 2}, {"moe_layer_end_index": 1}):
            fewer = peftplan.estimate(model | layers, **job).peaks
            assert fewer is not None
            assert fewer.allocated < 0.9 * peaks.allocated


@pytest.mark.parametrize(
    ("model", "options", "known"),
    [
        ("falcon-h1-34b-base", {}, True),
        ("falcon-h1-34b-base", {"tp_size": None}, True),
        ("falcon-h1-34b-base", {"gradient_checkpointing": True}, False),
        ("falcon-h1-34b-base", {"method": "full", "r": None, "target_modules": None}, False),
        ("falcon-h1-0.5b-base", {"tp_size": 2}, False),
    ],
)
def test_what_of_falcon_h1_with_lora_was_rehearsed(model: str, options: dict[str, Any], known: bool) -> None:
    """Where a norm is in its mixer, which each rank has whole where ranks share matrices."""
    job: dict[str, Any] = {"method": "lora", "r": 8, "target_modules": r"(?:.*\.)?.*_proj", "trainer": "automodel"}
    job |= {"strategy": "fsdp2", "gpus": 8, "tp_size": 4, "seq_len": 512} | options
    result = peftplan.estimate(cut(model, 2), **{name: value for name, value in job.items() if value is not None})
    assert (result.peaks is not None) is known


@pytest.mark.parametrize(("layers", "method", "stated"), [(8, "full", True), (7, "full", False), (8, "lora", False)])
def test_where_reserved_bytes_of_gathered_tokens_were_rehearsed(layers: int, method: str, stated: bool) -> None:
    job: dict[str, Any] = {"method": method, "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "ep_size": 8}
    job |= {} if method == "full" else {"r": 8, "target_modules": r"(?:.*\.)?.*_proj"}
    peaks = peftplan.estimate(cut("gpt-oss-20b", layers), **job, batch_size=2, seq_len=2048).peaks
    assert peaks is not None
    assert (peaks.reserved is not None) is stated


@pytest.mark.parametrize("layers", [2, 24])
def test_where_reserved_bytes_of_fused_layers_in_8_bits_were_rehearsed(layers: int) -> None:
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "kernels": "torchao-float8"}
    peaks = peftplan.estimate(cut("phi-4", layers), **job, seq_len=1024).peaks
    assert peaks is not None
    assert (peaks.reserved is not None) is (layers == 24)


def test_falcon_h1_keeps_the_states_of_its_scan_until_the_loss() -> None:
    """In fp32, of 2 rows: 24 heads of 64 x 128 numbers in each of two layers, and the last 4 inputs of 1,792 channels in bf16."""
    (row,) = (row for row in ROWS if row["model"] == "falcon-h1-0.5b-base" and row["layers"] == 2)
    with_cache, without = (peftplan.estimate(**options(row) | {"use_cache": cache}).peaks for cache in (True, False))
    assert with_cache is not None
    assert without is not None
    lines = {
        line.name.rpartition(" ")[2]: line.bytes()
        for line in with_cache.ledgers["forward"].lines
        if line.name.endswith("_states")
    }
    assert lines == {"recurrent_states": 2 * 2 * 24 * 64 * 128 * 4, "conv_states": 2 * 2 * 1792 * 4 * 2}
    assert not any(line.name.endswith("_states") for line in without.ledgers["forward"].lines)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"gradient_checkpointing": True}, False),
        ({"tp_size": 2}, False),
        ({"dtype": "fp32"}, False),
        ({"method": "lora"}, False),
        ({"model": "qwen3-8b"}, False),
        ({"kernels": "torchao-float8"}, True),
        ({"kernels": "torchao-float8", "gradient_checkpointing": True}, True),
        ({"kernels": "torchao-float8", "tp_size": 2}, False),
        ({"kernels": "torchao-float8", "dtype": "fp32"}, False),
        ({"kernels": "torchao-float8", "method": "lora"}, False),
    ],
)
def test_what_of_layers_of_torchao_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    job: dict[str, Any] = {"model": "llama-3.1-8b", "method": "full", "trainer": "automodel", "kernels": "torchao"}
    result = peftplan.estimate(**job | {"strategy": "fsdp2", "gpus": 8, "seq_len": 512} | options)
    assert (result.peaks is not None) is known
    assert known or "torchao's layers as they were not rehearsed" in result.not_modelled[0]


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"target_parameters": ["experts.gate_up_proj"]}, False),
        ({"target_parameters": None}, False),
        ({"model": "gpt-oss-20b", "kernels": None, "target_modules": r"(?:.*\.)?.*_proj"}, False),
        ({"model": "deepseek-v3", "method": "full", "kernels": "te,deepep,te-linear"}, False),
        ({"model": "moonlight-16b-a3b", "method": "full", "kernels": "te,deepep,te-linear"}, True),
    ],
)
def test_which_adapters_and_layers_were_rehearsed_where_ranks_divide_experts(options: dict[str, Any], known: bool) -> None:
    """gpt-oss's adapters of attention alone, Qwen 3's of both products of experts; DeepSeek V3 chooses groups of experts first,
    by which other shares of the tokens reach a rank."""
    both = ["experts.gate_up_proj", "experts.down_proj"]
    adapts = {} if options.get("method") == "full" else {"r": 8, "target_modules": "every-linear", "target_parameters": both}
    job: dict[str, Any] = {"model": "qwen3-30b-a3b", "method": "lora", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8}
    job |= {"ep_size": 8, "batch_size": 2, "seq_len": 2048, "kernels": "deepep", **adapts}
    job |= {"gradient_checkpointing": job["model"] == options.get("model", "qwen3-30b-a3b")}
    result = peftplan.estimate(**job | options)
    assert (result.peaks is not None) is known
    assert known or "ep_size" in result.not_modelled[0]


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, False),
        ({"gradient_checkpointing": True}, False),
        ({"kernels": "hybridep,te-linear"}, False),
        ({"ep_size": 4}, False),
        ({"pp_stage_is_unit": None}, False),
    ],
)
def test_what_of_minimax_with_lora_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    """Of linear layers: 2 x 8 x (3,072 + 6,144) + 2 x 8 x (3,072 + 1,024) in each, and 8 x (3,072 + 200,064) of the head."""
    job: dict[str, Any] = {
        "method": "lora",
        "r": 8,
        "target_modules": "every-linear",
        "trainer": "automodel",
        "kernels": "hybridep",
        "pp_stage_is_unit": False,
    }
    job |= {"strategy": "fsdp2", "gpus": 8, "ep_size": 8, "seq_len": 512, "optim": "adamw_torch"}
    result = peftplan.estimate(cut("minimax-m2.5", 3), **job | options)
    assert (result.peaks is not None) is known
    assert not known or result.trainable_parameters == 3 * 212_992 + 1_625_088


def test_experts_of_gpt_oss_are_widened_one_projection_at_a_time() -> None:
    """`_convert_moe_packed_tensors`: gate and up of a layer are 32 x 5,760 x 90 blocks of 32 numbers. Beside 17 bytes for each
    block of both projections a block has 2 x 128 bytes of places, 64 of the result, 32 of numbers that are looked up and a scale
    of 4."""
    job: dict[str, Any] = {"method": "lora", "trainer": "automodel", "r": 8, "target_modules": r"(?:.*\.)?.*_proj"}
    peaks = peftplan.estimate("gpt-oss-20b", **job, batch_size=2, seq_len=2048).peaks
    assert peaks is not None
    (line,) = (line for line in peaks.ledgers["load"].lines if line.name == "experts in 4 bits")
    wide, down = 32 * 5760 * 90, 32 * 2880 * 90
    assert line.bytes() == 17 * (wide + down) + (2 * 128 + 64 + 32 + 4) * wide


def test_every_linear_layer_includes_the_output() -> None:
    """8 x (2,048 + 128,256) beside what peft calls all-linear."""
    of_peft, of_recipe = (
        peftplan.estimate("llama-3.2-1b", method="lora", r=8, target_modules=word).trainable_parameters
        for word in ("all-linear", "every-linear")
    )
    assert of_recipe - of_peft == 8 * (2048 + 128_256)


def test_lora_of_the_recipe_adapts_what_mamba_reads_itself() -> None:
    """peft refuses out_proj. `apply_lora_to_linear_modules` made 2 x 1,040,640 numbers of two layers: gate, up and down_proj,
    Mamba's in_proj and out_proj, q and o_proj, k and v_proj."""
    of_layer = 3 * (5120 + 21_504) + (5120 + 9248) + (4096 + 5120) + 2 * (5120 + 2560) + 2 * (5120 + 512)
    job: dict[str, Any] = {"method": "lora", "r": 8, "target_modules": r"(?:.*\.)?.*_proj"}
    result = peftplan.estimate("falcon-h1-34b-base", trainer="automodel", strategy="fsdp2", gpus=8, seq_len=512, **job)
    assert result.trainable_parameters == 72 * 8 * of_layer == 74_926_080
    with pytest.raises(RefusedError, match="peft refuses out_proj"):
        peftplan.estimate("falcon-h1-34b-base", **job)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "te-parallel"}, "loss: Trainer cannot compute the te-parallel loss; add --trainer automodel"),
        ({"kernels": "torchao-float8"}, "kernels: Trainer has no torchao-float8.linear; add --trainer automodel"),
        ({"kernels": "te"}, "kernels: Trainer has no te.attention; add --trainer automodel"),
        (
            {"optim": "flash_adamw"},
            "optim: Trainer makes no flash_adamw; did you mean .* NeMo Automodel's recipe makes it",
        ),
    ],
)
def test_what_the_recipe_alone_does(settings: dict[str, str], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        peftplan.estimate("llama-3.2-1b", method="lora", **settings)  # type: ignore[arg-type]


def test_each_model_type_was_rehearsed() -> None:
    files = (Path(__file__).with_name(f"{name}.jsonl").read_text(encoding="utf-8") for name in ("pipeline", "automodel_vl"))
    elsewhere = [json.loads(line) for lines in files for line in lines.splitlines()]
    types = {options(row)["model"]["model_type"] for row in (*ROWS, *NEXT, *elsewhere)}
    assert types == {*REHEARSED_QUANTIZED, *(model_type for model_type, _ in WITH_TOWERS)}


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        ({}, None),
        ({"method": "qlora"}, "mistral3"),
        ({"gradient_checkpointing": True}, "mistral3"),
        ({"model": "mistral-small-3.1-24b-instruct-2503"}, "mistral3"),
    ],
)
def test_the_root_gathers_a_frozen_tower(options: dict[str, Any], unknown: str | None) -> None:
    """Of Ministral 3 3B 8 ranks share 24 layers of the tower, each 4 x 1024 x 1024 of attention, 3 x 1024 x 4096 of the MLP and
    two norms; torch gathers them, the projector and the tied embedding before the first layer runs.
    """
    frozen = r".*(vision_tower|multi_modal_projector).*"
    job: dict[str, Any] = {"model": "ministral-3-3b-instruct-2512", "method": "lora", "trainer": "automodel", "strategy": "fsdp2"}
    names = {"target_modules": "every-linear", "exclude_modules": frozen}
    result = peftplan.estimate(**job | names | options, gpus=8, seq_len=512)
    assert (result.peaks is None) is (unknown is not None)
    assert unknown is None or unknown in result.not_modelled[0]
    if result.peaks is not None:
        gathered = [line for line in result.peaks.ledgers["forward"].lines if line.category == "gathered_weights"]
        tower = sum(line.bytes() for line in gathered if "vision_tower.transformer.layers" in line.name)
        assert tower == 2 * 24 * (4 * 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"model": "gemma-4-31b-it", "gradient_checkpointing": True}, True),
        ({"model": "gemma-4-31b-it"}, True),
        ({"model": "gemma-4-31b-it", "gradient_checkpointing": True, "tp_size": 2}, True),
        ({"model": "gemma-4-31b-it", "tp_size": 2}, False),
        ({"model": "gemma-4-e4b-it", "gradient_checkpointing": True, "tp_size": 2}, False),  # of layers that borrow keys
        ({"model": "gemma-4-12b-it", "trainer": "automodel"}, False),
        ({"model": "qwen3-vl-8b-instruct", "attn_implementation": "sdpa"}, True),
        ({"model": "qwen3-vl-8b-instruct"}, False),
        ({"model": "gemma-3-4b-it"}, True),
        ({"model": "gemma-3-4b-it", "attn_implementation": "sdpa"}, False),
        ({"model": "gemma-3-4b-it", "trainer": "automodel"}, False),
        ({"gradient_checkpointing": True}, False),  # of layers that borrow keys and values
        ({"attn_implementation": "sdpa"}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"dtype": "fp32"}, False),
        ({"model": "gemma-4-26b-a4b"}, False),
        ({"model": "gemma-4-26b-a4b", "kernels": "deepep", "ep_size": 8}, True),
        ({"model": "gemma-4-26b-a4b", "kernels": "deepep", "ep_size": 8, "gradient_checkpointing": True}, False),
        ({"model": "gemma-4-26b-a4b", "kernels": "deepep", "ep_size": 8, "whole_tower": True}, True),
        ({"whole_tower": True}, False),  # of a model without experts
        ({"model": "gemma-3-4b-it", "whole_tower": True}, False),
    ],
)
def test_what_beside_towers_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    text = r"^(?!.*(?:vision|visual|image_encoder|audio|speech|sound)).*"
    job: dict[str, Any] = {"model": "gemma-4-e2b-it", "method": "partial", "trainable": text, "attn_implementation": "eager"}
    job |= {"trainer": "automodel-vlm", "strategy": "fsdp2", "gpus": 8, "seq_len": 512}
    result = peftplan.estimate(**job | options)
    assert (result.peaks is not None) is known


def test_a_whole_tower_is_of_no_unit() -> None:
    """27 layers of 1,152 x 4,304 and 4 x 1,152 x 1,152 and their norms, two tables of 10,240 places, patches of 768 numbers, and
    a projection to 2,816. One of eight ranks has half of the tables, which have two rows, and an eighth of what else is large."""
    sizes = {"tower": 27 * (3 * 1152 * 4304 + 4 * 1152 * 1152) + 1152 * 768 + 1152 * 2816, "tables": 2 * 10240 * 1152}
    job: dict[str, Any] = {"trainer": "automodel-vlm", "strategy": "fsdp2", "gpus": 8, "kernels": "deepep", "ep_size": 8}
    job |= {"method": "partial", "trainable": r"^(?!.*vision).*", "attn_implementation": "eager", "seq_len": 512}
    shared, whole = (peftplan.estimate("gemma-4-26b-a4b", **job, whole_tower=value) for value in (None, True))
    of_norms = 27 * (4 * (2560 - 512))
    weights = [e.to_dict()["memory"]["by_category"]["weights"] for e in (shared, whole)]
    assert weights[1] - weights[0] == 2 * (sizes["tower"] * 7 // 8 + sizes["tables"] // 2) + of_norms
    with pytest.raises(InputError, match="accepted: with trainer automodel"):
        peftplan.estimate("llama-3.2-1b", strategy="fsdp2", gpus=8, whole_tower=True)


def test_factors_of_gemma4_multiply_its_experts() -> None:
    """30 layers have a factor for each of 128 experts, which the tool multiplies into the weights that it reads."""
    by_tool: dict[str, Any] = {"trainer": "automodel-vlm", "strategy": "fsdp2", "gpus": 8, "kernels": "deepep", "ep_size": 8}
    counts = [peftplan.estimate("gemma-4-26b-a4b", method="full", **more).total_parameters for more in ({}, by_tool)]
    assert counts[0] is not None
    assert counts[1] is not None
    assert counts[0] - counts[1] == 30 * 128


def test_layers_in_8_bits_are_gathered_in_bytes() -> None:
    """A layer of Granite 3.3 2B has 2 x 2,048 x (2,048 + 512) weights of attention and 3 x 2,048 x 8,192 of the MLP, which FSDP2
    gathers in one byte each instead of two; norms, embedding and head stay in 16 bits."""
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "seq_len": 1024}
    gathered = []
    for kernels in ("none", "torchao-float8"):
        result = peftplan.estimate("granite-3.3-2b-instruct", **job, kernels=kernels)
        assert result.peaks is not None
        lines = result.peaks.ledgers["forward"].lines
        gathered.append(sum(line.bytes() for line in lines if line.category == "gathered_weights"))
    assert gathered[0] - gathered[1] == 2 * 2048 * (2048 + 512) + 3 * 2048 * 8192


@pytest.mark.parametrize(("rows", "length", "planned"), [(1, 512, 1024), (2, 1536, 4096), (1, 32_769, 65_536)])
def test_a_plan_of_cudnn_is_for_a_power_of_two_of_tokens(rows: int, length: int, planned: int) -> None:
    """transformer_engine, common/fused_attn/utils.cu (`get_max_tokens`)."""
    assert PLANNED.at({"b": rows, "s": length}) == planned


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        ({}, None),
        ({"method": "lora", "r": 8}, None),
        ({"cp_size": 2}, None),
        ({"cp_size": 4}, "cp_size"),
        ({"optim": "te_fused_adam"}, None),
        ({"optim": "te_fused_adam", "kernels": "none"}, "optim te_fused_adam"),
        ({"pp_size": 2, "tp_size": 2, "pp_schedule": "interleaved1f1b", "pp_microbatches": 2}, None),
        ({"pp_size": 2, "tp_size": 2, "pp_schedule": "1f1b", "pp_microbatches": 2}, "pp_size"),
        ({"dtype": "fp32"}, "packed documents"),
        ({"padding": True}, "padding"),
        ({"model": "qwen2.5-1.5b"}, None),
        ({"gpus": 1, "strategy": None}, "packed documents"),
        ({"gpus": 1, "strategy": None, "method": "lora", "r": 8}, None),
        ({"model": "mistral-7b-v0.1"}, "te's kernels in mistral"),
    ],
)
def test_what_of_packed_documents_was_rehearsed(options: dict[str, Any], unknown: str | None) -> None:
    job: dict[str, Any] = {"model": "llama-3.1-8b", "method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8}
    result = peftplan.estimate(**job | {"kernels": "te", "seq_len": 1024} | options)
    assert (result.peaks is None) is (unknown is not None)
    assert unknown is None or unknown in result.not_modelled[0]


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"optim": "adamw_torch"}, True),
        ({"cp_size": 4}, False),
        ({"loss": "full"}, False),
        ({"gradient_checkpointing": False}, False),
        ({"model": "llama-3.2-1b"}, False),
    ],
)
def test_what_of_shared_rows_in_transformers_modules_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    job: dict[str, Any] = {"model": "qwen3-4b", "method": "full", "trainer": "automodel-hf", "strategy": "fsdp2", "gpus": 8}
    job |= {"cp_size": 2, "loss": "cut-apart", "optim": "flash_adamw", "gradient_checkpointing": True, "seq_len": 1024}
    assert (peftplan.estimate(**job | options).peaks is not None) is known


@pytest.mark.parametrize(("card", "verdict"), [("a100-80gb", "does_not_run"), ("l40s", "fits")])
def test_layers_in_8_bits_need_a_card_that_multiplies_them(card: str, verdict: str) -> None:
    """nemo_automodel, components/quantization/fp8.py: "FP8 is only supported on SM89 or later GPUs"."""
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "seq_len": 512}
    result = peftplan.estimate("granite-3.3-2b-instruct", **job, kernels="torchao-float8", gpu=card)
    assert result.gpus[0].verdict == verdict


def test_the_recipe_of_pictures_holds_the_logits_in_backward() -> None:
    """recipes/vlm/finetune.py keeps `out`, which recipes/llm/train_ft.py deletes: 512 x 151,936 logits in 16 bits. The recipe of
    texts was not rehearsed with this model."""
    (row,) = (row for row in ROWS if row["model"] == "qwen2.5-vl-3b-instruct")
    assert peftplan.estimate(**options(row) | {"trainer": "automodel"}).peaks is None
    peaks = peftplan.estimate(**options(row) | {"trainer": "automodel-vlm"}).peaks
    assert peaks is not None
    assert abs(peaks.by_phase["backward"] - row["by_phase"]["backward"]) < 512 * 151_936 * 2 / 10


@pytest.mark.parametrize(
    ("model", "checkpoints", "unknown"),
    [("t5-small", False, None), ("t5-small", True, "gradient_checkpointing"), ("flan-t5-base", False, "an untied head")],
)
def test_what_of_t5_was_not_rehearsed(model: str, checkpoints: bool, unknown: str | None) -> None:
    """Rehearsed, checkpoints of T5-large end in torch's CheckpointError: 60 tensors saved, 56 when a layer is computed again.
    Flan-T5 base (two layers of its encoder), whose head is its own, held 2.7 % less than was counted.
    """
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "seq_len": 512}
    result = peftplan.estimate(model, **job, gradient_checkpointing=checkpoints)
    assert (result.peaks is None) is (unknown is not None)
    assert unknown is None or result.not_modelled[0] == f"a step with FSDP2 over 8 GPUs and {unknown} (no formula yet)"


@pytest.mark.parametrize(
    ("options", "unknown"),
    [({}, None), ({"method": "lora"}, "dion_muon"), ({"dtype": "fp32"}, "dion_muon"), ({"optim": "te_fused_adam"}, "te_fused")],
)
def test_muon_steps_over_whole_matrices(options: dict[str, Any], unknown: str | None) -> None:
    """8 ranks share 56 matrices of gate and up, and 28 of down: each makes 7 whole, and 4 of 32, which zeros fill up.

    At the peak gate and up have five tensors of their size: the stack, what was received, the result, its parts, the updates.
    down_proj has eight: the stack, what was received, the matrices, x and four products; and one product of its short side.
    """
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "optim": "dion_muon"}
    result = peftplan.estimate("qwen2.5-7b", **job | options, seq_len=512)
    assert (result.peaks is None) is (unknown is not None)
    assert unknown is None or unknown in result.not_modelled[0]
    if result.peaks is not None:
        h, i = 3584, 18_944
        lines = result.peaks.ledgers["step"].lines
        sent = sum(line.bytes() for line in lines if line.category == "temporaries" and not line.name.startswith("tails"))
        assert sent == 2 * (5 * 7 * h * i + 8 * 4 * h * i + 4 * h * h + h // 8 * i)


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        ({"gradient_accumulation_steps": 2}, None),
        ({"gradient_accumulation_steps": 2, "trainer": "automodel-hf"}, "loss cut-apart"),
        ({"gradient_accumulation_steps": 2, "sync_each_batch": True}, None),
        ({"method": "lora", "r": 8, "target_modules": "every-linear"}, "loss cut-apart"),
        ({"loss": "full", "tp_size": 8}, "a step with FSDP2 over 8 GPUs and tp_size"),
    ],
)
def test_what_of_the_fused_loss_and_of_shared_matrices_was_not_rehearsed(options: dict[str, Any], unknown: str | None) -> None:
    """Rehearsed, three layers of Llama 3.1 8B over 8 GPUs that share each matrix reserved 4.1 % less than was counted."""
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "loss": "cut-apart"}
    result = peftplan.estimate("llama-3.1-8b", **job | options, seq_len=512)
    assert (result.peaks is None) is (unknown is not None)
    assert unknown is None or unknown in result.not_modelled[0]


@pytest.mark.parametrize(
    ("ranks", "experts", "k", "expected", "uniform"),
    [
        (8, 128, 8, 2048, True),
        (32, 128, 8, 4096, True),
        (8, 64, 6, 3072, True),
        (32, 384, 8, 2730, True),
        (64, 384, 8, 2730, False),
    ],
)
def test_how_many_ranks_a_token_reaches_that_takes_experts_in_turn(
    ranks: int, experts: int, k: int, expected: int, uniform: bool
) -> None:
    """Of 64 experts, eight on each rank, tokens take 0-5, 6-11, 12-17, 18-23 and so on: as many reach one rank as reach two.
    Of 384 on 32 ranks, 0-7 are on one rank, 8-15 on two, 16-23 on one."""
    assert received(ranks, experts, k, in_turn=True).at({"b": 2, "s": 1024}) == expected
    assert alike(ranks, experts, k) is uniform


OF_GPT_OSS: dict[str, Any] = {"model": "gpt-oss-120b", "kernels": "te-norm,hybridep,te-linear,balanced", "seq_len": 4096} | {
    "gradient_checkpointing": False,
    "gradient_accumulation_steps": 3,
}

BY_ENGINE = OF_GPT_OSS | {"kernels": "te-norm,hybridep,te-linear,te-experts,balanced", "gpus": 32, "ep_size": 16, "batch_size": 4}
OF_KIMI: dict[str, Any] = {"model": "kimi-k2-instruct", "kernels": "te-norm,deepep,te-linear,balanced", "gpus": 64, "ep_size": 32}
OF_KIMI |= {"pp_size": 2, "pp_schedule": "interleaved1f1b", "pp_layers_per_stage": 2, "pp_round_stages": "down"}
OF_KIMI |= {"pp_microbatches": 4, "seq_len": 512}


OF_GLM: dict[str, Any] = OF_GPT_OSS | {"model": "glm-4.5-air", "gradient_accumulation_steps": 1, "gpus": 64, "ep_size": 64}
OF_GLM_5: dict[str, Any] = OF_KIMI | {"model": "glm-5", "kernels": "te-norm,hybridep,te-linear,balanced", "ep_size": 16}
OF_GLM_5 |= {"pp_stage_is_unit": False}
OF_FLASH: dict[str, Any] = {"model": "glm-4.7-flash", "kernels": "te-norm,deepep,te-linear,balanced", "seq_len": 4096} | {
    "pp_stage_is_unit": False,
    "gradient_accumulation_steps": 2,
}
BY_LORA: dict[str, Any] = {
    "method": "lora",
    "target_modules": "every-linear",
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
OF_QWEN: dict[str, Any] = {"model": "qwen3-30b-a3b", "kernels": "deepep,te-linear", "loss": "cut-apart"}
BY_COMPILED = {"kernels": "torch-norm,torch-compile-attn,hybridep,te-experts,balanced", "optim": "adam_one_by_one"}
BY_QUACK = {"kernels": "quack.rms_norm,deepep,quack-linear,balanced"}
OF_DEEPSEEK: dict[str, Any] = {"model": "deepseek-v3", "kernels": "te-norm,hybridep,te-linear,te-mxfp8,balanced"} | {
    "gpus": 64,
    "ep_size": 64,
    "seq_len": 4096,
    "optim": "adam_one_by_one",
}
OVER_DOCUMENTS: dict[str, Any] = {"kernels": "te,hybridep,te-linear,te-mxfp8", "optim": "adam_one_by_one"} | {
    "loss": "full",
    "seq_len": 1024,
}
IN_BLOCKS: dict[str, Any] = {"kernels": "te-norm,deepep,te-linear,te-fp8-blocks,balanced", "optim": "adam_one_by_one"} | {
    "gradient_checkpointing": False,
    "seq_len": 2048,
}
OF_STAGES: dict[str, Any] = {"model": "minimax-m2.5", "kernels": "te-norm,hybridep,te-linear,balanced", "seq_len": 4096} | {
    "gpus": 64,
    "pp_size": 2,
    "pp_schedule": "interleaved1f1b",
    "ep_size": 32,
    "pp_stage_is_unit": False,
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"loss": "full"}, False),
        ({"kernels": "te-norm,deepep-again,te-linear"}, False),
        ({"kernels": "te-norm,uccl,te-linear,balanced"}, False),
        ({"optim": "adam_one_by_one"}, False),
        ({"kernels": "te-norm,hybridep,te-linear,te-mxfp8,balanced", "optim": "adam_one_by_one"}, True),
        ({"kernels": "te-norm,hybridep,te-linear,te-mxfp8,balanced"}, False),
        (OVER_DOCUMENTS, True),
        (OVER_DOCUMENTS | {"seq_len": 1000}, False),  # no multiple of 32 tokens, at which Transformer Engine raises
        (OVER_DOCUMENTS | {"seq_len": 1000, "batch_size": 4}, True),
        (OF_DEEPSEEK, True),
        (OF_DEEPSEEK | {"gradient_accumulation_steps": 2}, False),
        (OF_DEEPSEEK | {"gradient_checkpointing": False}, False),
        (BY_COMPILED, True),
        (BY_COMPILED | {"gradient_checkpointing": False}, False),
        (BY_COMPILED | {"kernels": "torch-norm,hybridep,te-experts,balanced"}, False),
        (BY_COMPILED | {"kernels": "torch-norm,torch-compile-attn,balanced"}, False),
        (BY_COMPILED | {"gpus": 16}, False),
        (BY_COMPILED | {"model": "moonlight-16b-a3b"}, False),  # queries are not compressed
        (BY_COMPILED | {"model": "deepseek-v3", "gpus": 64, "ep_size": 64}, True),
        (BY_COMPILED | {"model": "deepseek-v3", "gpus": 64, "ep_size": 64, "gradient_checkpointing": False}, False),
        (BY_COMPILED | {"model": "deepseek-v3", "gpus": 64, "ep_size": 64, "gradient_accumulation_steps": 2}, False),
        (BY_QUACK, True),
        (BY_QUACK | {"gradient_checkpointing": False}, False),
        (BY_QUACK | {"kernels": "quack.rms_norm,deepep,te-linear,balanced"}, False),
        (IN_BLOCKS, True),
        (IN_BLOCKS | {"gradient_checkpointing": True}, False),
        (IN_BLOCKS | {"seq_len": 1000}, False),  # rows of experts that the tool pads
        (IN_BLOCKS | {"kernels": "te-norm,deepep,te-linear,te-fp8,balanced"}, False),
        (IN_BLOCKS | {"model": "moonlight-16b-a3b", "kernels": "te-norm,deepep,te-linear,te-fp8,balanced"}, True),
        (IN_BLOCKS | {"model": "moonlight-16b-a3b", "kernels": "te-norm,deepep,te-linear,te-experts,balanced"}, True),
        ({"kernels": "torch-norm,balanced"}, True),
        ({"kernels": "torch-norm,balanced", "gpus": 16, "ep_size": 16}, False),
        ({"kernels": "torch-norm,balanced", "gradient_checkpointing": False}, False),
        ({"model": "moonlight-16b-a3b", "kernels": "torch-norm,balanced", "gradient_checkpointing": False}, True),
        ({"model": "moonlight-16b-a3b", "kernels": "torch-norm,balanced"}, False),
        ({"model": "moonlight-16b-a3b"}, False),
        ({"model": "moonlight-16b-a3b", "kernels": "te-norm,deepep,te-linear,balanced"}, True),
        ({"model": "deepseek-v3", "kernels": "te-norm,hybridep,te-linear,balanced", "gpus": 64, "ep_size": 64}, True),
        ({"model": "deepseek-v3", "kernels": "te-norm,deepep,te-linear,balanced", "gpus": 64, "ep_size": 64}, False),
        (OF_KIMI, True),
        (OF_KIMI | {"gpus": 128, "ep_size": 64}, False),  # some ranks get more tokens
        (OF_KIMI | {"gradient_checkpointing": False}, False),
        (OF_GPT_OSS, True),
        (OF_GPT_OSS | {"optim": "adam", "gpus": 64, "ep_size": 64}, True),
        (OF_GPT_OSS | {"gradient_checkpointing": True}, False),
        (OF_GPT_OSS | {"kernels": "te-norm,deepep,te-linear,balanced"}, False),
        (OF_GPT_OSS | {"seq_len": 2048}, False),  # 8,192 rows of experts
        (OF_GPT_OSS | {"batch_size": 4}, False),  # chunks of rows
        (BY_ENGINE, True),  # which no product of experts divides into chunks
        (BY_ENGINE | {"ep_size": 32}, False),
        (OF_GLM, True),
        (OF_GLM | {"gradient_accumulation_steps": 2}, False),
        (OF_GLM_5, True),
        (OF_GLM_5 | {"gradient_checkpointing": False}, False),
        (OF_GLM_5 | BY_LORA | {"ep_size": 32}, True),
        (OF_GLM_5 | BY_LORA, False),  # several ranks own the same experts
        ({"model": "glm-5", "kernels": "te-norm,hybridep,te-linear,balanced"}, False),  # without stages
        (OF_FLASH, True),
        (OF_FLASH | {"pp_stage_is_unit": None}, False),
        (OF_FLASH | BY_LORA, True),
        (OF_FLASH | BY_LORA | {"target_parameters": ["experts.down_proj"]}, False),
        (OF_STAGES | BY_LORA, True),
        (OF_STAGES | {"model": "glm-4.6"}, False),
        (OF_STAGES | {"model": "glm-4.6", "ep_size": 16, "reshard_after_forward": True}, True),
        (OF_STAGES | {"ep_size": 16, "reshard_after_forward": True}, False),
        ({"model": "minimax-m2.5", "kernels": "te-norm,hybridep,te-linear,balanced"}, False),  # without stages
        (OF_GLM | {"gradient_checkpointing": True}, False),
        (OF_GLM | {"seq_len": 1024}, False),  # 8,192 rows of experts, which get their weights at once
    ],
)
def test_what_of_tokens_that_take_experts_in_turn_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    job: dict[str, Any] = {"model": "qwen3-30b-a3b", "method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8}
    job |= {"ep_size": 8, "gradient_checkpointing": True, "kernels": "te-norm,deepep-again,te-linear,balanced"}
    result = peftplan.estimate(**job | {"loss": "full-no-upcast"} | options)
    assert (result.peaks is not None) is known
    assert any("uneven routing" in warning for warning in result.warnings) is ("balanced" not in (job | options)["kernels"])


def test_reserved_bytes_are_not_stated_where_torch_compiles_attention() -> None:
    """Rehearsals of 1,000 tokens reserved 13 % less than the replay, and over 4 GPUs 8 % more."""
    rows = [row for row in ROWS if "torch-compile-attn" in row["options"].get("kernels", "")]
    stated = [peftplan.estimate(**options(row)).peaks for row in rows]
    assert [peaks.reserved for peaks in stated if peaks is not None] == [None] * 10


@pytest.mark.parametrize(("seq_len", "stated"), [(1000, False), (2048, True)])
def test_reserved_bytes_of_few_tokens_that_take_experts_in_turn_are_not_stated(seq_len: int, stated: bool) -> None:
    """Two layers of 1,000 tokens reserved 12 % less than the replay."""
    (row,) = (
        row for row in ROWS if {"te-norm", "te-experts"} <= {*row["options"].get("kernels", "").split(",")}
        and row["options"]["seq_len"] == 1000
    )  # fmt: skip
    peaks = peftplan.estimate(**options(row) | {"seq_len": seq_len}).peaks
    assert peaks is not None
    assert (peaks.reserved is not None) is stated


@pytest.mark.parametrize(("ranks", "stated"), [(8, True), (16, False)])
def test_reserved_bytes_are_not_stated_where_more_ranks_get_tokens_in_turn(ranks: int, stated: bool) -> None:
    job: dict[str, Any] = {"model": "qwen3-30b-a3b", "method": "full", "trainer": "automodel", "strategy": "fsdp2"}
    job |= {"gradient_checkpointing": True, "kernels": "te-norm,deepep,te-linear,balanced", "loss": "full-no-upcast"}
    peaks = peftplan.estimate(**job, seq_len=512, gpus=ranks, ep_size=ranks).peaks
    assert peaks is not None
    assert (peaks.reserved is not None) is stated


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"optim": "te_fused_adam"}, True),
        ({"optim": "adamw_torch"}, False),
        ({"loss": "cut-apart"}, False),
        ({"gradient_checkpointing": False}, False),
        ({"cp_size": 2}, True),
        ({"cp_size": 2, "optim": "te_fused_adam"}, False),
        ({"cp_size": 2, "gradient_checkpointing": False}, False),
        ({"cp_size": 4}, False),
        (OF_QWEN | {"cp_size": 2}, False),
        (OF_QWEN | {"cp_size": 2, "gradient_checkpointing": False, "loss": "full"}, True),
        (OF_QWEN, True),
        (OF_QWEN | {"optim": "te_fused_adam"}, True),
        (OF_QWEN | {"loss": "full"}, False),
        (OF_QWEN | {"gradient_checkpointing": False}, False),
    ],
)
def test_what_beside_small_optimizers_of_mixtures_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    job: dict[str, Any] = {"model": "moonlight-16b-a3b", "method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8}
    job |= {"ep_size": 8, "gradient_checkpointing": True, "kernels": "te-norm,deepep,te-linear", "optim": "flash_adamw"}
    peaks = peftplan.estimate(**job | {"gradient_accumulation_steps": 3} | options).peaks
    assert (peaks is not None) is known
    assert peaks is None or peaks.reserved is None


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"model": "llama-3.1-8b"}, False),
        ({"model": "llama-3.1-8b", "kernels": "quack.rope"}, True),
        ({"kernels": "quack.rope"}, False),
        ({"model": "qwen2.5-1.5b"}, False),
        ({"batch_size": 2}, False),
        ({"gradient_checkpointing": False}, False),
        ({"loss": "full"}, False),
    ],
)
def test_what_of_quack_was_rehearsed(options: dict[str, Any], known: bool) -> None:
    """Norms as wide as Qwen2.5 7B's, and one row, whose queries and keys alone are turned where they lie."""
    job: dict[str, Any] = {"model": "qwen2.5-7b", "method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8}
    job |= {"gradient_checkpointing": True, "kernels": "quack", "loss": "cut-apart"}
    assert (peftplan.estimate(**job | options).peaks is not None) is known


def test_layers_gathered_ahead_and_compiled_are_opened_as_rehearsed() -> None:
    """What differs from the rehearsed jobs has no peak; other trainers gather no layer ahead under FSDP2."""
    job = next(options(row) for row in ROWS if row["options"].get("kernels") == "torch-compile")
    peaks = peftplan.estimate(**job).peaks
    assert peaks is not None
    assert peaks.reserved is None
    for other in ({"tp_size": 4}, {"gradient_checkpointing": False}, {"use_dora": True}, {"target_modules": "q_proj"}):
        assert peftplan.estimate(**job | other).peaks is None
    plain = {"model": "llama-3.1-8b", "method": "lora", "strategy": "fsdp2", "gpus": 8}
    with pytest.raises(InputError, match="forward_prefetch"):
        peftplan.estimate(**plain, forward_prefetch=True)

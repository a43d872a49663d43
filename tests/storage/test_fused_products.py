"""Which 4-bit products are fused: bitsandbytes' own choice, both engines, and every size of a grid."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftplan import estimate
from peftplan.datafiles import DATA
from peftplan.job.script import Script
from peftplan.storage.fused_products import Chip
from peftplan.versions import READ_IN

JOB = {"method": "qlora", "trainer": "plain", "batch_size": 3, "seq_len": 128, "r": 4}


def librarys_choice(torch: Any) -> Callable[..., bool]:
    """`_gemm_4bit_use_custom_cuda`, without the module around it, which needs a card."""
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "backends" / "cuda" / "ops.py").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    choice = next(node for node in functions if node.name == "_gemm_4bit_use_custom_cuda")
    choice.decorator_list = []
    namespace: dict[str, Any] = {"torch": torch, "_GEMM_4BIT_CUSTOM_FLOOR_M": 4}
    namespace["_gpu_dispatch_props"] = lambda chip: (chip.multiprocessors, chip.major, chip.minor)
    exec(compile(ast.Module([choice], []), "ops.py", "exec"), namespace)
    chosen: Callable[..., bool] = namespace[choice.name]
    return chosen


def test_the_choice_is_the_librarys() -> None:
    torch, bitsandbytes = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    if bitsandbytes.__version__ != READ_IN["bitsandbytes"]:
        pytest.skip("another bitsandbytes than was read")
    chosen, draw = librarys_choice(torch), random.Random(0)
    rows = json.loads((DATA / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    counted = [row for row in rows if row.get("multiprocessors")]
    chips = sorted({Chip(*map(int, row["compute_capability"].split(".")), row["multiprocessors"]) for row in counted})
    assert len(chips) > 50
    for _ in range(20_000):
        n, k = (64 * draw.choice((draw.randint(1, 40), draw.randint(1, 450))) for _ in "nk")
        k = draw.choice((k, n, 3 * n, n // 128 * 64 or 64))
        chip, dtype, tokens = draw.choice(chips), draw.choice(("bf16", "fp16", "fp32")), draw.choice((*range(9, 600), 1024, 1536))
        most = chip.most_tokens(n=n, k=k, dtype=dtype, blocksize=64)
        fused = chosen(chip, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype], tokens, n, k)
        assert (tokens <= most) == fused, (n, k, chip, dtype, tokens)
    assert chips[0].most_tokens(n=4096, k=96, dtype="fp16", blocksize=64) == 0, "rows that are no whole blocks are dequantized"


@pytest.mark.parametrize("seq_len", [100, 512, 513])
def test_both_engines_fuse_the_same_products(seq_len: int) -> None:
    """384 tokens are below the limits of all but the small layers of gemma-3-270m on an A100, 1,539 above all."""
    pytest.importorskip("bitsandbytes")
    job = {**JOB, "seq_len": seq_len, "script": Script(outputs_outlive_step=True)}
    ours, traced = (estimate("gemma-3-270m", engine=engine, **job).peaks for engine in ("analytic", "trace"))
    assert ours is not None
    assert traced is not None
    assert ours.reserved == pytest.approx(traced.reserved, abs=2 * 2**20)
    assert ours.by_phase["forward"] == pytest.approx(traced.by_phase["forward"], rel=1e-4)


def test_older_releases_dequantize_every_weight() -> None:
    """gemma-3-270m, 3 x 128 tokens: without whole weights a product is cut from a block of logits; the next take a new one."""
    today, older = (
        estimate("gemma-3-270m", script=Script(outputs_outlive_step=True, bitsandbytes=version), **JOB).peaks
        for version in (None, "0.49.2")
    )
    assert today is not None
    assert older is not None
    assert today.reserved is not None
    assert older.reserved is not None
    assert today.reserved - older.reserved > 300 * 2**20


@pytest.mark.quick
def test_cards_of_one_generation_differ_by_their_multiprocessors() -> None:
    """A weight (2048, 640) has 32 blocks: with 108 multiprocessors less than a third of a wave, with an A30's 56 more."""
    a100, a30 = (Chip(8, 0, n).most_tokens(n=2048, k=640, dtype="bf16", blocksize=64) for n in (108, 56))
    assert (a100, a30) == (1536, 512)


def test_a_grid_knows_the_limits() -> None:
    pytest.importorskip("numpy")
    prepared = estimate("gemma-3-270m", gpu=["a100-40gb", "a30"], **JOB)
    lengths = [64, 300, 340, 1024, 1536, 1537, 2048]
    at = prepared.at(batch_size=1, seq_len=lengths)
    for place, seq_len in enumerate(lengths):
        single = estimate("gemma-3-270m", gpu=["a100-40gb", "a30"], **{**JOB, "batch_size": 1, "seq_len": seq_len})
        assert {phase: values[place] for phase, values in at.requested_by_phase.items()} == dict(single.peaks.requested)  # type: ignore[union-attr]

"""One rank of FSDP2 in a trace, against torch's own allocator: rehearsals of the same step, recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed

import peftplan
from tools.rank_grid import LLAMA
from tools.rank_jobs import PHASES, options, rows

ROWS = {row["name"]: row for row in rows() if row["strategy"] == "fsdp2"}
SHOWN = (
    "fsdp2 lora 2",
    'fsdp2 full 8 optim="adamw_torch"',
    'fsdp2 full 8 config={"tie_word_embeddings": true}',
    'fsdp2 full 8 fsdp={"reshard_after_forward": false}',
    "fsdp2 full 8 accumulation=3",
    'fsdp2 full 8 fsdp={"offload_params": "cpu"}',
    'fsdp2 lora 8 fsdp={"cpu_ram_efficient_loading": true}',
    "fsdp2 qlora 4",
    'fsdp2 qlora 4 quant_storage="uint8"',
    'fsdp2 lora 8 parallel={"dp_replicate_size": 2, "dp_shard_size": 4}',
    'fsdp2 full 8 policy={"param_dtype": "bfloat16", "reduce_dtype": "float32", "output_dtype": "bfloat16"}',
)
"""One job of each thing that changes what a rank holds."""


@pytest.mark.parametrize("name", SHOWN)
def test_a_rehearsed_rank(name: str) -> None:
    """Allocated bytes of each phase within 0.05 %, reserved bytes to the byte."""
    row = ROWS[name]
    peaks = peftplan.estimate(**options(row), gpu="h200", engine="trace").peaks
    assert peaks is not None
    forward = max(peaks.by_phase["forward"], peaks.by_phase["step"])  # a rehearsal's begins with what the step leaves
    for phase in PHASES:
        bytes_ = forward if phase == "forward" else peaks.by_phase[phase]
        assert bytes_ == pytest.approx(row["peak_by_phase"][phase], rel=5e-4), phase
    assert peaks.reserved == row["peak_reserved"]
    assert not torch.distributed.is_initialized()


def test_an_adapter_is_whole_until_all_is_sharded() -> None:
    """The load phase of LoRA to the byte: the last trained tensor stays whole while the rest is sharded."""
    row = ROWS["fsdp2 lora 2"]
    peaks = peftplan.estimate(**options(row), gpu="h200", engine="trace").peaks
    assert peaks is not None
    assert peaks.by_phase["load"] == row["peak_by_phase"]["load"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_depth_is_extended(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight layers from three and four are eight layers that ran."""
    from peftplan.trace import engine

    model = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "head_dim": 8, "vocab_size": 1000, "num_hidden_layers": 8}
    job: dict[str, Any] = {"method": method, "gpus": 4, "strategy": "fsdp2", "seq_len": 64, "engine": "trace", "record": True}
    deep = peftplan.estimate(model, **job).peaks
    monkeypatch.setattr(engine, "repeating_stacks", lambda *args, **kwargs: ())
    full = peftplan.estimate(model, **job).peaks
    assert deep is not None
    assert full is not None
    assert deep.recording is not None
    assert deep.recording.traced.depths == (3, 4)
    assert (deep.by_phase, deep.reserved) == (full.by_phase, full.reserved)


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        ({"strategy": "zero2"}, "not ZeRO-2 over 4 GPUs"),
        ({"strategy": "ddp"}, "not DDP over 4 GPUs"),
        ({"accelerate": "1.13"}, "not its units under accelerate 1.13"),
        ({"optim": "adamw_bnb_8bit"}, "not its adamw_bnb_8bit"),
        ({"trainer": "automodel"}, "not its units under NeMo"),
        ({"quant": "int8"}, "not its shards in int8"),
    ],
)
def test_refused_in_one_line(refused: dict[str, Any], why: str) -> None:
    job = {"method": "lora", "gpus": 4, "strategy": "fsdp2", **refused}
    with pytest.raises(peftplan.RefusedError, match=f"engine: trace follows one GPU and FSDP2, {why}.*; accepted: analytic"):
        peftplan.estimate("llama-3.2-1b", engine="trace", **job)

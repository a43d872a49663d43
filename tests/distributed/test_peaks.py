"""Peaks of one rank against torch's own allocator: rehearsals of the same step, recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.analytic.of_ranks import OfRanks
from tools.rank_jobs import PHASES, compared, rows

KEPT = json.loads((Path(__file__).parent / "nine_cells.json").read_text(encoding="utf-8"))
CELLS = KEPT["rows"]


@pytest.mark.parametrize("cell", CELLS, ids=[f"{method}-{world}" for method, world, *_ in CELLS])
def test_a_rank_of_an_8b_model(cell: list[Any]) -> None:
    """What tensors request at the peak of each phase within 0.1 %, and so what is allocated, but for one cell.

    The allocator hands out large blocks whole, with tails of less than 1 MiB each. Which of them have one depends on the free
    blocks that loading left, and the cells made their shards before the run began. So reserved bytes are compared within 1 %,
    and those of QLoRA not at all. QLoRA's step over 8 ranks, 0.9 GB, has tails of 2,095,104 B here and of 786,432 B there, as
    embedding or head alone: accelerate leaves those that are counted here (`test_a_cell_that_was_rehearsed_again`). Under
    Trainer, the same nine jobs are rows of `ROWS`: allocated within 0.03 % in each phase, reserved equal.
    """
    method, world, loaded, *by_phase, reserved = cell
    options: dict[str, Any] = {} if method == "full" else {"r": 16}
    if method == "qlora":
        options |= {"quant_storage": "bf16", "kbit_prepare": False}
    result = peftplan.estimate("llama-3.1-8b", method=method, gpus=world, strategy="fsdp2", **options)
    peaks = result.peaks
    assert peaks is not None
    weights = result.static.bytes(("weights", "adapter_weights", "quant_state", "buffers"))
    assert weights == pytest.approx(loaded, rel=1e-3)
    assert isinstance(peaks, OfRanks)
    for phase, measured in zip(("forward", "backward", "step"), by_phase, strict=True):
        assert peaks.requested[phase] == pytest.approx(measured, rel=1e-3), phase
        tails = 1_308_672 if (method, world, phase) == ("qlora", 8, "step") else 0
        assert peaks.by_phase[phase] - tails == pytest.approx(measured, rel=1e-3 if method == "qlora" else 2e-4), phase
    if method != "qlora":
        assert peaks.reserved == pytest.approx(reserved, rel=1e-2)


def test_a_cell_that_was_rehearsed_again() -> None:
    """QLoRA over 8 ranks, sharded by accelerate: within 0.002 % in each phase, reserved equal. Its first row requests the same
    bytes in fewer tails."""
    again = KEPT["again"]
    method, world, loaded, *by_phase, reserved = again["row"]
    first = next(cell for cell in CELLS if cell[:2] == [method, world])
    assert loaded - again["tails"] == again["requested_after_load"] == first[2] - 786_432
    options: dict[str, Any] = {"r": 16, "quant_storage": "bf16", "kbit_prepare": False, "gpu": "a100-80gb"}
    peaks = peftplan.estimate("llama-3.1-8b", method=method, gpus=world, strategy="fsdp2", **options).peaks
    assert peaks is not None
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=2e-5)
    assert peaks.reserved == reserved


OPEN = (
    'fsdp1 full 64 fsdp={"backward_prefetch": "pre"}',
    'fsdp1 full 4 config={"hidden_size": 1000',
    'device-map qlora 3 model="mistral-7b-v0.3"',
)
"""A middle GPU of 1.2 GB on which tails of blocks, 1.6 MB, are missing, -0.14 %. Steps of 0.25 and 0.6 GB, -0.3 and +0.12 %: the
tail of one block, 0.7 MB, where the allocator puts a state of AdamW."""
OPEN_RESERVED = (
    'zero3 full 2 parallel={"sp_size": 2} seq_len=2048 accumulation=2',
    'device-map qlora 3 model="mistral-7b-v0.3" layers=24',
    'device-map qlora 2 model="qwen2.5-7b" layers=16 checkpointing=false',
)
"""Two micro batches of rows that ranks share, with a bucket of 500,000,000 elements in fp32: 247,463,936 of 17.3 GB are missing,
-1.4 %, in one segment. Each phase is within 0.001 %. GPUs of 1.9 and 4.7 GB of a `device_map` over a base in 4 bits: -22 and +52
MiB, -1.2 and +1.2 %; loading leaves other blocks free."""
EQUAL = ("tp", "fsdp1 lora", "fsdp1 qlora")
"""Jobs whose reserved bytes are equal: each module of an adapter is a unit of FSDP1's."""
ROWS = [row for row in rows() if "error" not in row]


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_a_rehearsed_job(row: dict[str, Any]) -> None:
    """Allocated bytes of each phase within 0.1 %, reserved bytes within 0.5 %, or equal, or not stated. The jobs named above are
    beyond that.
    """
    shares = compared(row)
    assert shares is not None
    for phase in PHASES:
        assert abs(shares[phase]) <= (0.003 if row["name"].startswith(OPEN) else 0.001), (phase, shares)
    most = 0.015 if row["name"] in OPEN_RESERVED else 0.005
    assert abs(shares.get("reserved", 0.0)) <= (0.0 if row["name"].startswith(EQUAL) else most), shares

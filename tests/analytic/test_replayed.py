"""An estimate as torch's allocator counts it: tails of blocks, in lines; loading tensor by tensor, as the trace engine loads."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.analytic.instant import InstantPeaks
from peftplan.ledger import Ledger, Line
from peftplan.results.peaks import PHASES, Peaks
from peftplan.units import MIB, format_bytes

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def peaks(**options: Any) -> Peaks:
    stated = peftplan.estimate(SMALL, **{"seq_len": 128, **options}).peaks
    assert stated is not None
    return stated


def test_a_tail_is_a_line_by_hand() -> None:
    ledger = Ledger((Line("weight", "weights", "bf16", (1024, 1024), 1, "hand"),))
    assert ledger.with_tails(2 * MIB) is ledger
    assert ledger.with_tails(3 * MIB).bytes(["temporaries"]) == MIB


def test_lines_add_up_to_the_peaks() -> None:
    stated = peaks(method="lora")
    assert {phase: stated.ledgers[phase].bytes() for phase in PHASES} == stated.by_phase
    assert isinstance(stated, InstantPeaks)
    assert all(stated.by_phase[phase] >= stated.requested[phase] for phase in PHASES)


JOB: dict[str, Any] = {"method": "qlora", "seq_len": 1000}
"""A job with tails at its peak."""


def test_one_job_has_one_peak(capsys: pytest.CaptureFixture[str]) -> None:
    """Python's, JSON's, the table's, that of the sizes asked for again, and the advice's first row, with a card and without."""
    from peftplan.report import advice, render

    estimate = peftplan.estimate(SMALL, **JOB)
    assert estimate.peaks is not None
    peak = estimate.peaks.allocated
    assert isinstance(estimate.peaks, InstantPeaks)
    assert peak > max(estimate.peaks.requested.values())  # there are tails
    on_card = peftplan.estimate(SMALL, **JOB, gpu="0.5GiB")
    for other in (estimate, on_card, peftplan.estimate(SMALL, **JOB, gpu=["a100-80gb", "t4"]), estimate.at(seq_len=1000)):
        assert other.peaks.allocated == other.to_dict()["memory"]["peak_allocated"] == peak
        render.estimate(other, fmt="markdown", verbose=False)
        assert f"{peak:,}" in capsys.readouterr().out
        render.estimate(other, fmt="table", verbose=True)
        assert f"{peak:,}" in capsys.readouterr().out
        assert f"{peak:,}" in peftplan.explain(other)
    on_card = peftplan.estimate(SMALL, **JOB, gpu="0.5GiB", context=0)
    (advised,) = on_card.advice.values()
    replayed = [change for change in advised.changes if change.peak_allocated is not None]
    assert replayed
    assert all((change.peak_allocated or 0) + change.saving_bytes == peak for change in replayed)
    assert advice.rows(on_card, "0.5GiB", advised.changes)[0][1] == format_bytes(peak)


def test_an_array_of_sizes_says_that_tails_are_missing() -> None:
    np = pytest.importorskip("numpy")
    estimate = peftplan.estimate(SMALL, **JOB)
    grid = estimate.at(seq_len=np.array([1000]))
    assert not hasattr(grid, "peak_allocated")
    assert int(grid.allocated_bytes[0]) == estimate.at(seq_len=1000).peaks.allocated
    assert isinstance(estimate.peaks, InstantPeaks)
    assert int(grid.peak_requested_bytes[0]) == max(estimate.peaks.requested.values())


def test_json_is_of_the_replay() -> None:
    estimate = peftplan.estimate(SMALL, method="lora", seq_len=128, gpu="a100-80gb")
    memory, stated = estimate.to_dict()["memory"], estimate.peaks
    assert stated is not None
    assert (memory["peak_by_phase"], memory["peak_reserved"]) == (stated.by_phase, stated.reserved)
    assert sum(line["bytes"] for line in memory["lines"]) == memory["peak_allocated"]
    (verdict,) = estimate.gpus
    assert verdict.needed_bytes == stated.reserved + verdict.context_bytes  # type: ignore[operator]


def test_weights_of_five_mebibytes_by_hand() -> None:
    """Three of 5.5 MiB fill a segment of 20 MiB up to 3.5 MiB, which stay free; 19.5 MiB in one leave a tail of half a MiB."""
    from peftplan.allocator.core import Allocator

    allocator = Allocator()
    for number in range(3):
        allocator.malloc(number, 11 * MIB // 2)
    assert (allocator.allocated, allocator.reserved) == (33 * MIB // 2, 20 * MIB)
    other = Allocator()
    other.malloc(0, 39 * MIB // 2)
    assert other.allocated == 20 * MIB


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full", "dtype": "fp32"},
        {"method": "lora", "dtype": "bf16"},
        {"method": "qlora"},
        {"method": "qlora", "double_quant": False, "kbit_prepare": False},
        {"method": "lora", "quant": "int8"},
        {"method": "qlora", "trainer": "trl"},
    ],
    ids=["full", "lora", "qlora", "nf4", "int8", "trl"],
)
def test_loading_is_the_traces_to_the_byte(options: dict[str, Any]) -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    assert peaks(**options).by_phase["load"] == peaks(engine="trace", **options).by_phase["load"]

"""A trace kept whole: its series reaches the peaks that the trace states, and its saved log replays to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peftplan
from peftplan.allocator import eventlog
from peftplan.allocator.config import AllocatorConfig
from peftplan.allocator.replay import replay
from peftplan.job.script import Script
from peftplan.planning.replayed import replay_file
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks
from peftplan.results.series import Series
from peftplan.trace.traced import _unknown
from tests.job.test_script import QLORA, RUN, WIDE

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}
told: list[tuple[str, float]] = []


@pytest.fixture(scope="module")
def traced() -> Estimate:
    return peftplan.estimate(
        TINY,
        method="lora",
        batch_size=2,
        seq_len=64,
        gradient_accumulation_steps=2,
        engine="trace",
        record=True,
        progress=lambda what, share: told.append((what, share)),
    )


@pytest.fixture(scope="module")
def series(traced: Estimate) -> Series:
    assert traced.peaks is not None
    assert traced.peaks.recording is not None
    return traced.peaks.recording.series()


def peaks_of(traced: Estimate) -> Peaks:
    assert traced.peaks is not None
    return traced.peaks


def test_a_series_reaches_every_peak(traced: Estimate, series: Series) -> None:
    total = series.total
    for phase in ("forward", "backward", "step"):
        spans = [span for span in series.phases if span.phase == phase]
        inside = [n for time, n in zip(series.times, total, strict=True) if any(s.start <= time <= s.end for s in spans)]
        assert max(inside) == peaks_of(traced).by_phase[phase]
    assert series.reserved is not None
    assert max(series.reserved) <= (peaks_of(traced).reserved or 0)


def test_categories_at_the_peak_are_those_of_the_ledger(traced: Estimate, series: Series) -> None:
    at = max(range(len(series.times)), key=series.total.__getitem__)
    at_peak = {category: levels[at] for category, levels in series.by_category.items() if levels[at]}
    assert at_peak == {category: n for category, n in traced.ledger.by_category().items() if n}


def test_the_phases_are_those_of_two_micro_batches(series: Series) -> None:
    assert [span.phase for span in series.phases] == ["forward", "backward", "forward", "backward", "step"]
    assert series.phases[0].start == 0
    assert all(left.end == right.start for left, right in zip(series.phases, series.phases[1:], strict=False))


def test_the_largest_groups_are_named(traced: Estimate, series: Series) -> None:
    assert series.largest is not None
    at = max(range(len(series.times)), key=series.total.__getitem__)
    largest = [line.bytes() for line in traced.ledger]
    assert [group.bytes for group in series.largest[at]] == sorted(largest, reverse=True)[:6]


def test_the_saved_log_replays_to_the_stated_peaks(traced: Estimate, tmp_path: Path) -> None:
    recording = peaks_of(traced).recording
    assert recording is not None
    recording.save(str(tmp_path / "log.json"), title="tiny")
    log = eventlog.load(tmp_path / "log.json")
    again = replay(log.events)
    assert again.peaks.reserved == peaks_of(traced).reserved
    for phase, allocated in peaks_of(traced).by_phase.items():
        assert again.by_phase[phase].allocated == allocated
    named = [event for event in log.events if event.kind == "alloc" and event.category == "adapter_weights"]
    # rank 8 on q, k, v, o, gate, up, down of two layers: an A and a B each
    assert len({event.name for event in named}) == 2 * 7 * 2
    enough, too_little = (replay_file(tmp_path / "log.json", capacity_bytes=again.peaks.reserved - less) for less in (0, 1))
    assert enough.failed is None
    assert too_little.failed is not None
    assert too_little.failed.op


@pytest.mark.parametrize(
    ("options", "script"),
    [
        ({}, Script(empties_cache=True)),
        (QLORA, Script(torch="2.12.1")),
    ],
    ids=["emptied-cache", "older-torch"],
)
def test_a_recording_is_replayed_as_the_trace_was(options: dict[str, Any], script: Script, tmp_path: Path) -> None:
    """Of a model for which either moves what is reserved (tests/job/test_script.py)."""
    stated = peaks_of(peftplan.estimate(WIDE, engine="trace", record=True, script=script, **{**RUN, **options}))
    assert stated.recording is not None
    series = stated.recording.series()
    assert max(series.total) == stated.allocated
    assert max(series.reserved or ()) == stated.reserved
    stated.recording.save(str(tmp_path / "log.json"), title="wide")
    under = AllocatorConfig(ties_by_address=script.ties_by_address)
    assert replay(eventlog.load(tmp_path / "log.json").events, under).peaks.reserved == stated.reserved


def test_progress_goes_up_and_names_the_phases(traced: Estimate) -> None:
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] < 1
    assert {what for what, _ in told} >= {"forward", "backward", "step"}


def test_nothing_is_kept_unless_asked_for() -> None:
    plain = peftplan.estimate(TINY, method="lora", batch_size=1, seq_len=8, engine="trace")
    assert peaks_of(plain).recording is None


def test_what_cannot_be_followed_is_listed_by_family() -> None:
    unknown = {"model.layers.0.mlp.gate": 2, "model.layers.1.mlp.gate": 2, "": 1}
    assert _unknown(unknown) == (
        "model.layers.*.mlp.gate asked for a value that a fake tensor does not have",
        "the run asked for a value that a fake tensor does not have",
    )

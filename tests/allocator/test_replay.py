"""Event logs replayed; snapshots of torch read, compared, and refused where they could run code."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path
from typing import Any, Literal

import pytest

import peftplan
from peftplan.allocator.config import parse_config
from peftplan.allocator.device import SegmentEvent
from peftplan.allocator.events import Event
from peftplan.allocator.replay import replay as replay_events
from peftplan.allocator.snapshots import compare, load_snapshot, read_trace
from peftplan.errors import InputError, RefusedError, UnknownNameError
from peftplan.units import MIB

STEP = [
    Event("alloc", 1, 12 * MIB, phase="load", op="aten.empty", module="model.embed"),
    Event("alloc", 2, 3 * MIB - 1, phase="forward", op="aten.mm"),
    Event("alloc", 3, 5 * MIB, phase="backward"),
    Event("free", 2, phase="backward"),
    Event("mark", op="end", phase="step"),
    Event("empty_cache", phase="step"),
]


def test_replay_by_phase_and_over_time() -> None:
    result = replay_events(STEP, timeline=True)
    # 12; + 3 in a segment of 20; + 5 in the same one; − 3; a mark; nothing whole to release
    assert result.timeline is not None
    assert [n / MIB for n in result.timeline.allocated] == [12, 15, 20, 17, 17, 17]
    assert [n / MIB for n in result.timeline.reserved] == [12, 32, 32, 32, 32, 32]
    assert result.timeline.requested[1] == 15 * MIB - 1
    assert {phase: (p.allocated / MIB, p.allocated_at) for phase, p in result.by_phase.items()} == {
        "load": (12, 0),
        "forward": (15, 1),
        "backward": (20, 2),
        "step": (17, 3),
    }
    assert (result.peaks.reserved, result.peaks.reserved_at) == (32 * MIB, 1)
    assert (result.requested, result.oom) == (17 * MIB, None)
    assert result.segment_events == (SegmentEvent(0, "segment_alloc", 12 * MIB), SegmentEvent(1, "segment_alloc", 20 * MIB))


def test_replay_stops_where_memory_runs_out() -> None:
    result = replay_events(STEP, capacity_bytes=31 * MIB, timeline=True)
    assert result.oom is not None
    assert (result.oom.event, result.oom.id, result.oom.missing) == (1, 2, 1 * MIB)
    assert result.timeline is not None
    assert len(result.timeline.allocated) == 2
    assert list(result.by_phase) == ["load", "forward"]


BASE = 0x7F0000000000


def entry(action: str, address: int, size: float, **more: Any) -> dict[str, Any]:
    return {"action": action, "addr": BASE + address, "size": int(size * MIB), "stream": 0, "frames": [], "time_us": 1, **more}


def recorded() -> dict[str, Any]:
    """12 and 3 MiB; the 12 freed and its segment released by empty_cache; 4 more from the rest of the 20."""
    frames = [{"filename": "model.py", "line": 3, "name": "forward"}]
    trace = [
        entry("segment_alloc", 0, 12),
        entry("alloc", 0, 12, frames=frames),
        entry("segment_alloc", 1 << 30, 20),
        entry("alloc", 1 << 30, 3),
        entry("free_requested", 0, 12),
        entry("free_completed", 0, 12),
        entry("segment_free", 0, 12),
        entry("alloc", (1 << 30) + 3 * MIB, 4),
        {"action": "oom", "device_free": 5, "size": 99 * MIB, "stream": 0, "frames": []},
        entry("snapshot", 0, 0),
    ]
    blocks = [
        {"address": BASE + (1 << 30) + at * MIB, "size": size * MIB, "requested_size": size * MIB, "state": state}
        for at, size, state in ((0, 3, "active_allocated"), (3, 4, "active_allocated"), (7, 13, "inactive"))
    ]
    segment = {"device": 0, "address": BASE + (1 << 30), "total_size": 20 * MIB, "stream": 0, "blocks": blocks}
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "max_split_size": 64 * MIB}
    return {"segments": [segment], "device_traces": [trace, []], "allocator_settings": settings, "external_annotations": []}


def dump(snapshot: object, path: Path) -> Path:
    path.write_bytes(pickle.dumps(snapshot))
    return path


def test_a_snapshot_becomes_events(tmp_path: Path) -> None:
    trace = read_trace(dump(recorded(), tmp_path / "s.pickle"))
    assert trace.config == parse_config("max_split_size_mb:64")
    assert trace.events == (
        Event("alloc", 1, 12 * MIB, op="forward"),
        Event("alloc", 2, 3 * MIB),
        Event("free", 1),
        Event("empty_cache"),
        Event("alloc", 3, 4 * MIB),
        Event("mark", nbytes=99 * MIB, op="oom"),
        Event("mark", op="snapshot"),
    )
    assert (trace.untraced, trace.reserved) == (0, 20 * MIB)


def test_a_replay_agrees_with_its_record(tmp_path: Path) -> None:
    result = compare(read_trace(dump(recorded(), tmp_path / "s.pickle")))
    assert result.first_difference is None
    assert (result.recorded_peak_reserved, result.replayed.peaks.reserved) == (32 * MIB, 32 * MIB)
    assert (result.recorded_reserved, result.replayed.reserved) == (20 * MIB, 20 * MIB)


RECORDED = Path(__file__).parent / "data" / "qlora_step.pickle.gz"
"""Two QLoRA steps of a small Llama, recorded by torch 2.13's own allocator under `peftplan rehearse` (`peftplan measure CONFIG
--method qlora --batch-size 4 --seq-len 512 --steps 1 --snapshot FILE`), without stack frames."""
RECORDED_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "tie_word_embeddings": False,
}


def test_a_replay_reserves_what_torchs_allocator_did(tmp_path: Path) -> None:
    """3,946 entries: every segment when and as large as torch took it, to the last byte."""
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(gzip.decompress(RECORDED.read_bytes()))
    trace = read_trace(path)
    comparison = compare(trace)
    assert trace.untraced == 0
    assert comparison.first_difference is None
    assert comparison.replayed.peaks.reserved == comparison.recorded_peak_reserved == 497_025_024


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_both_engines_reserve_what_torchs_allocator_did(engine: Literal["analytic", "trace"]) -> None:
    for module in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(module)
    options = {"method": "qlora", "batch_size": 4, "seq_len": 512, "gpu": "a100-80gb"}
    peaks = peftplan.estimate(RECORDED_CONFIG, engine=engine, **options).peaks  # type: ignore[arg-type]
    assert peaks is not None
    assert peaks.reserved == 497_025_024


def test_a_replay_that_differs_says_where(tmp_path: Path) -> None:
    snapshot = recorded()
    snapshot["device_traces"][0][2]["size"] = 22 * MIB
    result = compare(read_trace(dump(snapshot, tmp_path / "s.pickle")))
    assert result.first_difference == (SegmentEvent(1, "segment_alloc", 22 * MIB), SegmentEvent(1, "segment_alloc", 20 * MIB))


def test_what_was_there_before_the_recording_is_counted(tmp_path: Path) -> None:
    snapshot = recorded()
    del snapshot["device_traces"][0][:4]  # the free of 12 and the live 3 have no allocation any more
    assert read_trace(dump(snapshot, tmp_path / "s.pickle")).untraced == 2


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_malicious_snapshot_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    snapshot = {**recorded(), "external_annotations": [Malicious(target)]}
    path = dump(snapshot, tmp_path / "s.pickle")
    with pytest.raises(RefusedError, match="mkdir"):
        load_snapshot(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())  # the witness: it would have
    assert target.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({"segments": []})])
def test_other_files_are_no_snapshots(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.pickle"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_snapshot(path)


def test_what_is_not_modelled_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.pickle"
    for change, error in (
        ({"segment_pool_id": (0, 1)}, RefusedError),
        ({"action": "segment_teleport"}, UnknownNameError),
        ({"size": None}, InputError),
    ):
        snapshot = recorded()
        snapshot["device_traces"][0][0].update(change)
        with pytest.raises(error):
            read_trace(dump(snapshot, path))
    snapshot = recorded()
    del snapshot["device_traces"][0][5:7]  # the free is gone, and its address comes again
    snapshot["device_traces"][0].append(entry("alloc", 0, 12))
    with pytest.raises(RefusedError, match="its recording is incomplete"):
        read_trace(dump(snapshot, path))
    with pytest.raises(InputError, match="2 devices"):
        read_trace(dump(recorded(), path), device=2)

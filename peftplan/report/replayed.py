"""A replay as text: peaks by phase, what fragmentation cost, and where memory ran out."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from peftplan.report.tabular import Column, printable
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.allocator.stats import Peaks
    from peftplan.planning.replayed import Replayed

COLUMNS = (
    Column("peak of"),
    Column("allocated", right=True),
    Column("requested", right=True),
    Column("reserved", right=True),
    Column("", right=True),
)
SCHEMA_VERSION = 1


def facts(replayed: Replayed) -> list[dict[str, object]]:
    """One record per phase and one for the whole run, bytes as integers."""
    return [{"phase": phase, **_bytes(peaks)} for phase, peaks in _windows(replayed).items()]


def document(replayed: Replayed) -> dict[str, object]:
    """The JSON of a replay."""
    result, failed = replayed.result, replayed.failed
    oom = None
    if result.oom is not None and failed is not None:
        labels = {key: getattr(failed, key) for key in ("phase", "op", "module", "category", "name")}
        oom = {**asdict(result.oom), **labels, "lost_to_fragmentation": result.oom.for_fragmentation}
    return {
        "schema_version": SCHEMA_VERSION,
        "source": replayed.source,
        "title": replayed.title,
        "events": replayed.num_events,
        "capacity": replayed.capacity_bytes,
        "peaks": facts(replayed),
        "fragmentation": {"free_at_peak": replayed.free_at_peak, "rounded_at_peak": replayed.rounded_at_peak},
        "at_end": {"allocated": result.allocated, "requested": result.requested, "reserved": result.reserved},
        "recorded_peak_reserved": replayed.recorded_peak_reserved,
        "untraced": replayed.untraced,
        "out_of_memory": oom,
    }


def cells(replayed: Replayed) -> list[tuple[str, ...]]:
    """The rows of the table: exact bytes, and reserved bytes as people say them."""
    return [
        (printable(phase), f"{p.allocated:,}", f"{p.requested:,}", f"{p.reserved:,}", format_bytes(p.reserved))
        for phase, p in _windows(replayed).items()
    ]


def heading(replayed: Replayed) -> str:
    """`event log · llama-2-7b · qlora r=8 · events: 67,000`."""
    return " · ".join(filter(None, (replayed.source, printable(replayed.title), f"events: {replayed.num_events:,}")))


def remarks(replayed: Replayed) -> list[str]:
    """What the table does not say, a sentence each."""
    peaks = replayed.result.peaks
    lines = [
        f"at the highest allocated bytes: {format_bytes(replayed.free_at_peak)} reserved and free (fragmentation), "
        f"{format_bytes(replayed.rounded_at_peak)} lost to rounding"
    ]
    if replayed.recorded_peak_reserved is not None:
        more = peaks.reserved - replayed.recorded_peak_reserved
        lines.append(f"recorded: {replayed.recorded_peak_reserved:,} bytes reserved at the peak, the replay {more:+,}")
    if replayed.untraced:
        lines.append(f"incomplete: blocks that were allocated before the recording began: {replayed.untraced:,}")
    return [*lines, *_out_of_memory(replayed)]


def _out_of_memory(replayed: Replayed) -> list[str]:
    oom, failed = replayed.result.oom, replayed.failed
    if oom is None or failed is None:
        return [] if replayed.capacity_bytes is None else [f"fits in {format_bytes(replayed.capacity_bytes)}"]
    where = f" in {printable(failed.phase)}" if failed.phase else ""
    who = " in ".join(filter(None, (printable(failed.op), printable(failed.module)))) or "an operation without a name"
    what = " ".join(filter(None, (printable(failed.category), printable(failed.name))))
    lost = "enough if it were one piece: lost to fragmentation" if oom.for_fragmentation else "too little even as one piece"
    return [
        f"out of memory{where}, at event {oom.event:,}: {who} requested {oom.requested:,} bytes" + (f" ({what})" if what else ""),
        f"missing: {format_bytes(oom.missing)}; {format_bytes(oom.allocated)} allocated, {format_bytes(oom.reserved)} reserved, "
        f"{format_bytes(oom.fragmented)} free in pieces of at most {format_bytes(oom.largest_free)}; {lost}",
    ]


def _windows(replayed: Replayed) -> dict[str, Peaks]:
    by_phase = {phase: peaks for phase, peaks in replayed.result.by_phase.items() if phase}
    return {**by_phase, "whole run": replayed.result.peaks}


def _bytes(peaks: Peaks) -> dict[str, int]:
    return {"allocated": peaks.allocated, "requested": peaks.requested, "reserved": peaks.reserved}

"""A replay as text: peaks by phase, what fragmentation cost, and where memory ran out."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peftplan.report.tabular import Column, printable
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.memory.allocator import Peaks
    from peftplan.trace.replayed import Replayed

COLUMNS = (
    Column("peak of"),
    Column("allocated", right=True),
    Column("requested", right=True),
    Column("reserved", right=True),
    Column("", right=True),
)
SCHEMA_VERSION = 1


def facts(found: Replayed) -> list[dict[str, Any]]:
    """One record per phase and one for the whole run, bytes as integers."""
    return [{"phase": phase, **_bytes(peaks)} for phase, peaks in _windows(found).items()]


def document(found: Replayed) -> dict[str, Any]:
    """The JSON of a replay."""
    result, failed = found.result, found.failed
    oom = None
    if result.oom is not None and failed is not None:
        labels = {key: getattr(failed, key) for key in ("phase", "op", "module", "category", "name")}
        oom = {**asdict(result.oom), **labels, "lost_to_fragmentation": result.oom.for_fragmentation}
    return {
        "schema_version": SCHEMA_VERSION,
        "source": found.source,
        "title": found.title,
        "events": found.num_events,
        "capacity": found.capacity_bytes,
        "peaks": facts(found),
        "fragmentation": {"free_at_peak": found.free_at_peak, "rounded_at_peak": found.rounded_at_peak},
        "at_end": {"allocated": result.allocated, "requested": result.requested, "reserved": result.reserved},
        "recorded_peak_reserved": found.recorded_peak_reserved,
        "untraced": found.untraced,
        "out_of_memory": oom,
    }


def cells(found: Replayed) -> list[tuple[str, ...]]:
    """The rows of the table: exact bytes, and reserved bytes as people say them."""
    return [
        (printable(phase), f"{p.allocated:,}", f"{p.requested:,}", f"{p.reserved:,}", format_bytes(p.reserved))
        for phase, p in _windows(found).items()
    ]


def heading(found: Replayed) -> str:
    """`event log · llama-2-7b · qlora r=8 · events: 67,000`."""
    return " · ".join(filter(None, (found.source, printable(found.title), f"events: {found.num_events:,}")))


def remarks(found: Replayed) -> list[str]:
    """What the table does not say, a sentence each."""
    peaks = found.result.peaks
    said = [
        f"at the highest allocated bytes: {format_bytes(found.free_at_peak)} reserved and free (fragmentation), "
        f"{format_bytes(found.rounded_at_peak)} lost to rounding"
    ]
    if found.recorded_peak_reserved is not None:
        more = peaks.reserved - found.recorded_peak_reserved
        said.append(f"recorded: {found.recorded_peak_reserved:,} bytes reserved at the peak, the replay {more:+,}")
    if found.untraced:
        said.append(f"incomplete: blocks that were allocated before the recording began: {found.untraced:,}")
    return [*said, *_out_of_memory(found)]


def _out_of_memory(found: Replayed) -> list[str]:
    oom, failed = found.result.oom, found.failed
    if oom is None or failed is None:
        return [] if found.capacity_bytes is None else [f"fits in {format_bytes(found.capacity_bytes)}"]
    where = f" in {printable(failed.phase)}" if failed.phase else ""
    who = " in ".join(filter(None, (printable(failed.op), printable(failed.module)))) or "an operation without a name"
    what = " ".join(filter(None, (printable(failed.category), printable(failed.name))))
    lost = "enough, were it one piece: lost to fragmentation" if oom.for_fragmentation else "too little even in one piece"
    return [
        f"out of memory{where}, at event {oom.event:,}: {who} asked for {oom.requested:,} bytes" + (f" ({what})" if what else ""),
        f"missing: {format_bytes(oom.missing)}; {format_bytes(oom.allocated)} allocated, {format_bytes(oom.reserved)} reserved, "
        f"{format_bytes(oom.fragmented)} free in pieces of at most {format_bytes(oom.largest_free)}; {lost}",
    ]


def _windows(found: Replayed) -> dict[str, Peaks]:
    named = {phase: peaks for phase, peaks in found.result.by_phase.items() if phase}
    return {**named, "whole run": found.result.peaks}


def _bytes(peaks: Peaks) -> dict[str, int]:
    return {"allocated": peaks.allocated, "requested": peaks.requested, "reserved": peaks.reserved}

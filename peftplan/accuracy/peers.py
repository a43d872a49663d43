"""What other estimators say of the same records: stored by benchmarks/peers.py, compared here by one rule for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pydantic import BaseModel, ConfigDict

from peftplan.accuracy.drift import ABOVE, BELOW, Compared, measured_figures, synthetic_verdict
from peftplan.accuracy.engines import OVERALL, RUNS
from peftplan.accuracy.records import Record

PEERS = RUNS / "peers.json"
COLUMNS = (
    "tool",
    "version",
    "rows accepted",
    "median absolute error",
    "median",
    "worst",
    "≤ 5 %",
    "fits, 1 % too small",
    "does not fit, 10 % too large",
    "cold start",
)


class Tool(BaseModel):
    """One estimator: record → figure → bytes; the reasons of its refusals with how often each came."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    cold_seconds: float | None
    stated: dict[str, dict[str, int]]
    refused: dict[str, int]


class Peers(BaseModel):
    """One run of the benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    python: str
    records: int
    tools: dict[str, Tool]


def load(path: Path = PEERS) -> Peers | None:
    """The stored run; None where there is none."""
    return Peers.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def compared(tool: Tool, records: Sequence[Record]) -> dict[str, Compared]:
    """Record → the one figure that is compared: allocated bytes where they were measured, else reserved, else the device's."""
    figure_of: dict[str, Compared] = {}
    for record in records:
        figures = tool.stated.get(record.id, {})
        for figure, measured in measured_figures(record):
            if figure in OVERALL and figure in figures:
                figure_of[record.id] = Compared(figure, measured, figures[figure])
                break
    return figure_of


def table(peers: Peers, records: Sequence[Record]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header and a row per tool."""
    return COLUMNS, [_row(name, tool, compared(tool, records), len(records)) for name, tool in peers.tools.items()]


def _row(name: str, tool: Tool, figures: dict[str, Compared], records: int) -> tuple[str, ...]:
    cold = "" if tool.cold_seconds is None else f"{tool.cold_seconds:.2f} s"
    accepted = f"{len(figures)} of {records}"
    if not figures:
        return (name, tool.version, accepted, *[""] * (len(COLUMNS) - 4), cold)
    drifts = [one.drift for one in figures.values()]
    too_small = sum(synthetic_verdict(one, share=BELOW) == "fits" for one in figures.values())
    too_large = sum(synthetic_verdict(one, share=ABOVE) == "does_not_fit" for one in figures.values())
    return (
        name,
        tool.version,
        accepted,
        f"{median(map(abs, drifts)):.1f} %",
        f"{median(drifts):+.1f} %",
        f"{max(drifts, key=abs):+.1f} %",
        f"{sum(abs(drift) <= 5 for drift in drifts) / len(drifts):.0%}",
        f"{too_small} of {len(figures)}",
        f"{too_large} of {len(figures)}",
        cold,
    )


def against(name: str, peers: Peers, other: dict[str, Compared], records: Sequence[Record]) -> tuple[str, ...]:
    """Median absolute error and worst of a tool and of `other`, on the rows that both have."""
    figures = compared(peers.tools[name], records)
    both = [record_id for record_id in figures if record_id in other]
    if not both:
        return (name, "0", "", "", "", "")
    cells = []
    for side in (figures, other):
        drifts = [side[record_id].drift for record_id in both]
        cells += [f"{median(map(abs, drifts)):.2f} %", f"{max(drifts, key=abs):+.2f} %"]
    return (name, str(len(both)), *cells)

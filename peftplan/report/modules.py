"""The modules of a model as rows, for every format."""

from __future__ import annotations

from peftplan.planning.inspection import Inspection, Row
from peftplan.report import tabular
from peftplan.report.tabular import Column


def heading(result: Inspection) -> str:
    """What the rows are about."""
    arch = result.architecture
    return f"{arch.name} · {arch.model_class} · {arch.num_parameters:,} parameters · {result.dtype}"


def columns(result: Inspection) -> tuple[Column, ...]:
    """With a pattern, how many modules match instead of how many there are."""
    return (
        Column("module"),
        Column("class", wide=True),
        Column("weight"),
        Column("copies" if result.pattern is None else "matched", right=True),
        Column("parameters", right=True),
        Column("bytes", right=True, wide=True),
    )


def cells(result: Inspection) -> list[tuple[str | int, ...]]:
    """A row per module or family."""
    return [_cells(row, matching=result.pattern is not None) for row in result.rows]


def matches(result: Inspection) -> str | None:
    """How many modules the pattern matches; None without one."""
    return None if result.pattern is None else f"{result.pattern!r} matches {sum(row.matched for row in result.rows):,} modules"


def _cells(row: Row, *, matching: bool) -> tuple[str | int, ...]:
    """`q_proj`, `Linear`, `4096×4096`, `32/32` (matched/copies). Nearly every module has a weight, so it needs no name."""
    copies = f"{row.matched or '-'}/{row.copies}" if matching else row.copies
    shapes = row.shapes.removeprefix("weight ")
    return tabular.family(row.name) or "(model)", row.kind, shapes, copies, row.num_parameters, row.bytes

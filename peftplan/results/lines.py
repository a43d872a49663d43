"""The lines of a ledger in the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from peftplan.ledger import Ledger, Line

if TYPE_CHECKING:
    from peftplan.results.documents import LineDocument


def line_documents(shown: Ledger, by_phase: Mapping[str, Ledger]) -> list[LineDocument]:
    """One record per line of the ledger that is shown. `by_phase`: a phase → the tensors at its peak."""
    bytes_by_phase: dict[tuple[object, ...], dict[str, int]] = {}
    for phase, ledger in by_phase.items():
        for line in ledger:
            of_line = bytes_by_phase.setdefault(_identity(line), {})
            of_line[phase] = of_line.get(phase, 0) + line.bytes()
    facts = [
        {
            "category": line.category,
            "name": line.name.replace("{}", "*"),
            "bytes": line.bytes(),
            "bytes_by_phase": bytes_by_phase.get(_identity(line), {}),
            "place": line.place,
            "formula": line.formula,
            "source": line.source,
        }
        for line in shown
    ]
    return cast("list[LineDocument]", facts)


def _identity(line: Line) -> tuple[object, ...]:
    """What makes a line of one phase the same as a line of another; its copies may differ."""
    return (line.category, line.name, line.dtype, line.dims, line.source)

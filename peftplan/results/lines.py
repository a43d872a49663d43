"""The lines of a ledger in the JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

from peftplan.ledger import Ledger, Line

if TYPE_CHECKING:
    from peftplan.results.documents import LineDocument


def line_documents(shown: Ledger, by_phase: Mapping[str, Ledger]) -> list[LineDocument]:
    """One record per line of the ledger that is shown. `by_phase`: a phase → the tensors at its peak."""
    last = Counter(_identity(line) for line in shown)
    bytes_by_phase: dict[tuple[object, ...], dict[str, int]] = {}
    for phase, ledger in by_phase.items():
        for number, line in _numbered(ledger):
            same = _identity(line)
            of_line = bytes_by_phase.setdefault((*same, min(number, max(last[same] - 1, 0))), {})
            of_line[phase] = of_line.get(phase, 0) + line.bytes()
    facts = [
        {
            "category": line.category,
            "name": line.name.replace("{}", "*"),
            "bytes": line.bytes(),
            "bytes_by_phase": bytes_by_phase.get((*_identity(line), number), {}),
            "place": line.place,
            "formula": line.formula,
            "source": line.source,
        }
        for number, line in _numbered(shown)
    ]
    return cast("list[LineDocument]", facts)


def _numbered(ledger: Ledger) -> Iterator[tuple[int, Line]]:
    """Each line, and how many lines before it are the same: a step counter of each of three groups of an optimizer."""
    before: Counter[tuple[object, ...]] = Counter()
    for line in ledger:
        same = _identity(line)
        yield before[same], line
        before[same] += 1


def _identity(line: Line) -> tuple[object, ...]:
    """What makes a line of one phase the same as a line of another; its copies may differ."""
    return (line.category, line.name, line.dtype, line.dims, line.source)

"""`explain`: every line of a peak as it is derived: the formula, its numbers, its source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.memory.ledger import Line

if TYPE_CHECKING:
    from peftplan.planning.result import Estimate


def explained(result: Estimate) -> str:
    """The lines of the overall peak, largest first within each category, and their sum."""
    lines = [f"bytes = copies × round512(bytes per element × dims){_named(result)}", ""]
    by_category: dict[str, list[Line]] = {}
    for line in result.ledger:
        if line.place == "device":
            by_category.setdefault(line.category, []).append(line)
    for category, found in by_category.items():
        lines.append(f"{category}: {sum(line.bytes() for line in found):,}")
        for line in sorted(found, key=Line.bytes, reverse=True):
            numbers = "" if line.numbers == line.formula else f" = {line.numbers}"
            lines.append(f"  {line.name.replace('{}', '*')}: {line.formula}{numbers} = {line.bytes():,}  [{line.source}]")
    phase = f", in {result.peaks.phase}" if result.peaks else ""
    lines += ["", f"sum{phase}: {result.ledger.bytes():,}"]
    return "\n".join(lines)


def _named(result: Estimate) -> str:
    """What the named dims stand for."""
    sizes = next((line.sizes for line in result.ledger if line.sizes), {})
    used = {dim for line in result.ledger for dim in line.dims if isinstance(dim, str)}
    named = ", ".join(f"{name} = {value}" for name, value in sizes.items() if name in used)
    return f"; {named}" if named else ""

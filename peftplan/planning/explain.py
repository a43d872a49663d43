"""`explain`: every line of a peak as it is derived: the formula, its numbers, its source."""

from __future__ import annotations

from peftplan.errors import BoundError
from peftplan.ledger import Ledger, Line
from peftplan.results.estimate import Estimate

WORDS = {"b": "sequences", "s": "tokens of a sequence", "k": "s and the virtual tokens", "n": "tokens of the loss"}


def explain(estimate: Estimate) -> str:
    """Derive every line of the overall peak: its formula, the numbers put in, its source.

    Lines are grouped by category, the largest first. Their sum is `estimate.peaks.allocated`. Without a peak the lines are those
    of what is counted, and the last line says what is not.
    """
    if not isinstance(estimate, Estimate):
        raise BoundError("estimate", estimate, "an Estimate")
    ledger, phase = estimate.ledger, estimate.peaks.phase if estimate.peaks else None
    lines = [
        "bytes = copies × round512(bytes per element × dims); round512: up to a multiple of 512, the allocator's smallest block",
        *_named(ledger),
        "",
    ]
    by_category: dict[str, list[Line]] = {}
    for line in ledger:
        if line.place == "device":
            by_category.setdefault(line.category, []).append(line)
    for category, members in by_category.items():
        lines.append(f"{category}: {sum(line.bytes() for line in members):,}")
        for line in sorted(members, key=Line.bytes, reverse=True):
            numbers = "" if line.numbers == line.formula else f" = {line.numbers}"
            lines.append(f"  {line.name.replace('{}', '*')}: {line.formula}{numbers} = {line.bytes():,}  [{line.source}]")
    what = f", in {phase}" if phase else " of what is counted"
    lines += ["", f"sum{what}: {ledger.bytes():,}"]
    if phase is None:
        lines.append(f"not counted yet, so no peak is stated: {'; '.join(estimate.not_modelled)}")
    return "\n".join(lines)


def _named(ledger: Ledger) -> list[str]:
    """What the named dims stand for."""
    sizes = next((line.sizes for line in ledger if line.sizes), {})
    used = {dim for line in ledger for dim in line.dims if isinstance(dim, str)}
    phrases = ", ".join(f"{name} = {value}{_words(name)}" for name, value in sizes.items() if name in used)
    return [phrases] if phrases else []


def _words(name: str) -> str:
    """A named size in words: `s%8` is `s`, padded, and `s/64` in how many blocks it comes."""
    base, _, multiple = name.partition("%")
    of, _, rows = name.partition("/")
    words = WORDS.get(name)
    if multiple:
        words = f"{base} rounded up to a multiple of {multiple}"
    elif rows:
        words = f"blocks of {rows} in {of}"
    return f" ({words})" if words else ""

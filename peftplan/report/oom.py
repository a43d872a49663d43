"""Why memory ran out, as text: the cause first, then what was where, then what to try."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peftplan.oom.diagnosis import Diagnosis
from peftplan.report.screen import Glyphs
from peftplan.units import format_bytes

FIGURES = {
    "requested": "requested",
    "allocated": "allocated",
    "reserved": "reserved by torch",
    "free": "free on the card",
    "capacity": "the card",
}


def lines(result: Diagnosis, marks: Glyphs) -> Iterator[str]:
    """The whole answer, a line each."""
    for number, cause in enumerate(result.causes):
        yield f"{f'{marks.fails} ' if not number else ''}{cause.name.replace('_', ' ')}: {cause.evidence}."
        yield from (f"  {marks.step} {step}" for step in cause.advice)
    if result.message is not None:
        figures = ((text, getattr(result.message, name)) for name, text in FIGURES.items())
        yield ""
        yield "The message: " + ", ".join(f"{text} {format_bytes(size)}" for text, size in figures if size is not None) + "."
        if result.message.frames:
            frame = result.message.frames[-1]
            yield f"At: {frame.file}:{frame.line} in {frame.function}" + (f": {frame.code}" if frame.code else "")
    if result.alive:
        yield ""
        yield "Alive, by the line that allocated it:"
        for alive in result.alive:
            where = f"{alive.file}:{alive.line} in {alive.function}" if alive.file else "no Python line recorded"
            yield f"  {format_bytes(alive.bytes):>12}  {alive.blocks:>6,} {'block ' if alive.blocks == 1 else 'blocks'}  {where}"
    if result.expected is not None:
        yield ""
        yield f"Expected: {result.expected.text}."


def in_markdown(texts: Iterable[str]) -> list[str]:
    """The lines as paragraphs: those that stand further in as items of a list, and no blank ones."""
    return [
        f"- {' '.join(text.split()).removeprefix('→ ').removeprefix('- ')}" if text.startswith("  ") else text
        for text in texts
        if text
    ]


def facts(result: Diagnosis) -> list[dict[str, object]]:
    """One record per cause, for CSV."""
    return [{"cause": cause.name, "evidence": cause.evidence, "advice": "; ".join(cause.advice)} for cause in result.causes]

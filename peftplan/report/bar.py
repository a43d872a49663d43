"""The peak as one bar: a shade per category, against what a card has."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from peftplan.report.screen import Colour, Glyphs, Part, Row
from peftplan.results.estimate import Estimate
from peftplan.results.verdict import Verdict
from peftplan.units import GIB, MIB

CELLS = 72
"""Columns of a bar."""
WITH_MARGIN = "allocator at most"
"""What the allocator holds besides where reserved bytes are not known, and a verdict grants a margin."""
SMALL = 0.005
"""Categories below this share of the bar are one: other."""


class Segment(NamedTuple):
    """One stretch of the bar."""

    name: str
    bytes: int


def segments(result: Estimate, card: Verdict | None) -> list[Segment]:
    """What the peak consists of; with a card also what the allocator holds besides, and the CUDA context: the bytes needed."""
    sizes = [Segment(name.replace("_", " "), nbytes) for name, nbytes in result.ledger.by_category().items() if nbytes]
    total = sum(segment.bytes for segment in sizes)
    if card is not None:
        reserve = "allocator" if result.peaks is None or result.peaks.unreserved is None else WITH_MARGIN
        sizes.append(Segment(reserve, card.needed_bytes - card.context_bytes - card.vllm_bytes - total))
        sizes.append(Segment("vLLM", card.vllm_bytes))
        sizes.append(Segment("context", card.context_bytes))
        total = card.needed_bytes
    large = [segment for segment in sizes if segment.bytes >= SMALL * total]
    rest = total - sum(segment.bytes for segment in large)
    return [*large, *([Segment("other", rest)] if rest >= unit_of(total)[0] / 100 else [])]


def bar(parts: Sequence[Segment], capacity: int | None, glyphs: Glyphs) -> Row:
    """The bar, drawn to the end of the card or of what is needed, whichever is larger; red is what the card has no room for."""
    total = sum(part.bytes for part in parts)
    scale = max(total, capacity or 0) or 1
    ends = [round(CELLS * end / scale) for end in accumulate(part.bytes for part in parts)]
    cells = "".join(
        shade * (end - start)
        for shade, start, end in zip(_shades(len(parts), glyphs), [0, *ends], ends)  # noqa: B905 -- one start more
    )
    if capacity is None:
        return (Part(cells),)
    edge = round(CELLS * capacity / scale)
    over: Colour | None = "red" if total > capacity else None
    return (Part(cells[:edge].ljust(edge, glyphs.free)), Part(glyphs.edge), Part(cells[edge:], over))


def legend(parts: Sequence[Segment], glyphs: Glyphs) -> list[str]:
    """Each stretch by its shade, name and size, in the order of the bar."""
    unit, _ = unit_of(sum(part.bytes for part in parts))
    shades = _shades(len(parts), glyphs)
    return [f"{shade} {part.name} {part.bytes / unit:.2f}" for shade, part in zip(shades, parts, strict=True)]


def unit_of(nbytes: int) -> tuple[int, str]:
    """The unit that sizes beside this one are shown in."""
    return (GIB, "GiB") if nbytes >= GIB else (MIB, "MiB")


def _shades(number: int, glyphs: Glyphs) -> str:
    """Shades in turn: neighbours differ."""
    return (glyphs.shades * number)[:number]

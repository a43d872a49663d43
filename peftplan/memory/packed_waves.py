"""A timeline's sizes, moves and waves as integers, from which the compiled module adds up its bytes and its peaks at once."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from math import prod
from typing import Protocol

from peftplan.memory.waves import Waves

try:
    from peftplan.allocator._replay import levels
except ImportError:  # not compiled, or before it knew them
    levels = None  # type: ignore[assignment]

MOST_EVENTS = 1 << 18
"""Of a timeline whose levels stay within 64 bits."""
Peaks = dict[str, tuple[int, int]]


class Timeline(Protocol):
    """What is read of a timeline (`memory.timeline`)."""

    @property
    def sizes(self) -> tuple[tuple[int, tuple[str, ...]], ...]: ...
    @property
    def size_of(self) -> tuple[int, ...]: ...
    @property
    def moves(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def waves(self) -> Waves: ...


class Packed:
    """A timeline in integers, and what it was added up to last."""

    def __init__(self, timeline: Timeline) -> None:
        self.waves, self.sizes, self.moves, self.size_of = timeline.waves, timeline.sizes, timeline.moves, timeline.size_of
        self.names = tuple({names: None for _, names in timeline.sizes})
        place = {names: at for at, names in enumerate(self.names)}
        self._latest: tuple[Mapping[str, int] | None, int, tuple[bytes, Peaks]] = None, 0, (b"", {})
        product_of = [place[names] for _, names in timeline.sizes]
        moves = [n for move in timeline.moves for n in move]
        tables = [*product_of, *timeline.size_of, *moves, *_of_waves(timeline.waves)]
        counts = [len(self.names), len(product_of), len(timeline.size_of), len(timeline.moves), *map(len, timeline.waves[:3])]
        try:
            self._structure = array("i", [*counts, len(counts) + 1 + len(tables), *tables]).tobytes()
            self._sizes = array("q", [nbytes for nbytes, _ in timeline.sizes]).tobytes()
        except OverflowError:
            self._structure = b""
        events = sum(self.waves.lengths[stretch] for *_, stretches in self.waves.windows for stretch in stretches)
        if events > MOST_EVENTS:
            self._structure = b""

    def evaluated(self, sizes: Mapping[str, int], standing: int | None) -> tuple[bytes, Peaks] | None:
        """The bytes of each kind of tensor, before rounding, and the peaks on top of `standing` bytes, as `Waves.peaks`; of any
        where it is None. None where 64 bits may not hold them."""
        of_sizes, of_standing, latest = self._latest
        if of_sizes is sizes and standing in (None, of_standing):
            return latest
        products = [prod([sizes[name] for name in names]) for names in self.names]
        try:
            values = self._structure and levels(self._structure, self._sizes, array("q", products).tobytes(), standing or 0)
        except OverflowError:
            return None
        if not values:
            return None
        by_phase: Peaks = {}
        for (phase, first, _), (best, events) in zip(self.waves.windows, values[1], strict=True):
            if phase is not None and best > by_phase.get(phase, (-1, 0))[0]:
                by_phase[phase] = best, first + events
        latest = values[0], by_phase
        self._latest = sizes, standing or 0, latest
        return latest


def _of_waves(waves: Waves) -> Iterator[int]:
    """Waves, stretches and windows, each with its lengths before it."""
    for (climb, fall), (up, down) in zip(waves.waves, waves.counts, strict=True):
        yield from (len(up), len(down), len(climb), len(climb) + len(fall))
        for pairs in (up, down):
            for move, times in pairs:
                yield from (move, times)
        yield from climb
    for stretch, length in zip(waves.stretches, waves.lengths, strict=True):
        yield from (len(stretch), length, *stretch)
    for _, _, stretches in waves.windows:
        yield from (len(stretches), *stretches)


_PACKED: OrderedDict[int, Packed | Timeline] = OrderedDict()
MOST_KEPT = 256


def added_up(timeline: Timeline, sizes: Mapping[str, int], standing: int | None = None) -> tuple[bytes, Peaks] | None:
    """`Packed.evaluated`, from the second time on that peaks are asked of a timeline: one size alone is added up sooner without.
    None before, and without the compiled module.
    """
    if levels is None:
        return None
    key = id(timeline.waves)
    kept = _PACKED.get(key)
    if kept is None or kept.waves is not timeline.waves:
        if standing is not None:
            _PACKED[key] = timeline
            if len(_PACKED) > MOST_KEPT:
                _PACKED.popitem(last=False)
        return None
    if not isinstance(kept, Packed):
        if standing is None:
            return None
        kept = _PACKED[key] = Packed(timeline)
    same = kept.sizes is timeline.sizes and kept.moves is timeline.moves and kept.size_of is timeline.size_of
    return kept.evaluated(sizes, standing) if same else None

"""The log of a run without its middle layers, with what these do written into it (`skipped`).

What a layer frees is found by its distance: a place in the run of its own or another pass, so many layers on. The written log is
the one that a run of all layers leaves, entry by entry.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import itemgetter
from typing import NamedTuple

from peftplan.depth.skipped import LEFT_OUT, NotAlikeError, Skipped, StandIns
from peftplan.tape.tape import Tape

Place = tuple[int, int, int]
"""Of a storage: the pass of a stack, its layer's place among those that run, and its place among what that layer makes there."""


class _Section(NamedTuple):
    """What a layer does in one pass, as the log has it, and for what it frees the place, as many layers on as it is."""

    events: list[int]
    places: list[Place | None]


def write_skipped(f: Tape, stacks: Iterable[Skipped]) -> None:
    """Write what the layers that were left out do into the log of a tape. Raises NotAlikeError."""
    written = _Written(f, [*stacks])
    written.write()
    written.check()
    written.into_tape()


class _Written:
    """The log of all layers, from that of those that ran."""

    def __init__(self, f: Tape, stacks: Sequence[Skipped]) -> None:
        self.f = f
        self.stacks = stacks
        self.place: dict[int, Place] = {}
        self.sections: dict[tuple[int, int], _Section] = {}
        """Pass, and the place of a layer among those that run → what it does."""
        self.table: dict[tuple[int, int], list[int]] = {}
        """Pass and layer → the new numbers of what it makes."""
        self.outside = {0: 0}
        """The numbers of what no layer makes → the new ones."""
        self.sources = [0]
        """New number → the old one whose dims, name and so on it has."""
        self.log: list[int] = []
        self.made_in = [f.made_in[0]]
        self.freed: dict[int, int] = {}
        self.marks: list[tuple[int, str]] = []
        self.shifts = [(0, 0)]
        """A place in the log → how much later it is in the new one."""
        self.segments = 0
        """How many segments later it is."""

    def write(self) -> None:
        """Write the new log."""
        f, position, here, drops = self.f, 0, None, False
        noted = {at: (number, note) for number, stack in enumerate(self.stacks) for at, note in stack.marks.items()}
        for at, (end, what) in enumerate(f.marks):
            if not drops:
                self._part(position, end, here)
            position = end
            if what == LEFT_OUT:
                drops = not drops
                continue
            if at not in noted:
                if here is not None and self.stacks[here[0] // 2].layers[here[1]] in self.stacks[here[0] // 2].alike:
                    raise NotAlikeError(f"{what} within a layer")
                self.marks.append((len(self.log), what))
                continue
            number, (forward, layer, _) = noted[at]
            stack, of_pass = self.stacks[number], 2 * number + (not forward)
            if layer == stack.high and forward:
                self._missing(of_pass, stack.missing, stack.low)
            self.marks.append((len(self.log), what))
            if layer == stack.high and not forward:
                self._missing(of_pass, stack.missing[::-1], stack.high)
            place = stack.layers.index(layer) if layer in stack.layers else len(stack.layers)
            place -= not forward
            ends = place == 0 and not forward and (False, 0) not in stack.passed  # where nothing before it asks for a gradient
            here = (of_pass, place) if 0 <= place < len(stack.layers) and not ends else None
        self._part(position, len(f.log), here)

    def _part(self, start: int, end: int, here: tuple[int, int] | None) -> None:
        """Write a part of the log as it is."""
        f, log, freed, more = self.f, self.log, self.freed, self.segments
        self.shifts.append((start, len(log) - start))
        layer, blocks, section = 0, list[int](), None
        if here is not None:
            layer = self.stacks[here[0] // 2].layers[here[1]]
            blocks = self.table.setdefault((here[0], layer), [])
            section = self.sections.setdefault(here, _Section([], []))
        for n in f.log[start:end]:
            place = None
            if n > 0:
                number = len(self.sources)
                self.sources.append(n)
                self.made_in.append(_later(f.made_in[n], more))
                log.append(number)
                if here is None:
                    self.outside[n] = number
                else:
                    self.place[n] = (*here, len(blocks))
                    blocks.append(number)
            else:
                number = 0
                if here is not None and -n in self.place:
                    of, other, count = self.place[-n]
                    place = of, other - here[1], count
                    number = self._freed_of(place, layer)
                number = number or self._number_of(-n)
                if number in freed:
                    raise NotAlikeError("a tensor goes twice")
                freed[number] = _later(f.freed[-n], more)
                log.append(-number)
            if section is not None:
                section.events.append(n)
                section.places.append(place)

    def _freed_of(self, place: Place, layer: int) -> int:
        of, distance, number = place
        try:
            return self.table[of, layer + distance][number]
        except LookupError:
            raise NotAlikeError("a layer frees what none has made") from None

    def _number_of(self, n: int) -> int:
        """The new number of a storage that no layer frees."""
        layer, like, twin = self.stand_ins.get(n, (None, 0, n))
        if twin not in self.place:
            if n not in self.outside:
                raise NotAlikeError("what no layer made stays for one")
            return self.outside[n]
        of_pass, place, number = self.place[twin]
        layers = self.stacks[of_pass // 2].layers
        return self.table[of_pass, layers[place] if layer is None else layer + place - layers.index(like)][number]

    @cached_property
    def stand_ins(self) -> StandIns:
        """Of all stacks."""
        return {n: of for stack in self.stacks for n, of in stack.stand_ins.items()}

    def _missing(self, of_pass: int, layers: Sequence[int], like: int) -> None:
        """Write what the missing layers do."""
        stack, f, forward = self.stacks[of_pass // 2], self.f, not of_pass % 2
        section = self.sections[of_pass, stack.layers.index(like)]
        segments = {(passes, layer): segment for passes, layer, segment in stack.marks.values()}
        own = segments[forward, stack.high] - segments[forward, stack.low if forward else stack.high + 1]
        place = {n: number for number, n in enumerate(n for n in section.events if n > 0)}
        signs = [(n > 0) - (-n in place) for n in section.events]
        offsets = [place.get(n, -place.get(-n, 0)) for n in section.events]
        others = [(at, place) for at, (sign, place) in enumerate(zip(signs, section.places, strict=True)) if not sign]
        if any(place is None for _, place in others):
            raise NotAlikeError("a layer frees what none has made")
        segments_made = [(f.made_in[n], 1 if f.made_in[n] > 0 else -1) for n in place]
        ends = {n: (f.freed[n], 1 if f.freed[n] > 0 else -1) for n in (-n for n in section.events if n < 0)}
        of_own = [(place[n], *end) for n, end in ends.items() if n in place]
        for layer in layers:
            self.segments += own
            more, base, start = self.segments, len(self.sources), len(self.log)
            if forward:
                self.marks.append((start, f"{stack.name} {layer}"))
            self.sources += place
            self.table[of_pass, layer] = [*range(base, base + len(place))]
            self.made_in += [segment + sign * more for segment, sign in segments_made]
            self.freed.update([(base + number, segment + sign * more) for number, segment, sign in of_own])
            self.log += [sign * base + offset for sign, offset in zip(signs, offsets, strict=True)]
            for at, other in others:
                assert other is not None
                number, (segment, sign) = self._freed_of(other, layer), ends[-section.events[at]]
                if number in self.freed:
                    raise NotAlikeError("a tensor goes twice")
                self.freed[number] = segment + sign * more
                self.log[start + at] = -number
            if not forward:
                self.marks.append((len(self.log), f"{stack.name} {layer}"))

    def check(self) -> None:
        """Raise NotAlikeError unless layers before and behind the missing ones do the same, in the same state."""
        for number, stack in enumerate(self.stacks):
            if len(stack.passed | {(False, 0)}) != 2 * len(stack.layers) + 2:
                raise NotAlikeError("backward does not reach all layers")
            for forward in (True, False):
                of_pass = 2 * number + (not forward)
                if len({stack.states[forward, layer] for layer in stack.alike}) > 1:
                    raise NotAlikeError("the layers differ in what they find")
                settled = stack.alike[1:] if forward else stack.alike[-2::-1]  # the first frees what one still unlike it made
                first, *others = (self._done(self.sections[of_pass, stack.layers.index(layer)]) for layer in settled)
                if any(other != first for other in others):
                    raise NotAlikeError("the layers differ in what they do")
                like = stack.low if forward else stack.high
                for at, n in enumerate(n for n in self.sections[of_pass, stack.layers.index(like)].events if n > 0):
                    of_both = (self.table[of_pass, layer][at] in self.freed for layer in (stack.missing[0], stack.missing[-1]))
                    if n in self.f.freed and not all(of_both):
                        raise NotAlikeError("what layers make goes behind all of them")

    def _done(self, section: _Section) -> list[object]:
        """What tells two layers apart."""
        f = self.f
        of_each = f.made_as, f.category, f.counts, f.streams
        among = f.collected, f.handed_on
        return [
            place
            if n < 0
            else (
                *(f.dims[n], f.dtypes[n], f.names[n], f.made_in[n] > 0),
                *(of.get(n) for of in of_each),
                *(n in some for some in among),
            )
            for n, place in zip(section.events, section.places, strict=True)
        ]

    def into_tape(self) -> None:
        """Put the new log in the place of the one there was."""
        f, sources = self.f, self.sources
        f.dims, f.dtypes, f.names = ([of[n] for n in sources] for of in (f.dims, f.dtypes, f.names))  # type: ignore[assignment]
        for of in (f.made_as, f.category, f.counts, f.streams, f.savers):
            renamed = [(number, of[n]) for number, n in enumerate(sources) if n in of]
            of.clear()
            of.update(renamed)  # type: ignore[arg-type]
        for some in (f.collected, f.handed_on, f.lasting):
            numbers = {number for number, n in enumerate(sources) if n in some} if some else set()
            some.clear()
            some.update(numbers)
        f.products = [(self._later_at(at), library) for at, library in f.products]
        f.pinned = [(self._later_at(at), nbytes, name) for at, nbytes, name in f.pinned]
        f.log, f.made_in, f.freed, f.marks = self.log, self.made_in, self.freed, self.marks

    def _later_at(self, at: int) -> int:
        return at + self.shifts[bisect(self.shifts, at, key=itemgetter(0)) - 1][1]


def _later(segment: int, more: int) -> int:
    return segment + more if segment > 0 else segment - more

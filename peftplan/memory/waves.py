"""The level of a timeline at its peaks, without adding up every event: deep models repeat what few layers do.

Events are cut into *waves*: all that is made until something is freed, and all that is freed until something is made. A level is
highest where a wave turns. Waves are cut into *stretches* before each occurrence of one wave that comes at least `OFTEN` times,
about once a layer: that which leaves least to add up. There are few different waves and few different stretches, and each is
added up once.

    events     +a +b -a +c -b -c | +a +b -a +c -b -c        two layers
    waves      (+a +b, -a) (+c, -b -c) | the same again     two different ones
    stretches  of two waves each                            one
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

OFTEN = 8

Wave = tuple[tuple[int, ...], tuple[int, ...]]
"""What is made and then freed: places in a timeline's `moves`."""
Counts = tuple[tuple[int, int], ...]
"""Places in a timeline's `moves`, and how often each comes."""


class Window(NamedTuple):
    """The events from `first` on, of one phase; before the first phase `phase` is None."""

    phase: str | None
    first: int
    stretches: tuple[int, ...]


class Waves(NamedTuple):
    """A timeline's events as waves and stretches of waves."""

    waves: tuple[Wave, ...] = ()
    stretches: tuple[tuple[int, ...], ...] = ()
    windows: tuple[Window, ...] = ()
    lengths: tuple[int, ...] = ()
    """The events of each stretch."""
    counts: tuple[tuple[Counts, Counts], ...] = ()
    """What each wave makes and frees, each move once."""

    def peaks(self, moves: Sequence[int], standing: int) -> dict[str, tuple[int, int]]:
        """Phase → (highest level, how many events lead to it). `moves`: by how much each changes the level, in bytes."""
        ups, nets = [], []
        for up, down in self.counts:  # most are one or two moves long
            level = 0
            for move, times in up:
                level += times * moves[move]
            ups.append(level)
            for move, times in down:
                level += times * moves[move]
            nets.append(level)
        tops: list[tuple[int, int]] = []  # of each stretch: above its beginning, and the wave where it is
        rises: list[int] = []
        for stretch in self.stretches:
            level = top = where = 0
            for number, wave in enumerate(stretch):
                if (reached := level + ups[wave]) > top:
                    top, where = reached, number
                level += nets[wave]
            tops.append((top, where))
            rises.append(level)
        by_phase: dict[str, tuple[int, int]] = {}
        level = standing
        for phase, first, stretches in self.windows:
            best, at = level, -1
            for number, place in enumerate(stretches):
                if level + tops[place][0] > best:
                    best, at = level + tops[place][0], number
                level += rises[place]
            if phase is not None and best > by_phase.get(phase, (-1, 0))[0]:
                by_phase[phase] = best, first if at < 0 else first + self._events_to(stretches, at, tops, moves)
        return by_phase

    def _events_to(self, stretches: Sequence[int], at: int, tops: Sequence[tuple[int, int]], moves: Sequence[int]) -> int:
        """The events of a window before the top of one of its stretches; tensors without bytes make no top."""
        stretch, where = self.stretches[stretches[at]], tops[stretches[at]][1]
        climb = self.waves[stretch[where]][0]
        empty = next(number for number, move in enumerate(reversed(climb)) if moves[move])
        before = sum(map(self.lengths.__getitem__, stretches[:at])) + _num_events(self.waves, stretch[:where])
        return before + len(climb) - empty


def _num_events(waves: Sequence[Wave], numbers: Iterable[int]) -> int:
    return sum([len(up) + len(down) for up, down in map(waves.__getitem__, numbers)])


def waves_of(move_of: Sequence[int], counts: Sequence[int], windows: Sequence[tuple[str, int, int]]) -> Waves:
    """The waves of events; `move_of`: event → its move, `counts`: move → how many tensors it makes, below 0 where it frees."""
    waves: dict[Wave, int] = {}
    stretches: dict[tuple[int, ...], int] = {}
    begins = windows[0][1] if windows else 0
    parts = []
    for phase, first, end in ((None, 0, begins), *windows):
        numbers = [waves.setdefault(wave, len(waves)) for wave in _cut(move_of[first:end], counts)]
        places: dict[int, list[int]] = {}
        for at, wave in enumerate(numbers):
            places.setdefault(wave, []).append(at)
        often = {len(of_wave): of_wave for of_wave in places.values() if len(of_wave) >= OFTEN}  # as many cut alike
        ways = [_pieces(numbers, cuts) for cuts in ([], *often.values())]
        pieces = min(ways, key=lambda pieces: len(pieces) + sum(map(len, set(pieces))))
        parts.append(Window(phase, first, tuple(stretches.setdefault(piece, len(stretches)) for piece in pieces)))
    of_number = tuple(waves)
    lengths = tuple(_num_events(of_number, stretch) for stretch in stretches)
    of_each = tuple((tuple(Counter(up).items()), tuple(Counter(down).items())) for up, down in of_number)
    return Waves(of_number, tuple(stretches), tuple(parts), lengths, of_each)


def _pieces(numbers: Sequence[int], cuts: Sequence[int]) -> list[tuple[int, ...]]:
    """What is between the occurrences of a wave, each at the beginning of its piece."""
    cuts = cuts[1:] if cuts and cuts[0] == 0 else cuts
    return [tuple(numbers[a:b]) for a, b in zip([0, *cuts], [*cuts, len(numbers)], strict=True)]


def _cut(move_of: Sequence[int], counts: Sequence[int]) -> Iterator[Wave]:
    start = turn = 0
    falling = False
    for at, move in enumerate(move_of):
        if (counts[move] < 0) is not falling:
            if falling:
                yield tuple(move_of[start:turn]), tuple(move_of[turn:at])
                start = at
            else:
                turn = at
            falling = not falling
    if start < len(move_of):
        turn = turn if falling else len(move_of)
        yield tuple(move_of[start:turn]), tuple(move_of[turn:])

"""A stack whose middle layers are left out of the run: each does what its neighbour does, one layer on.

For layers that are no copies of one in the log (`copies`), since what a rank gathers for a layer is freed by another one. Of 24
layers eight run where a rank gathers one layer ahead:

    0 1 2 3 | 20 21 22 23        2, 3, 20 and 21 do the same; layers 4 to 19 are written as layer 3, in backward as layer 20

What they do is written into the log afterwards (`written`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from peftplan.errors import PeftplanError
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Node, Tensor

EDGE = 3
"""Layers that run at each end beside as many as are reached: the first or the last one, and two that do the same."""
WORTH = 3
"""Layers are left out where at most one of so many runs: what is left out is written, and may have to be run after all."""
LEFT_OUT = "left out"
"""The marks around the events that make and free what stands for the storages of layers that are left out."""


class NotAlikeError(PeftplanError):
    """The middle layers do not do the same, so that all are run."""


StandIns = dict[int, tuple[int, int, int]]
"""A storage that a layer has until all have run → the layer, the one that it is like if it was left out, and the storage of
that one."""


class Skipped(NamedTuple):
    """A stack whose layers behind `low` and before `high` are left out."""

    name: str
    layers: tuple[int, ...]
    low: int
    high: int
    state: Callable[[int, bool], Hashable]
    """What decides what a layer and the next ones do, as seen from it, in forward or in backward."""
    leave_out: Callable[[Sequence[int], int], StandIns]
    """What is kept of each of these layers when forward goes on behind them; all are as the one before them."""
    leave_out_again: Callable[[Sequence[int], int], StandIns]
    """The same in backward, where all are as the one behind them."""
    marks: dict[int, tuple[bool, int, int]]
    """The marks, by their place → whether forward passes, which layer is next to it there, and the segment."""
    states: dict[tuple[bool, int], Hashable]
    """In forward or not, and layer → its state."""
    stand_ins: StandIns

    @property
    def missing(self) -> range:
        """The layers that are left out."""
        return range(self.low + 1, self.high)

    @property
    def passed(self) -> set[tuple[bool, int]]:
        """In forward or not, and the layers to which it passed."""
        return {(forward, layer) for forward, layer, _ in self.marks.values()}

    @property
    def alike(self) -> tuple[int, ...]:
        """Those that do the same, and as the missing ones do."""
        return alike_around(self.low, self.high)

    def passes(self, f: Tape, x: Tensor, layer: int) -> Tensor:
        """Forward passes on to a layer, or behind the last one; and later the gradient."""
        if layer == self.high:
            f.mark(LEFT_OUT)
            self.stand_ins.update(self.leave_out(self.missing, self.low))
            f.mark(LEFT_OUT)
        self.note(f, layer, forward=True)
        return Tensor(x.storage, x.dims, x.dtype, f.record(_note_backward, (x,), self, layer))

    def note(self, f: Tape, layer: int, *, forward: bool) -> None:
        """Mark the place, and what decides what follows."""
        self.marks[len(f.marks)] = forward, layer, abs(f.segment)
        place = self.layers.index(layer) if layer in self.layers else len(self.layers)
        follows = (*self.layers, -1)[place - (not forward)]
        if follows in self.alike:
            self.states[forward, follows] = self.state(follows, forward)
        f.mark(f"{self.name} {'end' if layer > self.layers[-1] else layer}")


def _note_backward(f: Tape, node: Node, saved: tuple[Skipped, int], g: Tensor) -> Tensor:
    skipped, layer = saved
    skipped.note(f, layer, forward=False)
    if layer == skipped.high:
        f.mark(LEFT_OUT)
        skipped.stand_ins.update(skipped.leave_out_again(skipped.missing[::-1], skipped.high))
        f.mark(LEFT_OUT)
    return g


def alike_around(low: int, high: int) -> tuple[int, ...]:
    """The layers that do the same on both sides of those that are left out."""
    return low - 1, low, high, high + 1


def run_of(count: int, *, reach: int) -> tuple[int, int] | None:
    """The last layer that runs before those that are left out, and the first one behind them; None where all run."""
    at_each_end = reach + EDGE
    return (at_each_end - 1, count - at_each_end) if WORTH * 2 * at_each_end <= count else None

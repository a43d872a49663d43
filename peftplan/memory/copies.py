"""The layers between those that are run: what they do, and where in the log they stand.

Two layers of each kind are run (`memory.stack`); the others do what the last of their kind did between two boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from peftplan.memory.tape import Tape


class Stack(NamedTuple):
    """A stack whose sections were run between marks: `copies` of a section stand at the mark of the section in `places`."""

    name: str
    places: Mapping[str, str]
    copies: Mapping[str, int]
    passed: set[int]
    """Storages of the hidden states that one layer hands to the next."""
    sums: set[int]
    """Storages of gradients that all layers add to: one after the other, each freeing the one before."""
    holds: bool = False
    """Whether what every layer returns lives until the forward ends."""


class Layers(NamedTuple):
    """`number` layers that the log does not hold: each does what the events of `log` say, storages of the tape (negative: freed).

    `net` is what each leaves changed. `moved`: a storage that each frees → the one that it makes in its place, for the next.
    `given`: a hidden state that each leaves alive → the one that it was given.
    """

    log: tuple[int, ...]
    number: int
    net: tuple[int, ...]
    moved: Mapping[int, int]
    given: Mapping[int, int]


Copies = dict[tuple[int, str], list[Layers]]


def copies_of(tape: Tape, stacks: Iterable[Stack]) -> tuple[Copies, dict[int, int]]:
    """Where copies of layers stand: (position, mark) → the layers.

    And the storages that outlive their layer's backward → those with which their copies go: autocast's casts, what nodes and the
    caller hold, themselves. The hidden states between layers are not among them, each layer's being the next one's input, unless
    nodes hold them (int8's): they go with the state before.
    """
    found: Copies = {}
    outliving: dict[int, int] = {}
    for stack in stacks:
        marks = [(at, what) for at, what in tape.marks if what.startswith(f"{stack.name} ")]
        own = next((n for n in tape.log[marks[0][0] :] if n > 0), 0)
        for forward in (True, False):
            run = list(_run(marks, end=f"{stack.name} end", forward=forward))
            position = {what: (at, what) for at, what in reversed(run)}
            for (start, before), (stop, after) in pairwise(run):
                section = before if forward else after
                count = stack.copies.get(section, 0)
                where = position.get(stack.places.get(section, ""))
                if not count or where is None:
                    continue
                log = [n for n in tape.log[start:stop] if abs(n) not in stack.sums]
                net, moved = _net(tape, log, stack, _early(tape, stop) if forward else None)
                if not forward:  # what came before the stack goes once
                    net = [n for n in net if n > 0 or -n >= own]
                given = _given(stack, net) if forward else {}
                found.setdefault(where, []).append(Layers(tuple(log), count, tuple(net), moved, given))
                if forward:
                    passed = stack.passed - (_early(tape, stop) if stack.holds else set())
                    outliving |= {n: n for n in net if n > 0 and n not in passed}
                    outliving |= _late(tape, stack, net, marks[-1][0])
                else:
                    gone = {-n for n in tape.log[start:stop] if n < 0}
                    outliving = {n: last for n, last in outliving.items() if last not in gone}
                    outliving |= {n: n for n in tape.lasting.intersection(net)}
    return found, outliving


def _late(tape: Tape, stack: Stack, net: list[int], end: int) -> dict[int, int]:
    """What a layer hands on → the hidden state that it was given, where that is still alive when the stack's backward ends."""
    freed = {-n for n in tape.log[:end] if n < 0}
    return {n: before for n, before in _given(stack, net).items() if before not in freed}


def _given(stack: Stack, net: Iterable[int]) -> dict[int, int]:
    """What a layer hands on and leaves alive → the hidden state that it was given."""
    return {n: max((p for p in stack.passed if p < n), default=n) for n in net if n in stack.passed}


def _early(tape: Tape, since: int) -> set[int]:
    """Storages that are freed before backward begins."""
    until = next(at for at, what in tape.marks if what == "backward" and at >= since)
    return {-n for n in tape.log[since:until] if n < 0}


def _run(marks: list[tuple[int, str]], *, end: str, forward: bool) -> Iterator[tuple[int, str]]:
    """The marks of the forward pass, up to `end`, or those of the backward pass, from the second `end` on."""
    ended = False
    for at, what in marks:
        if ended is not forward:
            yield at, what
        ended = ended or what == end


def _net(tape: Tape, log: list[int], stack: Stack, early: set[int] | None) -> tuple[list[int], dict[int, int]]:
    """What a layer leaves changed: made and not freed, or freed (negative) though made before; and freed → made in its place.

    A layer that frees its input and leaves an output of the same kind changes nothing. What else it frees in forward, of a first
    layer without gradients, goes once if its own stays until backward. `early`: what is freed before backward, in forward.
    """
    moved: dict[int, int] = {}
    made = {n for n in log if n > 0}
    freed = {-n for n in log if n < 0}
    kept = [n for n in log if n > 0 and n not in freed]
    gone = [-n for n in log if n < 0 and -n not in made]
    for alike in (_same, _of_one_pass, _alike):  # the closest first: a gradient takes the place of a gradient
        for n in [*gone]:
            twin = next((k for k in kept if k not in tape.lasting and alike(tape, k, n)), None)
            if twin is None:
                continue
            gone.remove(n)
            if early is None or n in stack.passed or twin in early:
                kept.remove(twin)
                moved[n] = twin
    return [*(-n for n in gone), *kept], moved  # frees first: the copies are one step, and overshoot nothing


def _alike(tape: Tape, one: int, other: int) -> bool:
    return (tape.dims[one], tape.dtypes[one]) == (tape.dims[other], tape.dtypes[other])


def _of_one_pass(tape: Tape, one: int, other: int) -> bool:
    return (tape.made[one] > 0) == (tape.made[other] > 0) and _alike(tape, one, other)


def _same(tape: Tape, one: int, other: int) -> bool:
    return tape.names[one] == tape.names[other] and _of_one_pass(tape, one, other)

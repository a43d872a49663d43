"""Copied layers: what they allocate and free, and their place in the log.

The tape runs two layers of each kind (`stack`). Every other layer is a copy: it does what the last layer of its kind did
between two boundaries. For four equal layers, of which 0 and 3 are run, the log reads

    forward     layer 0 | 2 copies of layer 3 | layer 3
    backward    layer 3 | 2 copies of layer 3 | layer 0
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims

_LAYER = re.compile(r"(?<=\.)(\d+|\{\})(?=\.)")
"""The layer's place in a name: `{}` for all layers, or the number of the only layer that has the tensor."""


class Stack(NamedTuple):
    """A stack of layers. `copies`: section → the mark at which copies of it are inserted → their numbers in the stack."""

    name: str
    copies: Mapping[str, Mapping[str, Sequence[int]]]
    passed: set[int]
    """Storages of the hidden states that one layer hands to the next."""
    sums: set[int]
    """Storages of a gradient that every layer adds to: each new sum frees the previous one."""
    holds: bool = False
    """Whether the output of every layer stays alive until the end of the forward."""


class Layers(NamedTuple):
    """Copied layers. `log` holds the events of one of them: storages of the tape, negative where freed.

    `turns`: which layers they are, those that run later with higher numbers; `net`: what one layer leaves changed; `moved`: a
    storage that it frees → the one in its place for the next layer; `handed_on`: a hidden state that it leaves alive → its input.
    """

    log: tuple[int, ...]
    turns: tuple[int, ...]
    net: tuple[int, ...]
    moved: Mapping[int, int]
    handed_on: Mapping[int, int]


Copies = dict[tuple[int, str], list[Layers]]


def copies_of(tape: Tape, stacks: Iterable[Stack]) -> tuple[Copies, dict[int, int]]:
    """(position, mark) → the copied layers that go there; and each storage that outlives its layer's backward → the storage whose
    end is also the end of its copies.

    Casts of autocast, and what nodes or the caller hold, end with themselves. A hidden state between layers is the next layer's
    input and ends there; only if a node holds it (int8) it is listed, and ends with the hidden state before it.
    """
    copies: Copies = {}
    outliving: dict[int, int] = {}
    for stack in stacks:
        marks = [(at, what) for at, what in tape.marks if what.startswith(f"{stack.name} ")]
        own = next((n for n in tape.log[marks[0][0] :] if n > 0), 0)
        for forward in (True, False):
            run = list(_run(marks, end=f"{stack.name} end", forward=forward))
            position = {what: (at, what) for at, what in reversed(run)}
            for (start, before), (stop, after) in pairwise(run):
                section = before if forward else after
                places = [(position[mark], layers) for mark, layers in stack.copies.get(section, {}).items() if mark in position]
                if not places:
                    continue
                log = [n for n in tape.log[start:stop] if abs(n) not in stack.sums]
                net, moved = _net(tape, log, stack, _early(tape, stop) if forward else None)
                if not forward:  # what the stack did not allocate is freed once
                    net = [n for n in net if n > 0 or -n >= own]
                handed_on = _handed_on(stack, net) if forward else {}
                for where, layers in places:
                    turns = tuple(layers) if forward else tuple(-layer for layer in reversed(layers))
                    copies.setdefault(where, []).append(Layers(tuple(log), turns, tuple(net), moved, handed_on))
                if forward:
                    passed = stack.passed - (_early(tape, stop) if stack.holds else set())
                    outliving |= {n: n for n in net if n > 0 and n not in passed}
                    outliving |= _late(tape, stack, net, marks[-1][0])
                else:
                    freed = {-n for n in tape.log[start:stop] if n < 0}
                    outliving = {n: last for n, last in outliving.items() if last not in freed}
                    outliving |= {n: n for n in tape.lasting.intersection(net)}
    return copies, outliving


def _late(tape: Tape, stack: Stack, net: list[int], end: int) -> dict[int, int]:
    """Output of a layer → its input, if the input is still alive when the backward of the stack ends."""
    freed = {-n for n in tape.log[:end] if n < 0}
    return {n: before for n, before in _handed_on(stack, net).items() if before not in freed}


def _handed_on(stack: Stack, net: Iterable[int]) -> dict[int, int]:
    """Output of a layer, if it stays alive → the input of the layer."""
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
    """What a layer leaves changed, and freed storage → the one made in its place.

    Changed is what it makes and does not free, and (negative) what it frees but did not make. A layer that frees its input and
    leaves an output of the same kind changes nothing. If it frees anything else in forward (of a first layer without gradients)
    while its own counterpart stays until backward, that is freed once. `early`: storages freed before backward begins.
    """
    moved: dict[int, int] = {}
    allocated = {n for n in log if n > 0}
    freed = {-n for n in log if n < 0}
    lasting = [n for n in log if n > 0 and n not in freed]
    freed_here = [-n for n in log if n < 0 and -n not in allocated]
    for alike in (_same, _of_one_pass, _as_large, _alike):  # the closest first: a gradient replaces a gradient
        for n in [*freed_here]:
            twin = next((k for k in lasting if k not in tape.lasting and alike(tape, k, n)), None)
            if twin is None:
                continue
            freed_here.remove(n)
            if early is None or n in stack.passed or twin in early:
                lasting.remove(twin)
                moved[n] = twin
    return [*(-n for n in freed_here), *lasting], moved  # frees first: the copies count as one step and must not overshoot


def _alike(tape: Tape, one: int, other: int) -> bool:
    return (tape.dims[one], tape.dtypes[one]) == (tape.dims[other], tape.dtypes[other])


def _of_one_pass(tape: Tape, one: int, other: int) -> bool:
    return (tape.made_in[one] > 0) == (tape.made_in[other] > 0) and _alike(tape, one, other)


def _as_large(tape: Tape, one: int, other: int) -> bool:
    """Of one pass and size: a gradient by blocks of features, which OFT hands on, and the gradient of all features."""
    alike = tape.dtypes[one] == tape.dtypes[other] and (tape.made_in[one] > 0) == (tape.made_in[other] > 0)
    return alike and _elements(tape.dims[one]) == _elements(tape.dims[other])


def _elements(dims: Dims) -> tuple[int, list[str]]:
    return prod(dim for dim in dims if isinstance(dim, int)), sorted(dim for dim in dims if isinstance(dim, str))


def _same(tape: Tape, one: int, other: int) -> bool:
    return tape.names[one] == tape.names[other] and _of_one_pass(tape, one, other)


def stack_of(name: str) -> str:
    """The part of a name before the layer's number; all of it if it has none."""
    return _LAYER.split(name, maxsplit=1)[0]


def layers_of(name: str, copies: int) -> range:
    """The numbers of the layers that have a tensor."""
    number = _LAYER.search(name)
    first = int(number[0]) if number and number[0] != "{}" else 0
    return range(first, first + copies)

"""From the log of a tape to peaks: what is alive at each moment, evaluated at named sizes.

The log holds two layers of each kind. The layers between stand in it as copies: what the last one of its kind added and freed
between two boundaries, times their number (`model.run_stack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.ledger import Category, Dim, Line
from peftplan.memory.tape import Tape
from peftplan.units import ALLOCATION_ROUNDING

PHASES = ("forward", "backward", "step")


class Kind(NamedTuple):
    """What tells lines of activations apart."""

    name: str
    category: Category
    dtype: str
    dims: tuple[Dim, ...]


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
    """

    log: tuple[int, ...]
    number: int
    net: tuple[int, ...]
    moved: Mapping[int, int]


class Repeated(NamedTuple):
    """Events of a timeline, `first` to before `last`, that stand for whole layers."""

    first: int
    last: int
    layers: tuple[Layers, ...]


class Timeline(NamedTuple):
    """Every event of a step: which kind of tensor, how many are made (or freed), and where each phase begins."""

    kinds: tuple[Kind, ...]
    sources: tuple[str, ...]
    events: tuple[tuple[int, int], ...]
    windows: tuple[tuple[str, int, int], ...]
    products: frozenset[tuple[str, str]] = frozenset()
    """(library, thread) of each workspace that a matrix product takes."""
    storages: tuple[int, ...] = ()
    """Which storage of the tape each event makes or frees."""
    repeated: tuple[Repeated, ...] = ()
    kind_of: Sequence[int] = ()
    """Storage of the tape → its kind."""
    tensors: Mapping[int, int] = MappingProxyType({})
    """Storages that stand for several tensors → how many."""

    def peaks(self, sizes: Mapping[str, int], standing: int = 0) -> dict[str, tuple[int, int]]:
        """Phase → (bytes, how many events lead to them), on top of `standing` bytes that are always there."""
        nbytes = [_bytes(kind, sizes) for kind in self.kinds]
        levels = list(accumulate([count * nbytes[kind] for kind, count in self.events], initial=standing))
        found: dict[str, tuple[int, int]] = {}
        for phase, start, end in self.windows:
            within = levels[start : end + 1]
            best = max(within)
            if best > found.get(phase, (-1, 0))[0]:
                found[phase] = (best, start + within.index(best))
        return found

    def lines(self, end: int, sizes: Mapping[str, int]) -> tuple[Line, ...]:
        """What the first `end` events leave alive.

        A copied layer hands on one hidden state and takes another, whose categories can differ: they balance by name.
        """
        counts: dict[int, int] = {}
        for kind, count in self.events[:end]:
            counts[kind] = counts.get(kind, 0) + count
        alive: dict[tuple[str, str, tuple[Dim, ...]], dict[Category, int]] = {}
        sources: dict[tuple[str, str, tuple[Dim, ...]], str] = {}
        for kind, count in counts.items():
            if count:
                k = self.kinds[kind]
                of_name = alive.setdefault((k.name, k.dtype, k.dims), {})
                of_name[k.category] = of_name.get(k.category, 0) + count
                sources[k.name, k.dtype, k.dims] = self.sources[kind]
        found = []
        for (name, dtype, dims), by_category in alive.items():
            if min(by_category.values()) < 0:
                by_category = {max(by_category, key=lambda c: by_category[c]): sum(by_category.values())}
            source = sources[name, dtype, dims]
            found += [
                Line(name, category, dtype, dims, count, source, sizes=sizes) for category, count in by_category.items() if count
            ]
        return tuple(found)


def _bytes(kind: Kind, sizes: Mapping[str, int]) -> int:
    numel = ITEMSIZE[kind.dtype]
    for dim in kind.dims:
        numel *= dim if isinstance(dim, int) else sizes[dim]
    return -(-numel // ALLOCATION_ROUNDING) * ALLOCATION_ROUNDING


def timeline(tape: Tape, stacks: Iterable[Stack], *, vocab: int | None) -> Timeline:
    """The timeline of a tape whose marks bound the sections of `stacks`."""
    index: dict[Kind, int] = {}
    sources: list[str] = []
    kind_of = [0]
    for n in range(1, len(tape.dims)):
        kind = Kind(tape.names[n], _category(tape, n, vocab), tape.dtypes[n], tape.dims[n])
        place = index.setdefault(kind, len(index))
        kind_of.append(place)
        if place == len(sources):
            sources.append(_source(tape.savers.get(n)))
    kinds = tuple(index)
    events: list[tuple[int, int]] = []
    storages: list[int] = []
    starts: list[tuple[str, int]] = []
    copies, outliving = _copies(tape, stacks)
    repeated: list[Repeated] = []
    standing_for: dict[int, int] = {}
    counts = tape.counts
    done = 0
    for at, what in (*tape.marks, (len(tape.log), "")):
        for n in tape.log[done:at]:
            if n in counts or -n in counts:
                events.append((kind_of[n], counts[n]) if n > 0 else (kind_of[-n], -counts[-n]))
            else:
                events.append((kind_of[n], 1) if n > 0 else (kind_of[-n], -1 - standing_for.pop(-n, 0)))
            storages.append(abs(n))
        done = at
        here = copies.get((at, what), ())
        before = len(events)
        for n, count in ((n, layers.number) for layers in here for n in layers.net):
            if n in outliving:
                standing_for[outliving[n]] = count
            kind = kinds[kind_of[abs(n)]]
            if kind.category == "temporaries":  # what each of many layers leaves alive is kept
                kind = kind._replace(category="activations")
            place = index.setdefault(kind, len(index))
            if place == len(sources):
                sources.append(sources[kind_of[abs(n)]])
            events.append((place, count if n > 0 else -count))
            storages.append(abs(n))
        if here:
            repeated.append(Repeated(before, len(events), tuple(here)))
        if what in PHASES:
            starts.append((what, len(events)))
    ends = [start for _, start in starts[1:]] + [len(events)]
    windows = tuple((phase, start, end) for (phase, start), end in zip(starts, ends, strict=True))
    products = frozenset(_products(tape))
    return Timeline(
        tuple(index), tuple(sources), tuple(events), windows, products, tuple(storages), tuple(repeated), kind_of, counts
    )


PRODUCTS = {"linear": "cuBLAS", "mm": "cuBLAS", "bmm": "cuBLAS", "addmm": "cuBLASLt"}
"""Matrix products → the library that computes them: those that add a bias go to cuBLASLt."""


def _products(tape: Tape) -> Iterator[tuple[str, str]]:
    """Autograd's backward, and what it recomputes, runs in a thread of its own, with handles of its own."""
    thread = "forward"
    marks = dict(tape.marks)
    for at, n in enumerate(tape.log):
        if marks.get(at) in PHASES:
            thread = "backward" if marks[at] == "backward" else "forward"
        library = PRODUCTS.get(tape.made_as.get(n, tape.names[n]).rpartition(" ")[2]) if n > 0 else None
        if library is not None:
            yield library, thread
    phases = [(at, what) for at, what in tape.marks if what in PHASES]
    for at, library in tape.products:
        phase = max((start, what) for start, what in phases if start <= at)[1]
        yield library, "backward" if phase == "backward" else "forward"


def _source(saver: str | None) -> str:
    """Who keeps a tensor: the operation whose backward needs it (torch 2.13, derivatives.yaml)."""
    return "analytic" if saver is None else f"analytic: kept by {saver.strip('_').removesuffix('_backward')}"


Copies = dict[tuple[int, str], list[Layers]]


def _copies(tape: Tape, stacks: Iterable[Stack]) -> tuple[Copies, dict[int, int]]:
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
                found.setdefault(where, []).append(Layers(tuple(log), count, tuple(net), moved))
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
    handed = [n for n in net if n in stack.passed]
    if not handed:
        return {}
    given = {n: max((p for p in stack.passed if p < n), default=n) for n in handed}
    freed = {-n for n in tape.log[:end] if n < 0}
    return {n: before for n, before in given.items() if before not in freed}


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


def _category(tape: Tape, number: int, vocab: int | None) -> Category:
    """As the trace engine sorts: stated, logits by their last dim, activations if forward code made it and something kept it."""
    stated = tape.category.get(number)
    if stated is not None:
        return stated
    dims = tape.dims[number]
    if vocab is not None and len(dims) > 1 and dims[-1] == vocab and not isinstance(dims[0], int):
        return "logits"
    made = tape.made[number]
    return "activations" if made > 0 and tape.freed.get(number) != made else "temporaries"

"""From the logs of a model with few identical layers to that of one with many, exactly: a middle layer's events are repeated.

A log is cut into runs of events that belong to one layer or to none. Where runs of all layers follow each other, up (forward,
load, optimizer) or down (backward), they form a chain, and every chain gets the same number of copies of its second layer. What a
copy frees is found by its distance: its own layer's or its neighbour's. A log of one layer more proves or refutes the rule.
Where a rank gathers weights several layers ahead (`reach`), more layers stand before the one that is copied, and behind it.

Where only every n-th layer is alike (`every_n_layers` of checkpointing), n layers are one unit, which is copied as a layer else;
the last unit may have fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from peftplan.depth.layers import Layers
from peftplan.depth.log import AUTOGRAD, Moment, Storage
from peftplan.errors import PeftplanError

Began = list[tuple[int, str]]
Place = tuple[int, int, int]
"""Where a storage was allocated: chain, unit, position within the run."""
Growth = tuple[int, tuple[int, ...]]
"""Bytes, and elements of each dim, that one more layer adds."""


class NotRepeatingError(PeftplanError):
    """The layers do not repeat, so the model must be traced in full."""


@dataclass
class Run:
    """Consecutive events of one unit (None: outside all layers) within one phase."""

    window: int
    layer: int | None
    moments: list[Moment] = field(default_factory=list)


@dataclass
class Chain:
    """Runs of all layers in order; `step` is +1 from first to last, −1 from last to first."""

    runs: list[Run]
    step: int


@dataclass(frozen=True)
class Sample:
    """The log of a model with `layers` layers in the module list `stack`, and where its phases begin; every `period`-th layer
    is alike.

    `reach`: the unit that is copied, which may free what a unit so far from it has made. The units before it may differ (the
    first one's input is an embedding), and so may as many last ones.
    """

    log: tuple[Moment, ...]
    began: Began
    layers: int
    stack: str
    period: int = 1
    reach: int = 1

    @classmethod
    def of(cls, log: Sequence[Moment], began: Began, *, layers: int, stack: str, period: int = 1, reach: int = 1) -> Sample:
        """A log with its frees in canonical order."""
        return cls(in_order(log, began, stack=stack), began, layers, stack, period, reach)

    @property
    def units(self) -> int:
        """How many units its layers make, the last of which may have fewer layers."""
        return -(-self.layers // self.period)

    @cached_property
    def named(self) -> Layers:
        """Finds its layers in names."""
        return Layers(self.stack, self.period)


def grown(small: Sample, large: Sample, *, layers: int) -> Sample:
    """The log of a model with `layers` layers, from those of two that differ by one unit.

    The smaller log, one unit added, must be the larger one, event by event; what belongs to no layer (a stack of all gradients'
    norms) may grow by the same bytes with each unit. Raises NotRepeatingError.
    """
    of_small, of_large = (list(_chains(_runs(s.log, s.began, s.named), s.units)) for s in (small, large))
    growth = _growth(of_small, of_large)
    predicted = _written(small, of_small, growth, added=1)
    if not same(predicted.log, large.log):
        raise NotRepeatingError(f"more than {small.layers} layers is not what a trace of {large.layers} layers shows")
    return _written(large, of_large, growth, added=(layers - large.layers) // large.period)


def _written(sample: Sample, parts: Sequence[Run | Chain], growth: Sequence[Growth], *, added: int) -> Sample:
    writer = _Writer(parts, sample.named, growth, added=added, template=sample.reach)
    for part in parts:
        writer.write(part)
    layers = sample.layers + added * sample.period
    return replace(sample, log=tuple(writer.log), began=writer.phases(sample.began), layers=layers)


def _outside(parts: Sequence[Run | Chain]) -> list[Storage]:
    """What is allocated outside the layers, in order."""
    return [m.storage for part in parts if isinstance(part, Run) for m in part.moments if m.kind == "alloc"]


def _growth(small: Sequence[Run | Chain], large: Sequence[Run | Chain]) -> list[Growth]:
    """How much each allocation outside the layers grows with one more layer, in order."""
    pairs = [_outside(parts) for parts in (small, large)]
    if len(pairs[0]) != len(pairs[1]) or any(len(a.shape) != len(b.shape) for a, b in zip(*pairs, strict=True)):
        raise NotRepeatingError("another layer changes what happens outside of the layers")
    return [
        (b.nbytes - a.nbytes, tuple(y - x for x, y in zip(a.shape, b.shape, strict=True))) for a, b in zip(*pairs, strict=True)
    ]


def in_order(log: Sequence[Moment], began: Began, *, stack: str) -> tuple[Moment, ...]:
    """The log with frees that follow each other outside all modules sorted by layer.

    Autocast empties its cache in the order of a hash table; what is freed without an allocation in between makes no difference.
    """
    layers = Layers(stack)
    starts = {start for start, _ in began}
    ordered: list[Moment] = []
    batch: list[Moment] = []

    def rank(moment: Moment) -> tuple[bool, int, int]:
        layer = layers.number(moment.storage.name or moment.storage.module)
        return layer is None, (layer or 0) * (-1 if moment.phase == "backward" else 1), moment.storage.id

    for index, moment in enumerate(log):
        outside = moment.kind == "free" and not moment.module
        if not outside or index in starts:
            ordered += sorted(batch, key=rank)
            batch = []
        if outside:
            batch.append(moment)
        else:
            ordered.append(moment)
    return (*ordered, *sorted(batch, key=rank))


def _runs(log: Sequence[Moment], began: Began, layer_of: Layers) -> list[Run]:
    starts = {start: window for window, (start, _) in enumerate(began)}
    runs: list[Run] = []
    window = 0
    for index, moment in enumerate(log):
        window = starts.get(index, window)
        previous = runs[-1].layer if runs and runs[-1].window == window else None
        layer = _unit(moment, layer_of, previous)
        if not runs or runs[-1].layer != layer or runs[-1].window != window:
            runs.append(Run(window, layer))
        runs[-1].moments.append(moment)
    return runs


def _unit(moment: Moment, layer_of: Layers, previous: int | None) -> int | None:
    """The unit that a moment belongs to: that of the running module, else of the tensor's owner.

    What the caller of the layers frees between two of them belongs to the one before.
    """
    if moment.module:
        unit = layer_of.unit(moment.module)
        follows = moment.kind == "free" or moment.module == AUTOGRAD
        return previous if unit is None and follows else unit
    owner = moment.storage.name or moment.storage.module
    return layer_of.unit(owner) if owner else previous


def _chains(runs: list[Run], units: int) -> Iterator[Run | Chain]:
    at = 0
    while at < len(runs):
        run = runs[at]
        if run.layer is None:
            yield run
            at += 1
            continue
        step = 1 if run.layer == 0 else -1
        of_units = runs[at : at + units]
        expected = list(range(units)) if step == 1 else list(range(units - 1, -1, -1))
        follow = [r.layer for r in of_units] == expected and len({r.window for r in of_units}) == 1
        if not follow and all(moment.kind == "free" for moment in run.moments):
            yield Run(run.window, None, run.moments)  # what a layer made and something behind it frees
            at += 1
            continue
        if not follow:
            raise NotRepeatingError(f"layers {[r.layer for r in of_units]} follow each other in {run.moments[0].phase}")
        yield Chain(of_units, step)
        at += units


class _Writer:
    """Builds the longer log, part by part."""

    def __init__(
        self, parts: Sequence[Run | Chain], layer_of: Layers, growth: Sequence[Growth], *, added: int, template: int
    ) -> None:
        self.log: list[Moment] = []
        self._named = layer_of
        self._added = added
        self._template = template
        self._growth = iter(growth)
        self._places: dict[int, Place] = {}
        self._storages: dict[Place | int, Storage] = {}
        self._starts: dict[int, int] = {}
        self._names: dict[tuple[str, int], str] = {}
        self._counterparts: dict[tuple[int, int, int, int], int] = {}
        self._allocated: dict[tuple[int, int], list[Storage]] = {}
        for number, part in enumerate(parts):
            for run in part.runs if isinstance(part, Chain) else ():
                allocated = [m.storage for m in run.moments if m.kind == "alloc"]
                self._allocated[number, int(run.layer or 0)] = allocated
                self._places |= {s.id: (number, int(run.layer or 0), j) for j, s in enumerate(allocated)}

    def write(self, part: Run | Chain) -> None:
        """Append one part, and the copies if it is a chain."""
        if isinstance(part, Run):
            self._starts.setdefault(part.window, len(self.log))
            self._append(part, shift=None)
            return
        self._starts.setdefault(part.runs[0].window, len(self.log))
        below = [run for run in part.runs if int(run.layer or 0) <= self._template]
        above = [run for run in part.runs if int(run.layer or 0) > self._template]
        template = next(run for run in part.runs if run.layer == self._template)
        copies = [(template, shift) for shift in range(1, self._added + 1)]
        upwards = [(run, 0) for run in below], copies, [(run, self._added) for run in above]
        downwards = [(run, self._added) for run in above], copies[::-1], [(run, 0) for run in below]
        for group in upwards if part.step == 1 else downwards:
            for run, shift in group:
                self._append(run, shift=shift)

    def _append(self, run: Run, *, shift: int | None) -> None:
        """The moments of one run; `shift` is how far its layer moves, None for a run of no layer."""
        places, storages, append = self._places, self._storages, self.log.append
        layer = int(run.layer or 0) + int(shift or 0)
        for kind, storage, phase, module in run.moments:
            place = places.get(storage.id)
            key: Place | int = storage.id if place is None else self._moved(place, run.layer, shift)
            if kind == "alloc":
                storages[key] = self._copied(storage, key)
            elif key not in storages:
                raise NotRepeatingError(f"{storage.op} in {module} is freed before it is allocated")
            append(Moment(kind, storages[key], phase, self._renamed(module, layer) if shift else module))

    def _moved(self, place: Place, layer: int | None, shift: int | None) -> Place:
        chain, made_in, ordinal = place
        if layer is None or shift is None:
            return chain, made_in + (self._added if made_in > self._template else 0), ordinal
        if abs(made_in - layer) > self._template:
            raise NotRepeatingError(f"layer {layer} frees what layer {made_in} made")
        target = made_in + shift
        source = target if target <= self._template else max(self._template, target - self._added)
        return chain, target, self._counterpart(chain, made_in, source, ordinal)

    def _counterpart(self, chain: int, layer: int, other: int, ordinal: int) -> int:
        """The same tensor's ordinal in another layer's run: first and last layers may make a few tensors more or fewer."""
        if layer == other:
            return ordinal
        key = (chain, layer, other, ordinal)
        if key not in self._counterparts:
            self._counterparts[key] = self._ordinal_in(*key)
        return self._counterparts[key]

    def _ordinal_in(self, chain: int, layer: int, other: int, ordinal: int) -> int:
        ours, theirs = self._allocated[chain, layer], self._allocated[chain, other]
        from_end = len(theirs) - len(ours) + ordinal
        if len(ours) == len(theirs) and _alike(ours[ordinal], theirs[ordinal]):
            return ordinal
        for position in (ordinal, from_end, *self._of_kind(ours, theirs, ordinal)):
            if 0 <= position < len(theirs) and _kin(ours[ordinal], theirs[position], self._named):
                return position
        raise NotRepeatingError(f"layer {other} has no counterpart of {ours[ordinal].op} in {ours[ordinal].module}")

    def _of_kind(self, ours: Sequence[Storage], theirs: Sequence[Storage], ordinal: int) -> Iterator[int]:
        """The place of the same tensor among those of its kind in the other layer, counted from the first and from the last."""
        one = ours[ordinal]
        before = sum(_kin(one, other, self._named) for other in ours[:ordinal])
        behind = sum(_kin(one, other, self._named) for other in ours[ordinal + 1 :])
        kind = [position for position, other in enumerate(theirs) if _kin(one, other, self._named)]
        if len(kind) == before + behind + 1:
            yield kind[before]
        elif len(kind) > behind:
            yield kind[-1 - behind]

    def _copied(self, storage: Storage, key: Place | int) -> Storage:
        if isinstance(key, int):
            more_bytes, more = next(self._growth)
            shape = tuple(dim + self._added * extra for dim, extra in zip(storage.shape, more, strict=True))
            return replace(storage, id=len(self._storages), nbytes=storage.nbytes + self._added * more_bytes, shape=shape)
        s = storage
        name = None if s.name is None else self._renamed(s.name, key[1])
        module = self._renamed(s.module, key[1])
        number = len(self._storages)  # `replace` would take as long as all the rest
        return Storage(
            number, s.nbytes, s.shape, s.dtype, s.op, module, s.phase, s.segment, s.in_forward, s.category, name, s.freed_segment,
            s.ones, s.stream,
        )  # fmt: skip

    def _renamed(self, name: str, layer: int) -> str:
        key = (name, layer)
        if key not in self._names:
            self._names[key] = self._named.renamed(name, layer)
        return self._names[key]

    def phases(self, began: Began) -> Began:
        """Where each phase begins in the longer log; an empty phase begins where the next one does."""
        starts: Began = []
        following = len(self.log)
        for window in range(len(began) - 1, -1, -1):
            following = self._starts.get(window, following)
            starts.append((following, began[window][1]))
        return starts[::-1]


def _kin(one: Storage, other: Storage, layer_of: Layers) -> bool:
    names = [layer_of.renamed(s.name or s.module, 0) for s in (one, other)]
    return _alike(one, other) and names[0] == names[1]


def _alike(one: Storage, other: Storage) -> bool:
    return (one.op, one.shape, one.dtype) == (other.op, other.shape, other.dtype)


def same(one: Sequence[Moment], other: Sequence[Moment]) -> bool:
    """Whether two logs allocate and free the same bytes, in the same order and phases."""
    return len(one) == len(other) and _signature(one) == _signature(other)


def _signature(log: Sequence[Moment]) -> list[tuple[str, int, str, int]]:
    numbers: dict[int, int] = {}
    return [(m.kind, m.storage.nbytes, m.phase, numbers.setdefault(m.storage.id, len(numbers))) for m in log]

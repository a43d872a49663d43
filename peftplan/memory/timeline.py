"""From the log of a tape to peaks: what is alive at each moment, evaluated at named sizes.

The log holds two layers of each kind. The layers between are copies: what the last layer of the kind added and freed between
two boundaries, times their number (`depth.copies`).
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from peftplan.arrays import Derived, Size
from peftplan.depth.copies import Layers, Stack, copies_of
from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Category, Dim, Line
from peftplan.memory.optimizer import STATES
from peftplan.memory.packed_waves import added_up
from peftplan.memory.waves import Waves, waves_of
from peftplan.tape.allocations import PASSED
from peftplan.tape.tape import Tape
from peftplan.units import ALLOCATION_ROUNDING

PHASES = ("forward", "backward", "step")
EMPTIED = "emptied"
"""The mark where a trainer gives cached segments back."""


Event = tuple[int, int]
"""A kind of tensor, and how many are made (or freed, below 0)."""
Window = tuple[str, int, int]
"""A phase: its first event, and the one after its last."""


class Kind(NamedTuple):
    """What tells lines of activations apart."""

    name: str
    category: Category
    dtype: str
    dims: tuple[Dim, ...]


class Repeated(NamedTuple):
    """Events of a timeline, `first` to before `last`, that stand for whole layers."""

    first: int
    last: int
    layers: tuple[Layers, ...]


class Timeline(NamedTuple):
    """Every event of a step: which kind of tensor, how many are made (or freed), and where each phase begins."""

    kinds: tuple[Kind, ...]
    sources: tuple[str, ...]
    events: tuple[Event, ...]
    windows: tuple[Window, ...]
    products: Mapping[tuple[str, str], int] = MappingProxyType({})
    """(library, thread) of each workspace that a matrix product takes → the event before which the first one takes it."""
    storages: tuple[int, ...] = ()
    """Which storage of the tape each event makes or frees."""
    repeated: tuple[Repeated, ...] = ()
    kind_of: Sequence[int] = ()
    """Storage of the tape → its kind."""
    tensors: Mapping[int, int] = MappingProxyType({})
    """Storages that stand for several tensors → how many."""
    states: tuple[int, ...] = ()
    """The event before which the first step makes the optimizer's states, of each group of parameters that it steps over."""
    emptied: tuple[int, ...] = ()
    """The events before which cached segments are given back."""
    pinned: tuple[tuple[int, int, str], ...] = ()
    """What the first step leaves for good: the event before which it is made, its bytes, and its name."""
    sizes: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """The sizes of tensors that occur: bytes, times these named sizes."""
    size_of: tuple[int, ...] = ()
    """Kind → its place in `sizes`."""
    moves: tuple[tuple[int, int], ...] = ()
    """By how much events change the level: a place in `sizes`, and a count."""
    move_of: tuple[int, ...] = ()
    """Counted event → its place in `moves`."""
    counted_events: tuple[Event, ...] = ()
    """The events that peaks are counted from: all, and the outputs of the step before, where the caller keeps those until the
    next forward has returned."""
    counted: tuple[Window, ...] = ()
    """Their windows, and the end once more as the next step's forward, where gradients live until that begins."""
    waves: Waves = Waves()
    """The events as few different waves, which peaks are added up from."""
    handed_on: frozenset[int] = frozenset()
    """Storages that live on until the next step's `passed`."""
    passed: tuple[int, ...] = ()
    """The event before which what the step before has handed on goes."""
    collected: frozenset[int] = frozenset()
    """Storages of the batches, where those of the step before live until these are on the device."""
    streams: Mapping[int, int] = MappingProxyType({})
    """Storages that are made on another CUDA stream than the default one → its number."""
    derived: tuple[Derived, ...] = ()
    """The named sizes that are computed from others."""

    def peaks(self, sizes: Mapping[str, int], standing: int = 0) -> dict[str, tuple[int, int]]:
        """Phase → (bytes, how many events lead to them), on top of `standing` bytes that are always there."""
        if (known := added_up(self, sizes, standing)) is not None:
            return known[1]
        rounded = [-(-nbytes // ALLOCATION_ROUNDING) * ALLOCATION_ROUNDING for nbytes in self._evaluated(sizes)]
        return self.waves.peaks([count * rounded[place] for place, count in self.moves], standing)

    def requested(self, sizes: Mapping[str, int]) -> Sequence[int]:
        """Bytes of a tensor of each kind as asked for, before rounding."""
        if (known := added_up(self, sizes)) is not None:
            return array("q", known[0])
        nbytes = self._evaluated(sizes)
        return [nbytes[place] for place in self.size_of]

    def with_derived(self, sizes: Mapping[str, Size]) -> dict[str, Size]:
        """These sizes, and those of its tensors that are computed from them."""
        return {**sizes, **{name: name.at(sizes) for name in self.derived}}

    def _evaluated(self, sizes: Mapping[str, int]) -> list[int]:
        return [nbytes * prod([sizes[name] for name in names]) for nbytes, names in self.sizes]

    def lines(self, end: int, sizes: Mapping[str, int]) -> tuple[Line, ...]:
        """What the first `end` of the counted events leave alive.

        A copied layer hands on one hidden state and takes another, whose categories can differ: they balance by name.
        """
        counts: dict[int, int] = {}
        for kind, count in self.counted_events[:end]:
            counts[kind] = counts.get(kind, 0) + count
        alive: dict[tuple[str, str, tuple[Dim, ...]], dict[Category, int]] = {}
        sources: dict[tuple[str, str, tuple[Dim, ...]], str] = {}
        for kind, count in counts.items():
            if count:
                k = self.kinds[kind]
                of_name = alive.setdefault((k.name, k.dtype, k.dims), {})
                of_name[k.category] = of_name.get(k.category, 0) + count
                sources[k.name, k.dtype, k.dims] = self.sources[kind]
        lines = []
        for (name, dtype, dims), by_category in alive.items():
            if min(by_category.values()) < 0:
                by_category = {max(by_category, key=lambda c: by_category[c]): sum(by_category.values())}
            source = sources[name, dtype, dims]
            lines += [
                Line(name, category, dtype, dims, count, source, sizes=sizes) for category, count in by_category.items() if count
            ]
        return tuple(lines)


def _size(kind: Kind) -> tuple[int, tuple[str, ...]]:
    """The bytes of a tensor: a number, times named sizes."""
    numbered = prod(dim for dim in kind.dims if isinstance(dim, int))
    return ITEMSIZE[kind.dtype] * numbered, tuple(sorted(dim for dim in kind.dims if isinstance(dim, str)))


def timeline(
    tape: Tape, stacks: Iterable[Stack], *, vocab: int | None, keeps_gradients: bool = False, outputs_outlive_step: bool = False
) -> Timeline:
    """The timeline of a tape whose marks bound the sections of `stacks`. `keeps_gradients`: as of `Units`;
    `outputs_outlive_step`: as of `Script`."""
    index: dict[Kind, int] = {}
    sources: list[str] = []
    kind_of = [0]
    savers = tape.savers
    stated, freed_in = tape.category.get, tape.freed.get
    seen: dict[tuple[object, ...], int] = {}  # what decides a kind → its place
    for n, (name, dtype, dims, made_in) in enumerate(zip(tape.names, tape.dtypes, tape.dims, tape.made_in, strict=True)):
        if n == 0:
            continue
        category = stated(n)
        key = name, dtype, dims, (made_in > 0 and freed_in(n) != made_in) if category is None else category
        if (place := seen.get(key)) is None:
            place = seen[key] = index.setdefault(Kind(name, _category(tape, n, vocab), dtype, dims), len(index))
            if place == len(sources):
                sources.append(_source(savers.get(n)))
        kind_of.append(place)
    kinds = tuple(index)
    events: list[tuple[int, int]] = []
    storages: list[int] = []
    starts: list[tuple[str, int]] = []
    copies, outliving = copies_of(tape, stacks)
    repeated: list[Repeated] = []
    standing_for: dict[int, int] = {}
    counts = tape.counts
    makes, frees = [(kind, 1) for kind in range(len(kinds))], [(kind, -1) for kind in range(len(kinds))]
    allocated, freed = [(0, 1), *map(makes.__getitem__, kind_of[1:])], [(0, -1), *map(frees.__getitem__, kind_of[1:])]
    for n, count in counts.items():
        allocated[n], freed[n] = (kind_of[n], count), (kind_of[n], -count)
    numbers = list(range(len(kind_of)))
    event_of = [*allocated, *freed[:0:-1]]  # what the log holds → its event: below 0 a storage that is freed, from the end
    storage_of = [*numbers, *numbers[:0:-1]]  # the same of its storage: each number once in memory
    position = 0
    states: list[int] = []
    emptied: list[int] = []
    passed: list[int] = []
    shifts = [(0, 0)]  # of events against the log, from a position on
    for at, what in (*tape.marks, (len(tape.log), "")):
        part = tape.log[position:at]
        if standing_for:
            for n in part:
                if n < 0 and -n in standing_for and -n not in counts:
                    events.append((kind_of[-n], -1 - standing_for.pop(-n)))
                else:
                    events.append(event_of[n])
        else:
            events += map(event_of.__getitem__, part)
        storages += map(storage_of.__getitem__, part)
        position = at
        here = copies.get((at, what), ())
        before = len(events)
        net = [(n, len(layers.turns)) for layers in here for n in layers.net]
        for n, count in sorted(net, key=lambda change: change[0] > 0):  # frees first, as in `depth.copies`: kinds take turns
            if n in outliving:
                standing_for[outliving[n]] = standing_for.get(outliving[n], 0) + count
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
            shifts.append((at, len(events) - at))
        if what in PHASES:
            starts.append((what, len(events)))
        if what == STATES:
            states.append(len(events))
        if what == EMPTIED:
            emptied.append(len(events))
        if what == PASSED:
            passed.append(len(events))
    ends = [start for _, start in starts[1:]] + [len(events)]
    windows = tuple((phase, start, end) for (phase, start), end in zip(starts, ends, strict=True))
    of_step = tuple(events)
    outputs = _outputs(tuple(index), of_step, windows) if outputs_outlive_step else []
    counted_events, counted = _after_outputs(outputs, of_step, windows)
    counted += ((PHASES[0], len(counted_events), len(counted_events)),) * keeps_gradients
    products = {
        workspace: at + max(more for start, more in shifts if start <= at)
        for workspace, at in _products(tape, kinds, kind_of).items()
    }
    sizes: dict[tuple[int, tuple[str, ...]], int] = {}
    size_of = tuple(sizes.setdefault(_size(kind), len(sizes)) for kind in index)
    moves: dict[tuple[int, int], int] = {}
    of_event = {event: moves.setdefault((size_of[event[0]], event[1]), len(moves)) for event in dict.fromkeys(counted_events)}
    move_of = tuple(map(of_event.__getitem__, counted_events))
    return Timeline(
        tuple(index),
        tuple(sources),
        of_step,
        windows,
        products,
        tuple(storages),
        tuple(repeated),
        kind_of,
        counts,
        tuple(states),
        tuple(emptied),
        tuple((at + max(more for start, more in shifts if start <= at), n, name) for at, n, name in tape.pinned),
        sizes=tuple(sizes),
        size_of=size_of,
        moves=tuple(moves),
        move_of=move_of,
        counted_events=counted_events,
        counted=counted,
        waves=waves_of(move_of, [count for _, count in moves], counted),
        handed_on=frozenset(tape.handed_on),
        passed=tuple(passed[:1]),
        collected=frozenset(tape.collected),
        streams=tape.streams,
        derived=tuple(sorted({name for _, names in sizes for name in names if isinstance(name, Derived)})),
    )


def outputs_kept(kind: Kind, count: int) -> bool:
    """Whether what a step frees after its backward is an output, which its caller may keep."""
    return count < 0 and kind.category != "temporaries"


def _outputs(kinds: Sequence[Kind], events: tuple[Event, ...], windows: Sequence[Window]) -> list[Event]:
    """What is freed once the last backward has returned, as events that make it."""
    return [(kind, -count) for kind, count in events[windows[-1][1] :] if outputs_kept(kinds[kind], count)]


def _after_outputs(
    outputs: list[Event], events: tuple[Event, ...], windows: tuple[Window, ...]
) -> tuple[tuple[Event, ...], tuple[Window, ...]]:
    """The events of a step that begins with the outputs of the one before and frees these where its forward has returned."""
    if not outputs:
        return events, windows
    (forward, start, end), *later = windows
    freed = [(kind, -count) for kind, count in outputs]
    shift = 2 * len(outputs)
    moved = ((phase, first + shift, last + shift) for phase, first, last in later)
    return (*outputs, *events[:end], *freed, *events[end:]), ((forward, start + len(outputs), end + shift), *moved)


PRODUCTS = {"linear": "cuBLAS", "mm": "cuBLAS", "bmm": "cuBLAS", "addmm": "cuBLASLt"}
"""Matrix products → the library that computes them: those that add a bias go to cuBLASLt."""


def _products(tape: Tape, kinds: Sequence[Kind], kind_of: Sequence[int]) -> dict[tuple[str, str], int]:
    """Library and thread of each workspace → where in the log the first product takes it, once its result is there.

    Autograd's backward, and what it recomputes, runs in a thread of its own, with handles of its own.
    """
    first_product: dict[tuple[str, str], int] = {}
    of_kind = [PRODUCTS.get(kind.name.rpartition(" ")[2]) for kind in kinds]
    library_of = [None, *map(of_kind.__getitem__, kind_of[1:])]
    for n, name in tape.made_as.items():
        library_of[n] = PRODUCTS.get(name.rpartition(" ")[2])
    libraries = {library for library in library_of[1:] if library is not None}
    starts = [(0, ""), *((at, what) for at, what in tape.marks if what in PHASES), (len(tape.log), "")]
    for (start, what), (end, _) in pairwise(starts):
        thread = "backward" if what == "backward" else "forward"
        sought = {library for library in libraries if (library, thread) not in first_product}
        for at, n in enumerate(tape.log[start:end] if sought else (), start + 1):
            if n > 0 and (library := library_of[n]) in sought:
                first_product[str(library), thread] = at
                sought.discard(library)
                if not sought:
                    break
    phases = [(at, what) for at, what in tape.marks if what in PHASES]
    for at, library in tape.products:
        phase = max((start, what) for start, what in phases if start <= at)[1]
        workspace = (library, "backward" if phase == "backward" else "forward")
        first_product[workspace] = min(at, first_product.get(workspace, at))
    return first_product


def _source(saver: str | None) -> str:
    """Who keeps a tensor: the operation whose backward needs it (torch, derivatives.yaml)."""
    return "analytic" if saver is None else f"analytic: kept by {saver.strip('_').removesuffix('_backward')}"


def _category(tape: Tape, number: int, vocab: int | None) -> Category:
    """As the trace engine sorts: stated, logits by their last dim, activations if forward code made it and something kept it."""
    category = tape.category.get(number)
    if category is not None:
        return category
    dims = tape.dims[number]
    if vocab is not None and len(dims) > 1 and dims[-1] == vocab and not isinstance(dims[0], int):
        return "logits"
    made_in = tape.made_in[number]
    return "activations" if made_in > 0 and tape.freed.get(number) != made_in else "temporaries"

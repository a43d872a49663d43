"""ZeRO-3's coordinator on the tape: which parameters are gathered when a module runs, which ahead of it, and when they are freed.

Source: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py and partition_parameters.py; methods have its names. It
records the order in which modules run, from the beginning of a forward to that of the next, and then follows it:

    a module begins     its parameters are gathered, or waited for | behind them in the order, as many as the prefetch bucket
                        holds, while fewer than `max_live_parameters` elements are there
    a module ends       its parameters are freed, unless they are small enough to persist, or the order names them again before
                        `max_reuse_distance` elements

A module that the order does not name next ends it: what is gathered ahead is freed, and the next forward is recorded again. This
happens in each step of DPO with LoRA, whose second forward calls no adapter.

Several parameters are gathered into one buffer, and copied out of it when the first of them is needed. The buffer lives until the
last of them is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from peftplan.ledger import Category
from peftplan.tape.streams import on_stream
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor

GATHER, REDUCE, GATHER_OF_SECOND = 1, 2, 3
"""Streams of the gathers, of the reductions, and of the gathers of a second model's engine; 0 is the default one."""
DTYPES = ("bf16", "fp16", "fp32", "fp64", "int8", "uint8")
"""The order in which parameters of several dtypes are gathered: by torch's names (runtime/torch_autocast.py, `sort_dtypes`)."""


@dataclass(eq=False)
class Sharded:
    """A parameter of which each rank holds a part. Numbers of elements."""

    number: int
    """Its place in the order in which parameters were divided."""
    name: str
    numel: int
    part: int
    """A rank's part, padded."""
    dtype: str
    trainable: bool
    persists: bool
    """Whether it stays gathered from one optimizer step to the next."""
    whole: Tensor | None = None
    handle: Handle | None = None
    """Its gather, while nothing has waited for it."""
    active: set[str] = field(default_factory=set)
    """The modules that need it now."""


class Module(NamedTuple):
    """A call of a module: its name with the number of its layer, and its own parameters."""

    name: str
    parameters: tuple[Sharded, ...]
    leaf: bool = False
    """Whether they are those of all modules inside, which have no hooks (`z3_leaf_module`)."""


class Handle:
    """A gather in flight: its parameters, and the buffers that they are copied out of, one per dtype."""

    __slots__ = ("buffers", "parameters")

    def __init__(self) -> None:
        self.parameters: list[Sharded] = []
        self.buffers: list[Tensor] = []


class Limits(NamedTuple):
    """Elements: of the prefetch bucket, of what may be gathered at once, and to the next use of what is not freed."""

    prefetch_bucket: int
    max_live: int
    max_reuse: int


class Coordinator:
    """`PartitionedParameterCoordinator`. `order`: the modules in the order of forward and backward; None: it is not known."""

    def __init__(
        self,
        f: Tape,
        order: Sequence[Module] | None,
        limits: Limits,
        *,
        world_size: int,
        overlaps: bool,
        offloads: bool,
        inside: Callable[[Module], Iterable[Sharded]] = lambda module: module.parameters,
        follows: bool = True,
    ) -> None:
        """`inside`: the parameters of a module and of all modules inside it. `follows`: an order that was recorded is used;
        otherwise nothing is gathered ahead, and forward frees what backward needs: `__params_to_release` still has what it said
        of an earlier order, of a forward alone.
        """
        self.f, self.limits, self.world_size, self.offloads = f, limits, world_size, offloads
        self.inside, self.follows = inside, follows
        self.stream = GATHER if overlaps else 0
        self.order: tuple[Module, ...] = ()
        self.recorded: list[Module] | None = None
        """The order so far, while it is recorded."""
        self.queue: deque[tuple[Sharded, int]] = deque()
        self.step = self.live = 0
        self.inflight: dict[Sharded, Handle] = {}
        self.decided: dict[tuple[str, int], frozenset[int]] = {}
        """Module and place in the order → the numbers of parameters that stay when it ends. DeepSpeed computes them once for all
        steps (`lru_cache` of `__params_to_release`)."""
        self._latest: dict[Sharded, int] = {}
        """The last place in the order for which a parameter was fetched."""
        self._uses: dict[Sharded, list[int]] = {}
        self._before: list[int] = []
        if order:
            self._complete(order)

    def _complete(self, order: Sequence[Module]) -> None:
        self.order, self.recorded = tuple(order), None
        own = [() if module.leaf else module.parameters for module in self.order]
        self._uses.clear()
        self._before = [0, *accumulate(sum(p.numel for p in parameters) for parameters in own)]
        for place, parameters in enumerate(own):
            for p in parameters:
                self._uses.setdefault(p, []).append(place)

    def reset_step(self) -> None:
        """A forward begins; if another one was recorded, its order is known."""
        self._land()
        if self.recorded is not None and self.follows:
            self._complete(self.recorded)
        elif not self.order:
            self.recorded = []
        self.queue = deque((p, place) for place, module in enumerate(self.order) for p in sorted(module.parameters, key=_number))
        self._latest.clear()
        self.step = self.live = 0

    def _land(self) -> None:
        """`_clean_inflight_param_registry`: wait for what is in flight, and free it."""
        for p in [*self.inflight]:
            self._wait(p)
            self.free(p)

    def _end_order_unless_next(self, module: Module) -> None:
        """`trace_prologue`: a module that the order does not name next ends the order, and frees what is in flight."""
        if self.order and (self.step >= len(self.order) or self.order[self.step].name != module.name):
            self.order = ()
            self.queue.clear()
            self._latest.clear()
            self._land()

    def fetch(self, module: Module, *, known: Module | None = None) -> None:
        """`fetch_sub_module`: gather what a module needs, wait for it, and prefetch what comes next. `known`: without those
        parameters that it is found to read only when it does.
        """
        self._end_order_unless_next(module)
        if self.recorded is not None:
            self.recorded.append(module)
        module = module if known is None else known
        if missing := [p for p in module.parameters if p.whole is None and p not in self.inflight]:
            self.all_gather(missing)
        for p in self.in_turn(module):
            p.active.add(module.name)
            if p in self.inflight:
                self._wait(p)
        if self.order:
            self._prefetch(module)
        self.step += 1

    def in_turn(self, module: Module) -> Sequence[Sharded]:
        """The order in which a module's parameters are waited for. DeepSpeed's is that of a set, and so of their addresses."""
        return module.parameters

    def _prefetch(self, module: Module) -> None:
        fresh = {p for p in module.parameters if self._latest.get(p, -1) < self.step}
        while self.queue and fresh:
            p, place = self.queue.popleft()
            self._latest[p] = place
            fresh.discard(p)
        most = min(self.limits.max_live - self.live, self.limits.prefetch_bucket) if self.follows else 0
        ahead: dict[Sharded, None] = {}
        numel = 0
        while self.queue and numel < most:
            p, place = self.queue.popleft()
            self._latest[p] = max(self._latest.get(p, -1), place)
            if p.whole is None and p not in self.inflight and p not in ahead:
                ahead[p] = None
                numel += p.numel
        if ahead:
            self.all_gather(ahead)

    def all_gather(self, parameters: Iterable[Sharded]) -> None:
        """`all_gather_coalesced`: one buffer per dtype; a single parameter is a view of its buffer."""
        parameters = sorted(parameters, key=_number)
        if not parameters:
            return
        self.live += sum(p.numel for p in parameters)
        if len(parameters) == 1:
            (p,) = parameters
            p.whole = self._new(p.part * self.world_size, p.dtype, f"{p.name} gathered", "gathered_weights")
            self._from_host([p])
            self.inflight[p] = Handle()
            return
        handle = Handle()
        by_dtype: dict[str, list[Sharded]] = {}
        for p in parameters:
            by_dtype.setdefault(p.dtype, []).append(p)
        for dtype, of_dtype in sorted(by_dtype.items(), key=lambda item: DTYPES.index(item[0])):
            numel = sum(p.part for p in of_dtype) * self.world_size
            handle.buffers.append(self._new(numel, dtype, "all-gather buffer", "communication"))
            handle.parameters += of_dtype
            self._from_host(of_dtype)
        self.inflight.update(dict.fromkeys(handle.parameters, handle))

    def _from_host(self, parameters: Iterable[Sharded], stream: int | None = None) -> None:
        """Parts that are offloaded reach the device for the gather alone."""
        if self.offloads:
            _parts = [self._new(p.part, p.dtype, f"{p.name} on its way", "communication", stream) for p in parameters]

    def gather_alone(self, p: Sharded) -> None:
        """A parameter is read outside the module that owns it (parameter_offload.py, `ZeROOrderedDict`)."""
        if p.whole is None:
            p.whole = self._new(p.part * self.world_size, p.dtype, f"{p.name} gathered", "gathered_weights", 0)
            self._from_host([p], 0)

    def gather_together(self, parameters: list[Sharded]) -> None:
        """`_allgather_params_coalesced` at the end of a step, after which parts that the host sent are freed.

        Nothing stays on the tape, since the next step begins with the same gather.
        """
        _parts = [self._new(p.part, p.dtype, f"{p.name} on its way", "communication", 0) for p in parameters if self.offloads]
        _whole = [self._new(p.part * self.world_size, p.dtype, f"{p.name} gathered", "gathered_weights", 0) for p in parameters]

    def _wait(self, p: Sharded) -> None:
        """`AllGatherCoalescedHandle.wait`: all of the buffer is copied out, once."""
        handle = self.inflight.pop(p)
        for other in handle.parameters:
            if other.whole is None:
                other.whole = self._new(other.numel, other.dtype, f"{other.name} gathered", "gathered_weights")
        handle.parameters = []

    def release(self, module: Module, also: Iterable[Sharded] = ()) -> None:
        """`release_sub_module`: free a module's parameters that are not needed soon, and `also`, which it recomputed."""
        also = [*also]
        for p in (*module.parameters, *also):
            p.active.discard(module.name)
        knows = bool(self.order) and (self.follows or self.f.recomputes or self.f.segment < 0)
        if knows and (module.name, self.step) not in self.decided:
            self.decided[module.name, self.step] = frozenset(p.number for p in self._staying(module))
        stay = self.decided[module.name, self.step] if knows else frozenset()
        for p in module.parameters:
            if not knows or not (p.persists or p.number in stay):
                self.free(p)
        for p in also:
            if not p.persists:
                self.free(p)

    def _staying(self, module: Module) -> Iterable[Sharded]:
        """`__params_to_release`: the parameters of a module that are needed soon."""
        soon = self._inside_soon() if module.leaf else None
        for p in module.parameters:
            if self._latest.get(p, -1) > self.step or (self._is_needed_soon(p) if soon is None else p in soon):
                yield p

    def _is_needed_soon(self, p: Sharded) -> bool:
        """Whether a later use is near. Modules without hooks inside count as if they had no parameters."""
        uses = self._uses.get(p, [])
        following = bisect_left(uses, self.step)
        if following == len(uses):
            return False
        return self._before[uses[following]] - self._before[self.step] < self.limits.max_reuse

    def _inside_soon(self) -> set[Sharded]:
        """The same for a module without hooks inside: those of the modules that come next and of all inside them."""
        soon: set[Sharded] = set()
        traversed = 0
        for module in self.order[self.step :]:
            if traversed >= self.limits.max_reuse:
                break
            parameters = [*self.inside(module)]
            soon.update(parameters)
            traversed += sum(p.numel for p in parameters)
        return soon

    def free(self, p: Sharded) -> None:
        """`__release_param`."""
        if p.whole is not None and p not in self.inflight and not p.active:
            p.whole = None
            self.live -= p.numel

    def release_all(self, parameters: Iterable[Sharded]) -> None:
        """`release_and_reset_all`, before the optimizer's step."""
        for p in parameters:
            if p in self.inflight:
                self._wait(p)
            p.active.clear()
            self.free(p)

    def _new(self, numel: int, dtype: str, op: str, category: Category, stream: int | None = None) -> Tensor:
        return on_stream(self.f, (numel,), dtype, op, self.stream if stream is None else stream, category)


def _number(p: Sharded) -> int:
    return p.number

"""Compile a job: run its step once on a tape with symbolic sizes, and cache it for all sizes that run the same operations."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from peftplan.analytic import steady
from peftplan.analytic.checks import check
from peftplan.analytic.loading import loading_of
from peftplan.analytic.running import empties_first, limits_of, loss_sizes, segments_grow
from peftplan.analytic.sizes import NO_LIMITS, Limits, shape_facts, sizes
from peftplan.arch.modules import Architecture
from peftplan.arch.text_part import has_towers
from peftplan.arrays import Fact, Size
from peftplan.dtypes import ITEMSIZE
from peftplan.hardware.context import CUBLASLT_WORKSPACE_BYTES, cublas_workspace_bytes
from peftplan.job.inventory import of_any_device
from peftplan.job.loss_sizes import LossSizes
from peftplan.job.setup import Setup
from peftplan.ledger import Dim, Ledger, Line
from peftplan.memory.batch import of_pictures_or_sound
from peftplan.memory.dora_load import norms
from peftplan.memory.loaded import Loader
from peftplan.memory.timeline import Timeline, timeline
from peftplan.optim import parse_optim
from peftplan.parameters import Parameters
from peftplan.units import pinned

if TYPE_CHECKING:
    from peftplan.allocator import program as events
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job

    OfRank = tuple[int | None, int | None] | None


class Compiled(NamedTuple):
    """A job without its sizes: the tensors that last from step to step, the peak of loading, and the timeline of a step."""

    architecture: Architecture
    timeline: Timeline
    standing: Ledger
    loading: Ledger
    load: Loader
    """Loads the model tensor by tensor."""
    standing_bytes: int
    loading_bytes: int
    programs: "dict[tuple[int, ...], Written]"
    """Cache of `analytic.reserved`: the programs of the runs that end with this step."""
    virtual_tokens: int
    loss: LossSizes
    rows: int = 1
    """Sequences of a forward for each example of the batch size."""
    early: tuple[Line, ...] = ()
    """Optimizer states that the constructor allocates before the first step."""
    built: tuple[Line, ...] = ()
    """What a strategy holds besides weights and states, such as fp32 masters; loading allocates it."""
    buckets: tuple[int, ...] = ()
    """Bytes of each of DDP's buckets: one of all gradients in the first step, which the second forward divides."""
    first_run: Loader | None = None
    """What the first forward alone makes and frees."""
    load_if_full: Loader | None = None
    """How a card that is too small for `load` is loaded, if there is another way."""
    workspaces: tuple[tuple[int, Line], ...] = ()
    """Each workspace, with the index of the event before which it is allocated."""
    on_host: tuple[tuple[tuple[Dim, ...], str, int], ...] = ()
    """Dims, dtype and count of the tensors that are offloaded to the host until backward."""
    first: "Compiled | None" = None
    """The first step, where it allocates otherwise than all later ones."""
    expandable: bool = False
    """Whether the allocator's segments grow."""
    limits: Limits = NO_LIMITS
    """Numbers of tokens above which the step allocates otherwise."""
    empties_cache: bool = False
    """Whether cached segments are given back after each backward."""
    empties_before: bool = False
    """Whether they are given back before each backward."""
    empties_first: bool = False
    """Whether they are given back before each backward of the first step."""
    by_processors: bool = False
    """Whether the card's multiprocessors decide a kernel or the size of a buffer."""
    idle: frozenset[str] = frozenset()
    """Families without gradients, and so without optimizer states."""
    reduced: "tuple[tuple[str, int | None], ...]" = ()
    """Tensors, by name and layer, in the order in which ZeRO-1 and ZeRO-2 reduce their gradients."""
    like: "Compiled | None" = None
    """The step on an earlier GPU of a `device_map` that needs as much at all sizes."""

    def facts(self, batch_size: Size, seq_len: Size) -> tuple[Fact, ...]:
        """`shape_facts` of this job at these sizes, numbers or arrays."""
        length = self.loss.row(seq_len) + self.virtual_tokens
        return shape_facts(batch_size * self.rows, length, self.architecture, self.loss, self.limits)

    def sizes(self, batch_size: Size, seq_len: Size) -> dict[str, Size]:
        """Name → size for a batch size and a sequence length, numbers or arrays."""
        by_name = sizes(batch_size * self.rows, self.loss.row(seq_len), virtual_tokens=self.virtual_tokens, loss=self.loss)
        return self.timeline.with_derived(by_name)

    def assumed(self, by_name: Mapping[str, int]) -> dict[str, int]:
        """Facts that a result states besides the setup: pinned host bytes of what is offloaded until backward."""
        nbytes = sum(
            count * pinned(ITEMSIZE[dtype] * prod(dim if isinstance(dim, int) else by_name[dim] for dim in dims))
            for dims, dtype, count in self.on_host
        )
        of_text = {"images_per_sample": 0} if has_towers(self.architecture) else {}
        return of_text | ({"offloaded_bytes": nbytes} if nbytes else {})


class Written(NamedTuple):
    """A program, the last sizes of its table, and its steps. The cache's key holds their ids, so they must stay alive."""

    program: "events.Program"
    sizes: list[int]
    steps: "list[Compiled]"
    generation: object = None


Step = tuple[Compiled, dict[str, int]]
"""A step of a run, with its sizes."""
Steps = tuple[Step, ...]
"""The steps of a run. The last one is reported."""


_LATEST: "list[tuple[Inventory, str, bool, Step]]" = []
"""The job of which the step was asked for last, for which kernels, and whether as a late GPU leaves it: one estimate asks for it
several times."""


def last_step(inventory: "Inventory", compute_capability: str, *, late: bool = False) -> Step:
    """The step that is reported, with its sizes."""
    for of, of_kernels, is_late, step in _LATEST:
        if of is inventory and of_kernels == compute_capability and is_late is late:
            return step
    compiled_job = compiled(inventory, compute_capability=compute_capability, late=late)
    setup = inventory.job.setup
    step = compiled_job, compiled_job.sizes(setup.batch_size, setup.seq_len)
    _LATEST[:] = [(inventory, compute_capability, late, step)]
    return step


def steps_of(inventory: "Inventory", compute_capability: str, *, late: bool = False) -> Steps:
    """The steps of a run: the reported one twice, or once after the earlier steps that the script names.

    One more of it is run where the second is not steady yet. In full fine-tuning on one GPU, without earlier steps, and over a
    `device_map` the gradient of a tied embedding finds room in the second step, and none in the third. So may a batch of
    pictures or sound. Under DDP the second step divides its bucket. Under ZeRO-3 the first step gathers
    nothing ahead, so that the second one is the first of its kind.
    `late`: as the allocator sees them where the GPU is as late as it may be.
    """
    job = inventory.job
    last = last_step(inventory, compute_capability, late=late)
    before = [last_step(earlier, compute_capability, late=late) for earlier in _earlier(inventory)]
    of_last, sizes_of_last = last
    first = last if of_last.first is None else (of_last.first, sizes_of_last)
    full = job.method is not None and job.method.name == "full"
    alone = (full or of_pictures_or_sound(job.architecture)) and not before  # as the trace does
    again = (last,) * (alone if job.distributed is None else job.distributed.strategy in ("device-map", "ddp", "zero3"))
    return (*before, *again, last) if before else (first, *again, last)


def by_processors(inventory: "Inventory", compute_capability: str) -> bool:
    """Whether the card's multiprocessors decide a kernel or a buffer of a step; if not, its compute capability alone does."""
    steps = (last_step(of, compute_capability) for of in (inventory, *_earlier(inventory)))
    return any(step.by_processors for step, _ in steps)


def _earlier(inventory: "Inventory") -> "Iterator[Inventory]":
    """The steps before the reported one that a script names, each with its own sequence length."""
    job, setup = inventory.job, inventory.job.setup
    for number, tokens in enumerate(job.script.earlier_seq_lens or ((setup.seq_len,) if setup.keep_gradients else ())):
        there = setup.keep_gradients and number > 0  # the first step starts without gradients
        earlier = setup.model_copy(update={"seq_len": tokens, "keep_gradients": there})
        yield inventory._replace(job=job._replace(setup=earlier))


COMPILED: "OrderedDict[tuple[object, ...], Compiled]" = OrderedDict()
"""The jobs compiled last. Each is valid for all sizes with the same `shape_facts`."""
COMPILED_KEPT = 256


def compiled(inventory: "Inventory", *, compute_capability: str, late: bool = False) -> "Compiled":
    """The job compiled for all sizes that run the same operations; cached. `late`: as in `steps_of`.

    Raises NeedsTraceError or NoEngineError if a part of the job has no formula.
    """
    job = inventory.job
    of_rank, step_key, keys = _keys(inventory, compute_capability, late=late)
    if (kept := _kept(keys)) is not None:
        return kept
    check(job)
    assert not of_any_device(inventory), "each GPU is compiled apart"
    compiled_job = _of_other_states(inventory, of_rank, step_key) or compile_job(
        inventory, (*step_key, job.multiprocessors), compute_capability=compute_capability, late=late
    )
    key = keys[compiled_job.by_processors]
    if of_rank and of_rank[0]:
        earlier = (COMPILED.get(((device, None), *key[1:])) for device in range(of_rank[0]))
        if like := next((other for other in earlier if _needs_as(compiled_job, other)), None):
            compiled_job = compiled_job._replace(like=like)
    COMPILED[key] = compiled_job
    if len(COMPILED) > COMPILED_KEPT:
        COMPILED.popitem(last=False)
    return compiled_job


def _of_other_states(inventory: "Inventory", of_rank: "OfRank", step_key: "Key") -> "Compiled | None":
    """The step of a rank of FSDP1, where the largest rank's is cached: it differs in the states of its optimizer alone."""
    distributed = inventory.job.distributed
    if distributed is None or distributed.strategy != "fsdp1" or of_rank in (None, (None, None)):
        return None
    counted_for_all = None, None
    of_largest = _kept(((counted_for_all, step_key), (counted_for_all, step_key, inventory.job.multiprocessors)))
    if of_largest is None or of_largest.early or of_largest.first is not None:
        return None
    lasting = [line for line in inventory.static if line.category == "optimizer_states" and line.place == "device"]
    states = (line for line in lasting if line.name.rpartition(".")[0] not in of_largest.idle)
    standing = Ledger((*(line for line in of_largest.standing if line.category != "optimizer_states"), *states))
    return of_largest._replace(standing=standing, standing_bytes=standing.bytes(), programs={})


def is_compiled(inventory: "Inventory", compute_capability: str) -> bool:
    """Whether the job is cached."""
    _, _, keys = _keys(inventory, compute_capability, late=False)
    return _kept(keys) is not None


Key = tuple[object, ...]


def _keys(inventory: "Inventory", compute_capability: str, *, late: bool) -> "tuple[OfRank, Key, tuple[Key, Key]]":
    """Which GPU sees the job, what decides its operations, and its places in the cache: of every such card, of one alone."""
    step_key = late, *key_of_step(inventory.job, compute_capability)
    of_rank = inventory.holding and (inventory.holding.device, inventory.holding.rank)
    return of_rank, step_key, ((of_rank, step_key), (of_rank, step_key, inventory.job.multiprocessors))


def _kept(keys: tuple[Key, Key]) -> "Compiled | None":
    for key in keys:
        if (kept := COMPILED.get(key)) is not None:
            COMPILED.move_to_end(key)
            return kept
    return None


def _needs_as(step: Compiled, other: Compiled | None) -> bool:
    """Whether a step needs as much as another one at all sizes."""
    if other is None or other.like is not None or other.standing_bytes != step.standing_bytes:
        return False
    a, b = step.timeline, other.timeline
    return (a.waves, a.moves, a.sizes, a.derived, step.on_host) == (b.waves, b.moves, b.sizes, b.derived, other.on_host)


_OF_SETUP = attrgetter(*(name for name in Setup.model_fields if name not in ("batch_size", "seq_len")))
_KEYED: "list[tuple[Job, str, tuple[object, ...]]]" = []
"""The job whose key was built last, and the key: one estimate asks for its steps several times, and for those of each rank."""


def key_of_step(job: "Job", compute_capability: str) -> tuple[object, ...]:
    """What decides which operations a job runs, for the kernels of a compute capability."""
    for of_job, of_kernels, key in _KEYED:
        if of_job is job and of_kernels == compute_capability:
            return key
    setup, loss = job.setup, loss_sizes(job)
    length = loss.row(setup.seq_len) + (getattr(job.config, "num_virtual_tokens", None) or 0)
    facts = shape_facts(setup.rows, length, job.architecture, loss, limits_of(job, compute_capability))
    config = job.config and repr(vars(job.config))
    described = (job.method and job.method.name, config, repr(job.quant), compute_capability)
    key = (id(job.architecture), *described, job.script, *facts, job.distributed, *_OF_SETUP(setup))
    _KEYED[:] = [(job, compute_capability, key)]
    return key


def compile_job(inventory: "Inventory", step_key: tuple[object, ...], *, compute_capability: str, late: bool) -> "Compiled":
    job, _, static, holding = inventory
    setup, architecture = job.setup, job.architecture
    if job.distributed is not None:
        from peftplan.analytic import ranks

        setup = ranks.setup_on_rank(job)
    model, first = steady.run(inventory, step_key, compute_capability=compute_capability, late=late)
    seen = model.tape if job.distributed is None else ranks.seen(inventory, model.tape)
    of_step = timeline(seen, model.stacks, vocab=architecture.vocab_size)
    on_tape = "gradients" if holding is None else holding.on_tape
    lasting = tuple(line for line in static if line.category != on_tape and line.place == "device")
    optimizer = parse_optim(str(setup.optim))
    early = tuple(line for line in lasting if optimizer.made_with_states and line.source == optimizer.source)
    idle = frozenset(() if early else model.units.idle(model.idle()))
    if idle:  # a parameter without a gradient has no state
        states = (line for line in lasting if line.category == "optimizer_states")
        stateless = {line.name for line in states if line.name.rpartition(".")[0] in idle}
        lasting = tuple(line for line in lasting if line.name not in stateless)
    buffers = Ledger(tuple(line for line in lasting if line.category == "buffers"))
    beside = holding.beside if holding is not None and model.units.every_layer else ()
    loaded = tuple(line for line in lasting if line.category != "optimizer_states" or line in beside)
    workspaces = _workspaces(of_step.products, compute_capability, apart=job.script.cublaslt_apart)
    standing = Ledger(lasting + tuple(line for _, line in workspaces))
    normed = _taken_by_norms(job, inventory.parameters, workspaces)
    workspaces = tuple((at, line) for at, line in workspaces if line != normed)
    load, passing = loading_of(inventory, model, setup, loaded=loaded, buffers=buffers, normed=normed)
    loading = Ledger(loaded + passing)
    if early:  # the optimizer is constructed after loading
        loading = max(loading, Ledger(loaded + early), key=Ledger.bytes)
    compiled_job = Compiled(
        architecture,
        of_step,
        standing=standing,
        loading=loading,
        load=load,
        standing_bytes=standing.bytes(),
        loading_bytes=loading.bytes(),
        programs={},
        early=early,
        built=(*(line for line in loaded if line in beside), *(() if job.distributed is None else ranks.stepped_first(load))),
        buckets=() if job.distributed is None else ranks.buckets_of(inventory),
        first_run=None if job.distributed is None else ranks.first_run(load),
        load_if_full=None if job.distributed is None else ranks.loaded_if_full(load),
        workspaces=workspaces,
        virtual_tokens=model.virtual_tokens,
        loss=loss_sizes(job),
        rows=setup.by.rows,
        on_host=tuple(model.on_host),
        expandable=segments_grow(setup),
        limits=limits_of(job, compute_capability),
        empties_cache=setup.by.empties_cache,
        empties_before=setup.by.empties_before,
        empties_first=empties_first(setup),
        idle=idle,
        reduced=() if job.distributed is None else ranks.reduced(model),
        by_processors=model.running.chip is not None or any(each.tape.asks_card for each in (model, first) if each),
    )
    if first is None:
        return compiled_job
    of_first = timeline(first.tape, first.stacks, vocab=architecture.vocab_size)
    workspaces = _workspaces(of_first.products, compute_capability, apart=job.script.cublaslt_apart)
    workspaces = tuple((at, line) for at, line in workspaces if line != normed)
    return compiled_job._replace(first=compiled_job._replace(timeline=of_first, workspaces=workspaces))


def _workspaces(products: Mapping[tuple[str, str], int], compute_capability: str, *, apart: bool) -> tuple[tuple[int, Line], ...]:
    """One workspace per thread that multiplies matrices, allocated at its first product. `apart`: one more for cuBLASLt."""
    nbytes = {"cuBLAS": cublas_workspace_bytes(compute_capability).bytes, "cuBLASLt": CUBLASLT_WORKSPACE_BYTES}
    first_use: dict[tuple[str, str], int] = {}
    for (library, thread), at in products.items():
        whose = (library if apart else "cuBLAS", thread)
        first_use[whose] = min(at, first_use.get(whose, at))
    return tuple(
        (at, Line(f"{library} workspace, {thread} thread", "workspaces", "uint8", (int(size),), 1, library))
        for (library, thread), at in sorted(first_use.items(), reverse=True)
        if (size := nbytes[library]) is not None
    )


def _taken_by_norms(job: "Job", parameters: Parameters, workspaces: tuple[tuple[int, Line], ...]) -> Line | None:
    """The workspace that DoRA's layers take while they are made beside a base on the device."""
    there = job.quant is not None or (job.setup.adapter_on_device and job.distributed is None)
    if not (there and norms(parameters, job.quant, dtype=job.setup.dtype, passing=())):
        return None
    return next((line for _, line in workspaces if line.name == "cuBLAS workspace, forward thread"), None)

"""Compile a job: run its step once on a tape with symbolic sizes."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from peftplan.analytic import steady
from peftplan.analytic.loading import loading_of
from peftplan.analytic.running import limits_of, loss_sizes, segments_grow
from peftplan.analytic.sizes import NO_LIMITS, Limits, shape_facts, sizes
from peftplan.arch.modules import Architecture
from peftplan.arrays import Fact, Size
from peftplan.distributed.ddp import divided_after
from peftplan.dtypes import ITEMSIZE
from peftplan.hardware.context import CUBLASLT_WORKSPACE_BYTES, cublas_workspace_bytes
from peftplan.job.inventory import states_made_twice
from peftplan.job.kernels import kernels_of
from peftplan.job.loss_sizes import LossSizes
from peftplan.ledger import Dim, Ledger, Line
from peftplan.memory.dora_load import norms
from peftplan.memory.loaded import Loader
from peftplan.memory.timed import timed
from peftplan.memory.timeline import Timeline, timeline
from peftplan.optim import Optimizer, parse_optim
from peftplan.parameters import Parameter, Parameters
from peftplan.scans import no_scans
from peftplan.units import pinned

if TYPE_CHECKING:
    from peftplan.allocator import program as events
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job
    from peftplan.memory.model import Model


NOTHING: Mapping[int, tuple[int, ...]] = MappingProxyType({})


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
    """Bytes of each of DDP's buckets; those that a later forward makes of one bucket of all gradients, unless they stay."""
    divided_after: int = 1
    """Steps before that forward; 0: there is none."""
    first_run: Loader | None = None
    """What the first forward alone makes and frees."""
    load_if_full: Loader | None = None
    """How a card that is too small for `load` is loaded, if there is another way."""
    workspaces: tuple[tuple[int, Line], ...] = ()
    """Each workspace, with the index of the event before which it is allocated."""
    on_host: tuple[tuple[tuple[Dim, ...], str, int], ...] = ()
    """Dims, dtype and count of the tensors that are offloaded to the host until backward."""
    first: "Callable[[], Compiled] | None" = None
    """The first step, where it allocates otherwise than all later ones; recorded when a replay reads it."""
    expandable: bool = False
    """Whether the allocator's segments grow."""
    limits: Limits = NO_LIMITS
    """Numbers of tokens above which the step allocates otherwise."""
    empties_cache: bool = False
    """Whether cached segments are given back after each backward."""
    empties_after: bool = False
    """Whether cached segments are given back after each step (badam 1.4, block_optim.py, `BlockOptimizer.step`)."""
    empties_before: bool = False
    """Whether they are given back before each backward."""
    empties_first: bool = False
    """Whether they are given back before each backward of the first step, as the kernels' package does."""
    empties_around: bool = False
    """Whether it is emptied before and behind what vLLM, which sleeps otherwise, gets and writes (ms-swift 4.6.0,
    rlhf_trainers/rollout_mixin.py:1198, utils.py:1747)."""
    by_processors: bool = False
    """Whether the card's multiprocessors decide a kernel or the size of a buffer."""
    leaves_shards: bool = False
    """Whether what loading does not free goes when the first forward has returned."""
    timed: Mapping[int, tuple[int, ...]] = NOTHING
    """What `memory.timed.timed` returns."""
    idle: frozenset[str] = frozenset()
    """Families without gradients, and so without optimizer states."""
    reduced: "tuple[tuple[str, int | None], ...]" = ()
    """Tensors, by name and layer, in the order in which ZeRO-1 and ZeRO-2 reduce their gradients."""
    like: "Compiled | None" = None
    """The step on an earlier GPU of a `device_map` that needs as much at all sizes."""

    def facts(self, batch_size: Size, seq_len: Size) -> tuple[Fact, ...]:
        """`shape_facts` of this job at these sizes, numbers or arrays, and whether ranks share its rows unevenly."""
        length = self.loss.row(seq_len) + self.virtual_tokens
        of_shapes: tuple[Fact, ...] = shape_facts(batch_size * self.rows, length, self.architecture, self.loss, self.limits)
        return (*of_shapes, self.loss.uneven(seq_len))

    def sizes(self, batch_size: Size, seq_len: Size) -> dict[str, Size]:
        """Name → size for a batch size and a sequence length, numbers or arrays."""
        return self.timeline.with_derived(self.sizes_read(batch_size, seq_len))

    def sizes_read(self, batch_size: Size, seq_len: Size) -> dict[str, Size]:
        """The same without those that are computed from others."""
        return sizes(batch_size * self.rows, self.loss.row(seq_len), virtual_tokens=self.virtual_tokens, loss=self.loss)

    def sized_as(self, other: "Compiled") -> bool:
        """Whether its sizes are those of another rank's step."""
        of = [(step.timeline.derived, step.loss, step.rows, step.virtual_tokens) for step in (self, other)]
        return of[0] == of[1]

    def assumed(self, by_name: Mapping[str, int]) -> dict[str, int]:
        """Facts that a result states besides the setup: pinned host bytes of what is offloaded until backward."""
        nbytes = sum(
            count * pinned(ITEMSIZE[dtype] * prod(dim if isinstance(dim, int) else by_name[dim] for dim in dims))
            for dims, dtype, count in self.on_host
        )
        of_text = {"images_per_sample": 0} if self.architecture.has_towers else {}
        return of_text | ({"offloaded_bytes": nbytes} if nbytes else {})


class Written(NamedTuple):
    """A program, the last sizes of its table, and its steps. The cache's key holds their ids, so they must stay alive."""

    program: "events.Program"
    sizes: Sequence[int]
    steps: "list[Compiled]"
    generations: tuple[object, ...] = ()


Step = tuple[Compiled, dict[str, int]]
"""A step of a run, with its sizes."""
Steps = tuple[Step, ...]
"""The steps of a run. The last one is reported."""


def compile_job(inventory: "Inventory", step_key: tuple[object, ...], *, compute_capability: str, late: bool) -> "Compiled":
    job, _, static, holding = inventory
    setup, architecture = job.setup, job.architecture
    if job.distributed is not None:
        from peftplan.analytic import rank_loading, ranks

        setup = ranks.setup_on_rank(job)
    model, first, left_by_first = steady.run(inventory, step_key, compute_capability=compute_capability, late=late)
    seen = model.tape if job.distributed is None else ranks.seen(inventory, model.tape)
    of_step = timeline(
        seen,
        model.stacks,
        vocab=architecture.vocab_size,
        keeps_gradients=model.units.keeps_gradients,
        outputs_outlive_step=job.script.outputs_outlive_step and not job.script.earlier_seq_lens,
    )
    on_tape = "gradients" if holding is None else holding.on_tape
    lasting = tuple(line for line in static if line.category != on_tape and line.place == "device")
    optimizer = parse_optim(str(setup.optim))
    early = tuple(line for line in lasting if optimizer.makes(line))
    on_fsdp2 = job.distributed is not None and job.distributed.strategy == "fsdp2"
    undivided: tuple[Line, ...] = ()
    if early and on_fsdp2 and setup.by.prepares_model:  # accelerate divides behind it: those of shards come with the first step
        twice = states_made_twice(job, inventory.parameters, optimizer)
        early = tuple(line for line in early if line in twice)
        if rank_loading.keeps_undivided(job, optimizer):  # loading leaves them in their places
            undivided, early = early, ()
    idle = frozenset(() if early or undivided else model.units.idle(model.idle()))
    if idle:  # a parameter without a gradient has no state
        states = (line for line in lasting if line.category == "optimizer_states")
        stateless = {line.name for line in states if line.name.rpartition(".")[0] in idle}
        lasting = tuple(line for line in lasting if line.name not in stateless)
    buffers = Ledger(tuple(line for line in lasting if line.category == "buffers"))
    beside = (*(holding.beside if holding is not None and model.units.every_layer else ()), *undivided)
    loaded = tuple(line for line in lasting if line.category != "optimizer_states" or line in beside)
    workspaces = _workspaces(_multiplied_by_torch(job, of_step), compute_capability, apart=job.script.cublaslt_apart)
    workspaces += tuple(
        (at, Line(name, "buffers", "uint8", (nbytes,), 1, "torch.compile")) for at, nbytes, name in of_step.pinned
    )
    standing = Ledger(lasting + tuple(line for _, line in workspaces))
    normed = _taken_by_norms(job, inventory.parameters, workspaces)
    workspaces = tuple((at, line) for at, line in workspaces if line != normed)
    load, passing = loading_of(inventory, model, setup, loaded=loaded, buffers=buffers, normed=normed)
    loading = Ledger(loaded + passing)
    if early:  # the optimizer is constructed after loading
        whole = states_made_twice(job, inventory.parameters, optimizer, divided=False) if job.quant is not None else Ledger(())
        left = () if job.distributed is None else rank_loading.shards_left(load, Ledger(loaded))
        loading = max(loading + whole, Ledger(loaded + left + early + _cloned(optimizer, inventory)), key=Ledger.bytes)
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
        built=(
            *(line for line in loaded if line in beside),
            *(() if job.distributed is None else rank_loading.stepped_first(load)),
        ),
        buckets=() if job.distributed is None else rank_loading.buckets_of(inventory),
        divided_after=1 if job.distributed is None else divided_after(job.distributed),
        first_run=None if job.distributed is None else rank_loading.first_run(load),
        leaves_shards=job.distributed is not None and rank_loading.leaves_shards(load),
        load_if_full=None if job.distributed is None else rank_loading.loaded_if_full(load),
        workspaces=workspaces,
        virtual_tokens=model.virtual_tokens,
        loss=loss_sizes(job),
        rows=setup.rows_of_example,
        on_host=tuple(model.on_host),
        expandable=segments_grow(setup),
        limits=limits_of(job, compute_capability),
        empties_cache=setup.by.empties_cache,
        empties_after=optimizer.name == "badam" or setup.by.values,
        empties_before=setup.by.empties_before,
        empties_first=kernels_of(setup.kernels or ()).sets_up_allocator,
        empties_around=setup.by.sends_at_once and bool(setup.vllm_share) and bool(setup.vllm_enable_sleep_mode),
        timed=timed(of_step, optimizer, _stepped(inventory)),
        idle=idle,
        reduced=() if job.distributed is None else ranks.reduced(model),
        by_processors=model.running.chip is not None
        or any(each.tape.asks_card for each in (model, first) if each)
        or (left_by_first is not None and left_by_first.asks_card),
    )
    if inventory.holding is None or inventory.holding.device is None:  # all GPUs of a `device_map` see one tape
        model.tape.drop()

    def as_first(after: "Model") -> Compiled:
        of_first = timeline(after.tape, after.stacks, vocab=architecture.vocab_size)
        workspaces = _workspaces(_multiplied_by_torch(job, of_first), compute_capability, apart=job.script.cublaslt_apart)
        workspaces = tuple((at, line) for at, line in workspaces if line != normed)
        return compiled_job._replace(timeline=of_first, workspaces=workspaces)

    @cache
    def run_apart() -> Compiled:
        with no_scans():
            return as_first(steady.first_step(inventory, compute_capability=compute_capability))

    if left_by_first is not None:
        return compiled_job._replace(first=run_apart)
    if first is None:
        return compiled_job
    compiled_first = as_first(first)
    return compiled_job._replace(first=lambda: compiled_first)


def _cloned(optimizer: Optimizer, inventory: "Inventory") -> tuple[Line, ...]:
    """What lives beside the last of BAdam's copies: each is made of a clone of the weight (badam 1.4, block_optim.py:517)."""
    trained = [p for p in inventory.parameters.all if p.trainable] if optimizer.name == "badam" else []
    largest = max(trained, key=lambda p: ITEMSIZE[p.dtype] * p.numel, default=None)
    if largest is None:
        return ()
    return (Line(f"{largest.name} clone", "temporaries", largest.dtype, largest.shape, 1, optimizer.source),)


def _stepped(inventory: "Inventory") -> list[Parameter]:
    """What the optimizer steps over."""
    parameters, holding = inventory.parameters, inventory.holding
    return [p for p in (parameters if holding is None else holding.states_of or holding.parameters).all if p.trainable]


def _multiplied_by_torch(job: "Job", timeline: Timeline) -> Mapping[tuple[str, str], int]:
    """The products of torch: none where Transformer Engine, which keeps its own workspaces, has all layers, with those of
    LoRA, no router has weights, and no indexer scores keys. Projections of Mamba 2 are torch's."""
    kernels, attentions = kernels_of(job.setup.kernels or ()), job.architecture.blocks[-1].attentions
    scores = bool(attentions) and attentions[0].num_chosen_keys is not None
    by_engine = kernels.dense is not None and kernels.gate is not None and kernels.scan is None and not scores
    return {} if by_engine else timeline.products


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

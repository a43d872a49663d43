"""Jobs compiled, and kept for all sizes that run the same operations."""

from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from peftplan.analytic.checks import check
from peftplan.analytic.compile_job import Compiled, Step, Steps, compile_job
from peftplan.analytic.running import facts_of
from peftplan.job.inventory import of_any_device
from peftplan.job.other_sizes import BESIDE_SIZES
from peftplan.ledger import Ledger
from peftplan.memory.batch import of_pictures_or_sound
from peftplan.scans import no_scans

if TYPE_CHECKING:
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job

    OfRank = tuple[int | None, int | None] | None


_LATEST: "list[tuple[Inventory, str, bool, Step]]" = []
"""The job of which steps were asked for last, on each of its ranks, for which kernels, and whether as a late GPU leaves it: one
estimate asks for each several times."""
MOST_LATEST = 32


def last_step(inventory: "Inventory", compute_capability: str, *, late: bool = False) -> Step:
    """The step that is reported, with its sizes."""
    for of, of_kernels, is_late, step in _LATEST:
        if of is inventory and of_kernels == compute_capability and is_late is late:
            return step
    compiled_job = compiled(inventory, compute_capability=compute_capability, late=late)
    setup = inventory.job.setup
    if len(_LATEST) == MOST_LATEST or (_LATEST and _LATEST[0][0].job is not inventory.job):
        _LATEST.clear()
    known: dict[str, int] | None = next((sizes for *_, (other, sizes) in _LATEST if compiled_job.sized_as(other)), None)
    step = compiled_job, known or compiled_job.sizes(setup.batch_size, setup.seq_len)
    _LATEST.append((inventory, compute_capability, late, step))
    return step


def steps_of(inventory: "Inventory", compute_capability: str, *, late: bool = False) -> Steps:
    """The steps of a run: the reported one twice, or once after the earlier steps that the script names.

    One more of it is run where the second is not steady yet. In full fine-tuning on one GPU, without earlier steps, and over a
    `device_map`, and by TRL's loss under FSDP2, the gradient of a tied embedding finds room in the second step, and none in the
    third. So may a batch of pictures or sound, and a copy of logits by LLaMA-Factory v1 beside an adapter. Under DDP the second
    step divides its bucket, or the third one where the graph is static. Under ZeRO-3 the first step gathers nothing ahead, so
    that the second one is the first of its kind.
    `late`: as the allocator sees them where the GPU is as late as it may be.
    """
    job = inventory.job
    last = last_step(inventory, compute_capability, late=late)
    before = [last_step(earlier, compute_capability, late=late) for earlier in _earlier(inventory)]
    of_last, sizes_of_last = last
    first = last if of_last.first is None else (of_last.first(), sizes_of_last)
    full = job.method is not None and job.method.name == "full"
    alone = (full or of_pictures_or_sound(job.architecture)) and not before  # as the trace does
    strategy = None if job.distributed is None else job.distributed.strategy
    of_chunks = full and strategy == "fsdp2" and job.setup.loss == "trl-chunked"
    adapted_by_v1 = not full and strategy == "fsdp2" and job.setup.by.weighs_tokens
    third = of_chunks or adapted_by_v1 or strategy in ("device-map", "ddp", "zero3")
    again = (last,) * (alone if strategy is None else third)
    again *= of_last.divided_after
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
    with no_scans():
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
    """The step of a rank that differs from the largest one in its states alone, where that one's is cached."""
    if of_rank in (None, (None, None)):
        return None
    from peftplan.analytic.states import own_states, unlike_in_states, without_states

    if not unlike_in_states(inventory.job):
        return None
    counted_for_all = None, None
    of_largest = _kept(((counted_for_all, step_key), (counted_for_all, step_key, inventory.job.multiprocessors)))
    if of_largest is None:
        return None
    standing = Ledger((*without_states(of_largest.standing), *own_states(inventory, of_largest)))
    return of_largest._replace(standing=standing, standing_bytes=standing.bytes(), programs={})


def is_compiled(inventory: "Inventory", compute_capability: str) -> bool:
    """Whether the job is cached."""
    _, _, keys = _keys(inventory, compute_capability, late=False)
    return _kept(keys) is not None


Key = tuple[object, ...]


def _keys(inventory: "Inventory", compute_capability: str, *, late: bool) -> "tuple[OfRank, Key, tuple[Key, Key]]":
    """Which GPU sees the job, what decides its operations, and its places in the cache: of every such card, of one alone."""
    step_key = late, key_of_step(inventory.job, compute_capability)
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


class StepKey(tuple[object, ...]):
    """What decides a step, hashed once."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()


_KEYED: "list[tuple[Job, str, StepKey]]" = []
"""The job whose key was built last, and the key: one estimate asks for its steps several times, and for those of each rank."""

_EQUAL: dict[StepKey, StepKey] = {}
"""Each key → the first one that equals it: caches find that one without a look at its parts."""


def key_of_step(job: "Job", compute_capability: str) -> StepKey:
    """What decides which operations a job runs, for the kernels of a compute capability."""
    for of_job, of_kernels, key in _KEYED:
        if of_job is job and of_kernels == compute_capability:
            return key
    facts = facts_of(job, compute_capability)
    config = job.config and repr(vars(job.config))
    told = str(job.adapter.get("task_type", ""))
    described = (job.method and job.method.name, config, told, repr(job.quant), job.second_config, compute_capability)
    key = StepKey((*facts, id(job.architecture), *described, job.script, job.distributed, *BESIDE_SIZES(job.setup)))
    if len(_EQUAL) > COMPILED_KEPT:
        _EQUAL.clear()
    key = _EQUAL.setdefault(key, key)
    _KEYED[:] = [(job, compute_capability, key)]
    return key

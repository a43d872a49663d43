"""Changes that make a job need less memory: single ones, and combinations that may suffice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import add, sub
from typing import TYPE_CHECKING, NamedTuple

from peftplan.job.requirements import accepted_batch
from peftplan.job.shared_bases import packs_integers
from peftplan.job.trainers import CHUNKED, OF_PROGRAMS
from peftplan.storage.config import FOUR_BIT

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job

SEQUENCE_STEP = 128
"""Sequences are proposed in multiples of this many tokens."""
UNTRAINED, SAME, CLOSE, FEWER, OTHER, DATA, MORE_GPUS = 0, 1, 2, 4, 6, 8, 12
"""What a change costs the user: nothing that trains; only time; other rounding; fewer adapted weights; another method; data; more
GPUs."""

PRESET_BY = {"trainer": ("kbit_prepare", "adapter_dtype")}
"""Options that a trainer sets by default: they are not proposed beside a change of the trainer."""

STRATEGIES: Mapping[str, tuple[tuple[dict[str, object], int], ...]] = {
    "ddp": (({"strategy": "fsdp2"}, SAME), ({"strategy": "fsdp2", "offload_params": "cpu"}, CLOSE)),
    "fsdp2": (({"offload_params": "cpu"}, CLOSE),),
    "fsdp1": (({"offload_params": "cpu"}, CLOSE),),
    "zero0": (({"strategy": "zero1"}, SAME), ({"strategy": "zero2"}, SAME), ({"strategy": "zero3"}, SAME)),
    "zero1": (({"strategy": "zero2"}, SAME), ({"strategy": "zero3"}, SAME), ({"offload_optimizer": "cpu"}, CLOSE)),
    "zero2": (({"strategy": "zero3"}, SAME), ({"offload_optimizer": "cpu"}, CLOSE)),
    "zero3": (({"offload_optimizer": "cpu"}, CLOSE), ({"offload_optimizer": "cpu", "offload_params": "cpu"}, CLOSE)),
}
"""Strategy → changes that divide more over the ranks, or hold it on the host, each with its price."""

GPUS_OF_NODE = 8
"""GPUs of a machine that is rented."""
OF_GPUS = frozenset({"gpus", "nodes"})
"""Options of a change that takes more GPUs."""
TORCH = ("ddp", "fsdp1", "fsdp2")
"""Strategies of torch's own, beside which FSDP2 is the next step."""

Sizes = Mapping[str, int]
"""Bytes of the tensors at the peak of each phase."""


class Change(NamedTuple):
    """Options that are set together, what they cost the user, and what they save in each phase."""

    options: Mapping[str, object]
    price: int
    saving: Sizes

    @classmethod
    def between(cls, before: Sizes, after: Sizes, options: Mapping[str, object], price: int) -> Change:
        """The change that turns the sizes `before` into `after`."""
        return cls(options, price, {phase: size - after.get(phase, size) for phase, size in before.items()})

    def left(self, before: Sizes) -> int:
        """The peak after this change."""
        return max(size - self.saving[phase] for phase, size in before.items())

    def excludes(self, other: Change) -> bool:
        """Whether the two set the same option, or one sets what the other one's preset does."""
        return not _touched(self.options).isdisjoint(_touched(other.options))


def _touched(options: Mapping[str, object]) -> set[str]:
    return {*options, *(also for name in options for also in PRESET_BY.get(name, ()))}


def single_changes(job: Job, *, runs_flash_attention: bool) -> Iterator[tuple[dict[str, object], int]]:
    """Single changes with their prices. Some do not go with the job: trying them raises an error."""
    yield from _of_step(job, runs_flash_attention=runs_flash_attention)
    yield from _of_storage(job)
    yield from _of_method(job)
    yield from _of_sizes(job)


def _of_step(job: Job, *, runs_flash_attention: bool) -> Iterator[tuple[dict[str, object], int]]:
    setup = job.setup
    if job.distributed is not None:
        yield from _of_ranks(job, job.distributed)
    if not setup.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, SAME
    elif not setup.use_reentrant and job.quant is not None and job.quant.name == "int8":
        yield {"use_reentrant": True}, SAME  # bitsandbytes keeps the input of each int8 layer, which other checkpoints never free
    if setup.keep_outputs:
        yield {"keep_outputs": False}, SAME
    if setup.attn_implementation == "eager":
        yield {"attn_implementation": "sdpa"}, SAME
    if runs_flash_attention and setup.attn_implementation != "flash_attention_2":
        yield {"attn_implementation": "flash_attention_2"}, SAME
    if job.architecture.task_type == "CAUSAL_LM" and setup.loss == "full" and not setup.by.of_preferences:
        yield {"loss": "liger"}, SAME
        if setup.trainer in OF_PROGRAMS:
            yield CHUNKED, CLOSE


def _of_ranks(job: Job, distributed: Distributed) -> Iterator[tuple[dict[str, object], int]]:
    """Another strategy, offload, more GPUs. FSDP2 shards packed weights only if they are stored as floats, and each rank holds
    all of them while it loads unless they are packed on the host."""
    storage: dict[str, object] = {"quant_storage": "bf16"} if packs_integers(job.quant) else {}
    own = STRATEGIES.get(distributed.strategy, ())
    if storage and distributed.strategy == "fsdp2":
        yield storage, SAME
    for options, price in own:
        yield (options | storage if options.get("strategy", distributed.strategy) == "fsdp2" else options), price
    in_4_bits = job.quant is not None and job.quant.name in FOUR_BIT
    if in_4_bits and distributed.strategy in TORCH and job.setup.device_map != "cpu":
        for options, price in (({}, SAME), *own) if distributed.strategy == "fsdp2" else STRATEGIES["ddp"]:
            yield {**options, **storage, "device_map": "cpu"}, price
    if distributed.facts.splits_weights:
        for place, times in enumerate((2, 4, 8)):
            if more := more_gpus(distributed, times):
                yield more, MORE_GPUS + place


def more_gpus(distributed: Distributed, times: int) -> dict[str, object]:
    """So many times the GPUs: first those of a node, then more nodes, which one process does not reach (`device_map`)."""
    gpus, nodes = distributed.gpus or 1, distributed.nodes
    if nodes == 1 and gpus * times <= GPUS_OF_NODE:
        return {"gpus": gpus * times}
    if distributed.strategy == "device-map":
        return {}
    total = gpus * nodes * times
    if nodes > 1 or gpus >= GPUS_OF_NODE or total % GPUS_OF_NODE:
        return {"nodes": nodes * times}
    return {"gpus": GPUS_OF_NODE, "nodes": total // GPUS_OF_NODE}


def several_gpus(job: Job) -> Iterator[dict[str, object]]:
    """A job of one GPU over 2, 4 and 8 of them and over 2, 4 and 8 such machines, divided by FSDP2."""
    packed = job.quant is not None and job.quant.name in FOUR_BIT
    storage: dict[str, object] = {"quant_storage": "bf16", "device_map": "cpu"} if packed else {}
    for gpus, nodes in ((2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (8, 8)):
        of_nodes = {"nodes": nodes} if nodes > 1 else {}
        yield {"gpus": gpus, **of_nodes, "strategy": "fsdp2", **storage}


def _of_storage(job: Job) -> Iterator[tuple[dict[str, object], int]]:
    setup, quant = job.setup, job.quant
    if setup.dtype == "fp32":
        yield {"dtype": "bf16"}, OTHER if job.method is not None and job.method.name == "full" else CLOSE
    if setup.kbit_prepare:
        yield {"kbit_prepare": False}, CLOSE
    if quant is not None and quant.name in ("nf4", "fp4") and not quant.double_quant:
        yield {"double_quant": True}, CLOSE
    if setup.optim in ("adamw_torch", "adamw_torch_fused"):
        yield {"optim": "paged_adamw_32bit"}, SAME
        sharded = job.distributed is not None and job.distributed.strategy in TORCH[1:]  # which bitsandbytes' steps do not take
        yield {"optim": "adamw_torch_8bit" if sharded else "adamw_8bit"}, CLOSE
    if setup.adapter_dtype == "fp32" and (job.method is None or job.method.name != "full"):
        yield {"adapter_dtype": "bf16"}, CLOSE


def _of_method(job: Job) -> Iterator[tuple[dict[str, object], int]]:
    method = job.method.name if job.method else ""
    if method in ("lora", "qlora", "dora", "qdora") and len(job.adaptation.target_modules) > len("qkvo"):
        yield {"target_modules": "attention"}, FEWER
    twin = {"lora": "qlora", "dora": "qdora", "full": "qlora"}.get(method)
    quantized: dict[str, object] = {"method": twin} if twin else {"quant": "nf4"}
    if method == "full":
        yield {"method": "lora"}, OTHER
    if job.quant is None:
        yield quantized, OTHER + SAME * (method == "full")
        yield {**quantized, "kbit_prepare": False}, OTHER + CLOSE
        if job.distributed is not None and job.distributed.strategy == "fsdp2":  # which divides floats alone
            yield {**quantized, "quant_storage": "bf16", "device_map": "cpu"}, OTHER + CLOSE


def _of_sizes(job: Job) -> Iterator[tuple[dict[str, object], int]]:
    setup = job.setup
    if smaller := micro_batches(job):
        yield smaller[0], SAME
    for rows in sorted({setup.batch_size, 1}, reverse=True):
        if setup.eval_batch_size is not None and rows < setup.eval_batch_size:
            yield {"eval_batch_size": rows}, UNTRAINED
    half, quarter = (setup.seq_len // part // SEQUENCE_STEP * SEQUENCE_STEP for part in (2, 4))
    for price, tokens in enumerate(sorted({half, quarter, SEQUENCE_STEP} - {0}, reverse=True), DATA):
        if tokens < setup.seq_len:
            yield {"seq_len": tokens}, price


def micro_batches(job: Job) -> list[dict[str, object]]:
    """Smaller micro batches that the trainer accepts, with accumulation for the rest, the smallest first."""
    setup, steps = job.setup, job.setup.gradient_accumulation_steps
    sizes = [size for size in range(1, setup.batch_size // 2 + 1) if setup.batch_size % size == 0]
    changes = [{"batch_size": size, "gradient_accumulation_steps": steps * (setup.batch_size // size)} for size in sizes]
    changed = [(change, setup.model_copy(update=change)) for change in changes]
    return [{**change} for change, smaller in changed if accepted_batch(smaller, job.replicas) == smaller.batch_size]


def combinations(changes: Sequence[Change], before: Sizes, room: int) -> list[Change]:
    """Two or more changes whose savings, added up, leave at most `room` in every phase: the cheapest first.

    By the same sums none of them suffices without each of its parts.
    """
    enough: list[Change] = []

    def extend(start: int, chosen: tuple[Change, ...], left: tuple[int, ...]) -> None:
        if max(left) <= room:
            if len(chosen) > 1 and all(max(_without(change, left)) > room for change in chosen):
                enough.append(_together(chosen))
            return
        for index in range(start, len(changes)):
            change = changes[index]
            if not any(change.excludes(other) for other in chosen):
                extend(index + 1, (*chosen, change), tuple(map(sub, left, change.saving.values())))

    extend(0, (), tuple(before.values()))
    return sorted(enough, key=lambda change: (change.price, change.left(before)))


def _without(change: Change, left: Sequence[int]) -> Iterator[int]:
    """What is left without one of the changes."""
    return map(add, left, change.saving.values())


def _together(changes: Sequence[Change]) -> Change:
    options = {name: value for change in changes for name, value in change.options.items()}
    saving = {phase: sum(change.saving[phase] for change in changes) for phase in changes[0].saving}
    return Change(options, sum(change.price for change in changes), saving)

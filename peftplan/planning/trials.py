"""A job estimated again with some options changed, on one card, and on the cards of the catalogue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from peftplan.analytic import worlds
from peftplan.analytic.engine import analytic_peaks
from peftplan.hardware.gpus import Gpu, gpus
from peftplan.job.inventory import Inventory, in_stages
from peftplan.job.requirements import unmet
from peftplan.job.setup import Setup
from peftplan.planning.changes import OF_GPUS, Sizes
from peftplan.planning.verdicts import capability, kernels_on, placed_on, verdict
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks
from peftplan.results.verdict import TIGHT, Verdict

NEARLY = 0.9
"""With another card's kernels a job is taken to need at least this share of what it needs here: smaller cards are not asked."""
NOT_FOR_RENT = ("laptop", "embedded")
"""Kinds of cards that nobody is sent to."""


class Trials(NamedTuple):
    """How a job is estimated again with some options changed, on one card."""

    room: int
    """Bytes that the card leaves for torch's allocator."""
    roomy: int
    """The most bytes with which a job fits rather than being tight."""
    reserved: int
    """Bytes that the allocator reserves for the job as it is."""
    states: int
    """Bytes of the optimizer's states."""
    runs_flash_attention: bool
    weights: Callable[..., int]
    """Bytes of the base's weights."""
    lasting: Callable[..., int]
    """Bytes that last from step to step."""
    sizes: Callable[..., Sizes]
    """By formulas, without a replay: bytes of the tensors at the peak of each phase. Raises NeedsTraceError without formulas."""
    judged: Callable[..., Estimate]
    """Replayed, with the verdict on the card."""
    smallest_card: Callable[[], str | None]
    in_numbers: bool = True
    """Whether several of the card stand in one machine: no laptops, no memory that a processor shares."""
    lower_bound: bool = False
    """Whether the job needs more than is counted."""


def trials(
    card: Gpu,
    on_card: Verdict,
    setup: Setup,
    prepared: Callable[..., Inventory],
    judged: Callable[..., Estimate],
) -> Trials:
    """`prepared`: changes → the job and what lasts of it; `judged`: these and cards → the estimate."""
    compute_capability = capability(card)
    seen: dict[str, Inventory] = {}

    def remembered(**changes: object) -> Inventory:
        if str(changes) not in seen:
            seen[str(changes)] = prepared(**changes)
        return seen[str(changes)]

    needed = on_card.needed_bytes - on_card.context_bytes

    def sizes(**changes: object) -> Sizes:
        changed = placed_on(remembered(**changes), card)
        if _shares_record(changed, changes):
            return worlds.requested(changed, compute_capability)
        return analytic_peaks(changed, compute_capability=compute_capability).requested

    replayed: dict[str, Estimate] = {}

    def replay(**changes: object) -> Estimate:
        if str(changes) not in replayed:
            replayed[str(changes)] = judged(remembered(**changes), [card])
        return replayed[str(changes)]

    def smallest_card() -> str | None:
        as_here = Peaks(ledgers={}, reserved=needed)
        for other in _larger_cards(needed, setup, than=card):
            other_kernels = kernels_on(other) != kernels_on(card)
            at_least = int(NEARLY * needed) if other_kernels else needed
            on_other = verdict(other, at_least, as_here, refused=unmet(setup, other.compute_capability))
            if other_kernels and on_other.verdict == "fits":
                on_other = judged(remembered(), [other]).gpus[0]
            if on_other.verdict == "fits":
                return other.id
        return None

    with_flash = setup.model_copy(update={"attn_implementation": "flash_attention_2"})
    room = on_card.usable_bytes - on_card.context_bytes
    return Trials(
        room=room,
        roomy=room - math.ceil(TIGHT * on_card.usable_bytes),
        reserved=needed,
        states=remembered().static.by_category().get("optimizer_states", 0),
        runs_flash_attention=card.vendor != "AMD" and unmet(with_flash, compute_capability) is None,
        weights=lambda **changes: remembered(**changes).static.by_category()["weights"],
        lasting=lambda **changes: remembered(**changes).static.bytes(),
        sizes=sizes,
        judged=replay,
        smallest_card=smallest_card,
        in_numbers=not card.unified and card.kind not in NOT_FOR_RENT,
        lower_bound=on_card.lower_bound,
    )


def _shares_record(changed: Inventory, changes: Mapping[str, object]) -> bool:
    """Whether a step is recorded for all ranks or worlds at once: ranks of ZeRO-1 and ZeRO-2 that keep other gradients, and
    numbers of GPUs. Not where a record would hold for few: sub groups of ZeRO-3, and parts that go to the host.
    """
    job = changed.job
    if job.distributed is None or not changes or job.setup.by.generates or in_stages(job) or job.distributed.sharing > 1:
        return False
    strategy, full = job.distributed.strategy, job.method_name == "full"
    if strategy in ("zero1", "zero2"):
        return full
    return strategy in worlds.SHARED and changes.keys() <= OF_GPUS and not (strategy == "zero3" and full)


def _larger_cards(needed: int, setup: Setup, *, than: Gpu) -> Iterator[Gpu]:
    """Cards that are sold with enough memory, the smallest first; with bf16 in hardware where the job uses it, unless the card
    in question has none.
    """
    uses_bf16 = "bf16" in (setup.dtype, setup.autocast, setup.compute_dtype) and than.bf16 is not False
    for gpu in sorted(gpus(), key=lambda gpu: gpu.marketed_gb or 0):
        offered = gpu.vendor == "NVIDIA" and not gpu.unified and gpu.kind not in NOT_FOR_RENT
        if offered and (gpu.marketed_gb or 0) * 2**30 > needed and (gpu.bf16 or not uses_bf16):
            yield gpu._replace(context_mib=than.context_mib)

"""What to change when a job does not fit: each change alone with what it saves, and the cheapest that together make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from peftplan.errors import PeftplanError

if TYPE_CHECKING:
    from peftplan.planning.job import Job
    from peftplan.planning.result import Estimate

FITS = ("fits", "tight")
SEQUENCE_STEP = 128
"""Sequences are proposed in multiples of this many tokens."""

Again = Callable[..., "Estimate"]
"""The same estimate on one card with some options changed."""


class Advice(NamedTuple):
    """One change, or several: the options, the peak with them, what they save, and whether the job then fits."""

    options: dict[str, Any]
    peak_allocated: int
    saving_bytes: int
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """One entry of a card's `advice` in the JSON."""
        return self._asdict()


def advice(job: Job, again: Again) -> tuple[Advice, ...]:
    """Changes for a card that a job does not fit, most useful first: those that suffice alone, the others by what they save.

    They are counted by formulas, whichever engine gave the verdict: none for a job without formulas. Changes that the formulas
    have no number for, or that make no sense with the job, are left out. If no change suffices alone, the last entry is the
    combination of the cheapest that does, if there is one.
    """
    unchanged = again().peaks
    if unchanged is None:
        return ()
    before = unchanged.allocated
    found = [a for options in _changes(job) if (a := _tried(again, options, before)) is not None and a.saving_bytes > 0]
    found += [a for fewer in (_batch, _sequence) if (a := fewer(job, again, before)) is not None]
    ordered = sorted(found, key=lambda a: (a.verdict not in FITS, -a.saving_bytes))
    if any(a.verdict in FITS for a in found):
        return tuple(ordered)
    together = _together(found, again, before)
    return (*ordered, together) if together else tuple(ordered)


def _changes(job: Job) -> Iterator[dict[str, Any]]:
    """Single changes, the cheapest for the user first: those that change no result before those that do."""
    setup, method = job.setup, job.method.name if job.method else ""
    if not setup.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if setup.trainer == "plain" and setup.keep_outputs:
        yield {"keep_outputs": False}
    if setup.trainer != "trl" and job.architecture.task_type == "CAUSAL_LM":
        yield {"trainer": "trl", "loss": "trl-chunked"}  # the loss is SFTTrainer's: no option of another trainer turns it on
    if setup.attn_implementation == "eager":
        yield {"attn_implementation": "sdpa"}
    if job.quant is not None and job.quant.name in ("nf4", "fp4") and not job.quant.double_quant:
        yield {"double_quant": True}
    if setup.kbit_prepare:
        yield {"kbit_prepare": False}
    if setup.optim in ("adamw_torch", "adamw_torch_fused"):
        yield {"optim": "paged_adamw_32bit"}
        yield {"optim": "adamw_8bit"}
    if setup.adapter_dtype == "fp32" and method != "full":
        yield {"adapter_dtype": "bf16"}
    if method in ("lora", "dora") and job.quant is None:
        yield {"method": {"lora": "qlora", "dora": "qdora"}[method]}
    if method in ("lora", "qlora", "dora", "qdora") and len(dict(job.adaptation.resolved).get("target_modules", ())) > len(
        "qkvo"
    ):
        yield {"target_modules": "attention"}
    if method == "full":
        yield {"method": "lora"}


def _tried(again: Again, options: dict[str, Any], before: int) -> Advice | None:
    """A change and its outcome; None where it has no number or makes no sense."""
    try:
        result = again(**options)
    except PeftplanError:
        return None
    if result.peaks is None:
        return None
    (on_card,) = result.gpus
    return Advice(options, result.peaks.allocated, before - result.peaks.allocated, on_card.verdict)


def _batch(job: Job, again: Again, before: int) -> Advice | None:
    """The largest divisor of the batch that fits, the rest by accumulation; the smallest, if none does."""
    b = job.setup.batch_size
    tried = None
    for size in (size for size in range(b // 2, 0, -1) if b % size == 0):
        steps = job.setup.gradient_accumulation_steps * (b // size)
        tried = _tried(again, {"batch_size": size, "gradient_accumulation_steps": steps}, before) or tried
        if tried and tried.verdict in FITS:
            break
    return tried


def _sequence(job: Job, again: Again, before: int) -> Advice | None:
    """The longest sequence that fits, found by bisection: peaks grow with it."""
    low, high = 0, (job.setup.seq_len - 1) // SEQUENCE_STEP
    best: Advice | None = None
    while low < high:
        middle = (low + high + 1) // 2
        tried = _tried(again, {"seq_len": middle * SEQUENCE_STEP}, before)
        if tried is not None and tried.verdict in FITS:
            low, best = middle, tried
        else:
            high = middle - 1
    return best


def _together(found: list[Advice], again: Again, before: int) -> Advice | None:
    """The changes in the order of their price, one after the other, until the job fits; those that then save nothing drop out."""
    options: dict[str, Any] = {}
    best: Advice | None = None
    for change in found:
        if set(change.options) & set(options):
            continue
        tried = _tried(again, {**options, **change.options}, before)
        if tried is None or (best is not None and tried.saving_bytes <= best.saving_bytes):
            continue
        options, best = {**options, **change.options}, tried
        if best.verdict in FITS:
            return best
    return None

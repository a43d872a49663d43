"""`fit`: the largest size of a job that a card takes, as typed and by other methods, ranked as plans.

Composition only: every number is that of `planning.estimate`, and `planning.largest` searches. A plan is a job, whatever it runs
on, so plans over several cards are plans with other options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from peftplan.errors import BoundError, InputError, PeftplanError, RefusedError, UnknownNameError
from peftplan.job.prepare import prepare
from peftplan.job.trainers import CHUNKED
from peftplan.planning.estimate import estimate
from peftplan.planning.fit_result import Binding, Fit, Plan
from peftplan.planning.for_method import known_methods, options_for, without_formula
from peftplan.planning.largest import MOST_ASKED, Largest, Probe, largest
from peftplan.planning.verdicts import find_cards
from peftplan.results.estimate import TIGHT, Estimate
from peftplan.validation import listed

Size = Literal["batch_size", "seq_len", "r"]
CEILINGS: dict[Size, int] = {"batch_size": 2**16, "seq_len": 2**22, "r": 2**14}
"""Where each search ends: no job is that large."""

ASKED_OF_OTHERS = 128
"""Sizes that are asked one by one for a plan that changes the job: `asked_from` says how far down that came."""

QUALITY = ("full", "dora", "lora", "qdora", "qlora", "ia3", "prompt-tuning")
"""Methods, the closest to full fine-tuning first: what plans are ranked by before tokens per step.

Sources: DoRA (arXiv 2402.09353, tables 1 and 2) is above LoRA at equal ranks; LoRA on all linear layers equals full
fine-tuning at small data sizes (Schulman et al., "LoRA Without Regret", 2025); QLoRA (arXiv 2305.14314, table 3) loses little
against 16-bit LoRA; IA3 and prompts train fewer parameters than any of them. Advice, not a number: tasks differ.
"""

SAVES: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    CHUNKED,
)
"""Options that change no result of a training step, tried beside each method: layers that are computed again, and SFTTrainer's
loss, which never holds all logits."""


def fit(
    model: Any,
    *,
    gpu: str,
    max: Size = "batch_size",
    methods: Sequence[str] | None = None,
    keep: str | Iterable[str] = (),
    min_seq_len: int | None = None,
    allow_tight: bool = False,
    **options: Any,
) -> Fit:
    """The largest `max` (`batch_size`, `seq_len` in tokens, or `r`) of a job that fits one card, and other plans that do.

    `model` and `options` as `estimate` takes them. The first plan is the job as typed, with only that size changed. The others
    use one of `methods` (default: `QUALITY`), turn checkpointing and a fused loss on, and are ranked by `QUALITY`, then by tokens
    per step. `keep` names options that no plan may change: `method`, `seq_len`, `gradient_checkpointing`, `loss`. `min_seq_len`:
    where another size than `seq_len` is searched, a plan may come down to it; where `seq_len` is, fewer tokens are no plan.
    `allow_tight`: a plan may be `tight`.

    *Largest* is the largest size such that it and every smaller one does. Raises what `estimate` raises,
    and UnknownNameError for an unknown method.
    """
    size = max
    if size not in CEILINGS:
        raise UnknownNameError("max", size, CEILINGS)
    kept = _kept(keep, size)
    methods = None if methods is None else known_methods(methods, "methods")
    if min_seq_len is not None and (not isinstance(min_seq_len, int) or min_seq_len < 1):
        raise BoundError("min_seq_len", min_seq_len, "at least 1")
    cards = find_cards(gpu)
    if len(cards) != 1:
        raise InputError("gpu", gpu, "accepted: one card, such as rtx-4090, or a capacity such as 24GiB")
    accepted = ("fits", "tight") if allow_tight else ("fits",)
    typed = {name: value for name, value in options.items() if name != size}
    first = _plan(model, gpu, size, typed, {}, accepted, min_seq_len)
    plans, misses = [first], [] if first.size else [first]
    for changes in _changes(typed, first, size, methods, kept, min_seq_len):
        changed = {**typed, **changes}
        try:
            changed = options_for(changed["method"], changed) if "method" in changes else changed
            plan = _plan(model, gpu, size, changed, changes, accepted, min_seq_len)
        except PeftplanError:
            continue  # the method or the option does not exist for this model
        (plans if plan.size else misses).append(plan)
    others = sorted(_undominated(plans[1:]), key=lambda plan: (_rank(plan.method), -plan.tokens_per_step, len(plan.changes)))
    nearest: dict[str, Plan] = {}
    near = (plan for plan in misses if plan is not first and plan.verdict != "does_not_run")
    for plan in sorted(near, key=lambda plan: -plan.headroom_bytes):
        nearest.setdefault(plan.method, plan)
    return Fit(model=first.model, gpu=cards[0].id, size=size, plans=(first, *others), nearest=tuple(nearest.values())[:2])


def _kept(keep: object, size: str) -> frozenset[str]:
    """The options that no plan may change. Raises UnknownNameError for a name that no plan changes."""
    changeable = ("method", "seq_len", *(name for options in SAVES for name in options))
    each = listed(keep)
    if not isinstance(each, Iterable) or not all(isinstance(name, str) for name in each):
        raise InputError("keep", keep, f"accepted: {', '.join(changeable)}")
    names = frozenset(name.strip().replace("-", "_") for name in each)
    for name in names - {size}:
        if name not in changeable:
            raise UnknownNameError("keep", name, changeable)
    return names


def _changes(
    typed: Mapping[str, Any],
    first: Plan,
    size: Size,
    methods: Sequence[str] | None,
    kept: frozenset[str],
    min_seq_len: int | None,
) -> Iterable[dict[str, Any]]:
    """What the other plans change: the method, what saves memory, a shorter sequence, and these together."""
    by_adapter = typed.get("peft_config") is not None or "method" in kept
    others: list[dict[str, Any]] = [{}]
    names = QUALITY if methods is None else methods
    others += [] if by_adapter else [{"method": name} for name in names if name != first.method]
    saving = [change for change in SAVES if kept.isdisjoint(change) and not change.items() <= first.assumptions.items()]
    shorter = min_seq_len is not None and size != "seq_len" and "seq_len" not in kept and min_seq_len < first.seq_len
    lengths: list[dict[str, Any]] = [{}, {"seq_len": min_seq_len}] if shorter else [{}]
    for method in others:
        for some in range(2 ** len(saving)):
            saved = {name: value for bit, change in enumerate(saving) if some >> bit & 1 for name, value in change.items()}
            yield from (changes for length in lengths if (changes := {**method, **saved, **length}))


def _plan(
    model: Any,
    gpu: str,
    size: Size,
    options: Mapping[str, Any],
    changes: Mapping[str, Any],
    accepted: tuple[str, ...],
    min_seq_len: int | None,
) -> Plan:
    """The plan with the largest size of one job; of size 0, with the verdict at size 1 (or `min_seq_len`), where nothing fits."""
    smallest = min_seq_len if size == "seq_len" and min_seq_len else 1
    ask = _asking(model, gpu, size, options, smallest)
    start = ask(smallest)
    if start.peaks is None:
        raise RefusedError(f"fit: {without_formula(start)}")

    def probe(number: int) -> Probe:
        return _probe(ask(number), accepted)

    if not _probe(start, accepted).does:
        edge, answer = Largest(0, smallest), start
    else:
        most_asked = MOST_ASKED if not changes else ASKED_OF_OTHERS
        edge = largest(probe, ceiling=_ceiling(size, model, options), most_asked=most_asked)
        edge = edge if edge.size >= smallest else Largest(0, smallest)
        answer = ask(edge.size or smallest)
    beyond = ask(edge.size + 1) if edge.size and not edge.bounded else None if edge.size else answer
    return Plan.of(answer, edge, size=size, changes=changes, binding=None if beyond is None else Binding.of(answer, beyond))


def _asking(model: Any, gpu: str, size: Size, options: Mapping[str, Any], smallest: int) -> Callable[[int], Estimate]:
    """The job at any size: by its formulas' own sizes where they have a name for it."""
    start = estimate(model, gpu=gpu, **{**options, size: smallest})

    def ask(number: int) -> Estimate:
        if number == smallest:
            return start
        if size == "r":
            return estimate(model, gpu=gpu, **{**options, "r": number})
        resized: Estimate = start.at(**{size: number})
        return resized

    return ask


def _ceiling(size: Size, model: Any, options: Mapping[str, Any]) -> int:
    """Where the search ends: for sequences at the model's table of positions, if it has one."""
    positions = prepare(model, **options).architecture.max_positions if size == "seq_len" else None
    return min(CEILINGS[size], positions or CEILINGS[size])


def _probe(result: Estimate, accepted: tuple[str, ...]) -> Probe:
    """What `largest` wants to know of an estimate on its one card."""
    assert result.peaks is not None
    (card,) = result.gpus
    left_over = 0 if "tight" in accepted else -int(-TIGHT * card.usable_bytes // 1)
    room = card.usable_bytes - card.context_bytes - left_over
    return Probe(card.verdict in accepted, result.peaks.allocated, card.needed_bytes - card.context_bytes, room)


def _rank(method: str) -> int:
    return QUALITY.index(method) if method in QUALITY else len(QUALITY)


def _undominated(plans: Sequence[Plan]) -> list[Plan]:
    """Without plans that change more than another of the same method and size and gain nothing by it."""
    return [
        plan
        for plan in plans
        if not any(
            other is not plan
            and other.method == plan.method
            and other.size >= plan.size
            and other.seq_len >= plan.seq_len
            and set(other.changes) < set(plan.changes)
            for other in plans
        )
    ]

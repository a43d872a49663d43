"""Plans for a job: what others change, how they are ranked, and which of those that do not fit come nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from peftplan.errors import InputError, PeftplanError, UnknownNameError
from peftplan.job.trainers import CHUNKED, OF_PROGRAMS
from peftplan.methods import METHODS
from peftplan.planning.fit_result import Plan
from peftplan.planning.for_method import options_for
from peftplan.validation import listed

Options = dict[str, object]

QUALITY = ("full", "dora", "lora", "qdora", "qlora", "ia3", "prompt-tuning")
"""Methods, the closest to full fine-tuning first: what plans are ranked by before tokens per step.

Sources: DoRA (arXiv 2402.09353, tables 1 and 2) is above LoRA at equal ranks; LoRA on all linear layers equals full
fine-tuning at small data sizes (Schulman et al., "LoRA Without Regret", 2025); QLoRA (arXiv 2305.14314, table 3) loses little
against 16-bit LoRA; IA3 and prompts train fewer parameters than any of them. Advice, not a number: tasks differ.
"""

SAVES: tuple[dict[str, object], ...] = (
    {"gradient_checkpointing": True},
    CHUNKED,
)
"""Options that change no result of a training step, tried beside each method: layers that are computed again, and SFTTrainer's
loss, which never materializes all logits, where a trainer has the same objective and the model its own code."""
ONE_ROW: dict[str, object] = {"eval_batch_size": 1}
"""What saves memory where an evaluation needs most."""


def ranked(
    first: Plan,
    typed: Mapping[str, object],
    changes: Iterable[Options],
    plan: Callable[[Mapping[str, object], Options], Plan],
    *,
    by_size: bool = False,
) -> tuple[tuple[Plan, ...], tuple[Plan, ...]]:
    """The job as typed and the plans that fit, ranked; and the two nearest that do not, of different methods where there are.

    `plan`: the options of a job and what they change → its plan; where it raises, the method or the option does not exist for the
    model. `by_size`: a larger size comes before more tokens per step.
    """
    plans, misses = [first], [] if first.size else [first]
    for change in changes:
        changed = {**typed, **change}
        try:
            other = plan(options_for(str(change["method"]), changed) if "method" in change else changed, change)
        except PeftplanError:
            continue
        (plans if other.size else misses).append(other)
    near = (other for other in misses if other is not first and other.verdict != "does_not_run")
    by_room = sorted(near, key=lambda other: -other.headroom_bytes)
    nearest = {other.method: other for other in reversed(by_room)}  # of each method the one that comes nearest
    closest = sorted(by_room, key=lambda other: nearest[other.method] is not other)[:2]
    return in_order(first, plans[1:], by_size=by_size), tuple(sorted(closest, key=lambda other: -other.headroom_bytes))


def in_order(first: Plan, others: Iterable[Plan], *, by_size: bool = False) -> tuple[Plan, ...]:
    """The job as typed, then the plans that gain something by what they change."""
    useful = _undominated([first, *others])[1:]
    return (first, *sorted(useful, key=lambda plan: _rank(plan, by_size=by_size)))


def kept_options(keep: object, size: str) -> frozenset[str]:
    """The options that no plan may change. Raises UnknownNameError for a name that no plan changes."""
    changeable = ("method", "seq_len", *(name for options in (*SAVES, ONE_ROW) for name in options))
    typed = [name.replace("_", "-") for name in changeable]
    each = listed(keep)
    if not isinstance(each, Iterable) or not all(isinstance(name, str) for name in each):
        raise InputError("keep", keep, f"accepted: {', '.join(typed)}")
    names = frozenset(name.strip().replace("-", "_") for name in each)
    for name in names - {size}:
        if name not in changeable:
            raise UnknownNameError("keep", name, typed)
    return names


def changes_of(
    typed: Mapping[str, object],
    first: Plan,
    size: str,
    methods: Sequence[str] | None,
    fixed: frozenset[str],
    min_seq_len: int | None,
) -> Iterable[dict[str, object]]:
    """What the other plans change: the method, what saves memory, a shorter sequence, and these together."""
    by_adapter = typed.get("peft_config") is not None or "method" in fixed
    others: list[dict[str, object]] = [{}]
    by_quant = typed.get("quant") is not None  # beside it, a method that only quantizes the base differs by its name alone
    names = [name for name in QUALITY if not (by_quant and METHODS[name].quant)] if methods is None else methods
    others += [] if by_adapter else [{"method": name} for name in names if name != first.method]
    own_loss = first.assumptions["trainer"] not in OF_PROGRAMS or first.assumptions.get("kernels")
    saves = [change for change in SAVES if not (own_loss and change is CHUNKED)]
    saves += [ONE_ROW] if first.binding is not None and first.binding.phase == "evaluate" else []
    saving = [change for change in saves if fixed.isdisjoint(change) and not change.items() <= first.assumptions.items()]
    shorter = min_seq_len is not None and size != "seq_len" and "seq_len" not in fixed and min_seq_len < first.seq_len
    lengths: list[dict[str, object]] = [{}, {"seq_len": min_seq_len}] if shorter else [{}]
    for method in others:
        for some in range(2 ** len(saving)):
            saved = {name: value for bit, change in enumerate(saving) if some >> bit & 1 for name, value in change.items()}
            yield from (changes for length in lengths if (changes := {**method, **saved, **length}))


def _rank(plan: Plan, *, by_size: bool) -> tuple[int, int, int, int]:
    """By quality, then by tokens per step; fewer changes before more."""
    quality = QUALITY.index(plan.method) if plan.method in QUALITY else len(QUALITY)
    return quality, -plan.size if by_size else 0, -plan.tokens_per_step, len(plan.changes)


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

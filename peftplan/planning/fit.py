"""`fit`: the largest size of a job that fits a card, as typed and with other methods, ranked as plans.

Composition only: every number is that of `planning.estimate`, and `planning.largest` searches. A plan is a job, whatever it runs
on, so plans over several cards are plans with other options.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args, overload

from peftplan.errors import BoundError, InputError, OptionError, RefusedError, UnknownNameError
from peftplan.job.prepare import prepare
from peftplan.job.requirements import accepted_batch
from peftplan.job.setup import Engine
from peftplan.planning.choosing import smallest_gpu
from peftplan.planning.divided import divided
from peftplan.planning.estimate import cards_and_number, estimate, number_of_gpus
from peftplan.planning.fit_model import model_plan
from peftplan.planning.fit_result import CEILINGS, Binding, Fit, OtherCard, Plan
from peftplan.planning.fit_traced import GUESSES, largest_traced
from peftplan.planning.for_method import base_of, job_options, known_methods, options_for, without_formula
from peftplan.planning.largest import MOST_ASKED, Largest, Probe, largest
from peftplan.planning.plans import Options, changes_of, in_order, kept_options, ranked
from peftplan.planning.question import Question
from peftplan.planning.verdicts import find_cards
from peftplan.results.estimate import Estimate
from peftplan.results.verdict import TIGHT

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from peftplan.job.options import JobOptions

Size = Literal["batch_size", "seq_len", "r", "model"]
Progress = Callable[[str, float], None]

ASKED_OF_OTHERS = 128
"""Sizes that are asked one by one for a plan that changes the job: `asked_from` says how far down that came."""


@overload
def fit(
    model: object = ...,
    *,
    gpu: str,
    max: Size = ...,
    methods: Sequence[str] | None = ...,
    keep: str | Iterable[str] = ...,
    min_seq_len: int | None = ...,
    allow_tight: bool = ...,
    engine: Engine = ...,
    progress: Progress | None = ...,
    **options: Unpack[JobOptions],
) -> Fit: ...
@overload
def fit(
    model: object = ...,
    *,
    gpu: list[str] | tuple[str, ...],
    max: Size = ...,
    methods: Sequence[str] | None = ...,
    keep: str | Iterable[str] = ...,
    min_seq_len: int | None = ...,
    allow_tight: bool = ...,
    engine: Engine = ...,
    progress: Progress | None = ...,
    **options: Unpack[JobOptions],
) -> tuple[Fit, ...]: ...
def fit(
    model: object = None,
    *,
    gpu: str | list[str] | tuple[str, ...],
    max: Size = "batch_size",
    methods: Sequence[str] | None = None,
    keep: str | Iterable[str] = (),
    min_seq_len: int | None = None,
    allow_tight: bool = False,
    engine: Engine = "analytic",
    progress: Progress | None = None,
    **options: Unpack[JobOptions],
) -> Fit | tuple[Fit, ...]:
    """The largest `max` (`batch_size`, `seq_len` in tokens, `r`, `model`) of a job that fits a card, and other plans that do.

    `model` and `options` are those of `estimate`. The first plan is the job as typed, with only that size changed. The others
    use one of `methods` (default: `planning.plans.QUALITY`), turn on checkpointing and a fused loss, and are ranked by quality,
    then by tokens per step.

    - `gpu`: one card, or a list of cards with one answer each.
    - `keep`: options that no plan may change: `method`, `seq_len`, `trainer`, `gradient_checkpointing`, `loss`,
      `eval_batch_size`.
    - `min_seq_len`: plans may shorten sequences down to this length. With `max="seq_len"`, shorter lengths are no plan.
    - `allow_tight`: a plan may be `tight`.
    - `engine`: `trace` traces the job as typed and with each of `methods` (default: none), at a few sizes: those near the
      answer of the formulas, or a bisection if there are no formulas. `progress` is called with the current trace and the share
      that is done.

    *Largest* means that this size and every smaller one fit. From `asked_from` on, every size is estimated. Smaller ones are
    taken to fit, since there is more room there than reserved bytes were seen to drop from one size to a larger one: one of
    them may still be `tight`. With `max="model"`, `model` is a family (`qwen3`), a pattern of
    built-in names or a list of models, and the answer is the largest member that fits, whether or not smaller ones do.

    Raises what `estimate` raises, and UnknownNameError for an unknown method.
    """
    size = max
    model = base_of(options.get("peft_config")) if model is None else model
    if size not in (*CEILINGS, "model"):
        raise UnknownNameError("max", size, (*CEILINGS, "model"))
    fixed = kept_options(keep, size)
    if engine not in get_args(Engine):
        raise UnknownNameError("engine", engine, get_args(Engine))
    methods = None if methods is None else known_methods(methods, "methods")
    if min_seq_len is not None and (not isinstance(min_seq_len, int) or min_seq_len < 1):
        raise BoundError("min_seq_len", min_seq_len, "at least 1")
    if min_seq_len is not None and "seq_len" in fixed and size != "seq_len":
        raise OptionError("min_seq_len", min_seq_len, "keep names seq_len, which no plan may change then")
    if methods is not None and "method" in fixed:
        raise OptionError("methods", methods, "keep names method, which no plan may change then")
    names, count = cards_and_number(gpu)
    options = job_options(options, number_of_gpus(count, options))
    cards = find_cards(names)
    if isinstance(gpu, str) and len(cards) != 1:
        raise InputError("gpu", gpu, "accepted: one card, such as rtx-4090, a capacity such as 24GiB, or a list of them")
    accepted = ("fits", "tight") if allow_tight else ("fits",)
    typed = {name: value for name, value in options.items() if name != size}
    search = Search(size, accepted, min_seq_len, engine, progress)
    if size == "seq_len" and search.smallest > (most := _ends(search, model, job_options(typed))[1]):
        raise BoundError("min_seq_len", min_seq_len, f"at most {most}, the positions of the model")

    def on(card: str) -> Fit:
        def plan(changed: Mapping[str, object], changes: Options) -> Plan:
            if size == "model":
                return model_plan(model, card, changed, changes, accepted, engine, progress)
            return _plan(model, card, search, job_options(changed), changes)

        first = plan(typed, {})
        if size != "seq_len" and min_seq_len is not None and min_seq_len > first.seq_len:
            raise BoundError("min_seq_len", min_seq_len, f"at most the sequence length, {first.seq_len}")
        if engine == "trace":
            changes: Iterable[Options] = [{"method": name} for name in methods or () if name != first.method]
        else:
            changes = changes_of(typed, first, size, methods, fixed, min_seq_len)
        plans, nearest = ranked(first, typed, changes, plan, by_size=size == "model")
        if engine == "analytic" and size != "model" and not first.size:
            misses = (first,) if len(plans) > 1 else (first, *nearest)
            more = divided(model, card, typed, misses, {size: search.smallest_of(first)})
            (_, *over_gpus), _ = ranked(first, typed, more, plan)
            plans = in_order(first, (*plans[1:], *over_gpus))
        elsewhere = (
            None
            if engine == "trace" or any(each.size and "gpus" not in each.changes for each in plans)
            else _other_card(model, typed, search, (first, *nearest))
        )
        return Fit(_asked_for(model, first, size), card, size, plans, nearest, engine, elsewhere)

    answers = tuple(on(card.id) for card in cards)
    return answers[0] if isinstance(gpu, str) else answers


def _asked_for(model: object, first: Plan, size: Size) -> str:
    """The model as a result names it: a family by what was typed."""
    return model if size == "model" and isinstance(model, str) else first.model


def _other_card(model: object, typed: Mapping[str, object], search: Search, plans: Sequence[Plan]) -> OtherCard | None:
    """The smallest card that takes the plan that comes nearest, at its smallest size; None where no card does."""
    near = max(plans, key=lambda plan: plan.headroom_bytes)
    changed = {**typed, **near.changes}
    options = job_options(options_for(near.method, changed) if "method" in near.changes else changed)
    if search.size == "model":
        model = near.model  # a member of the family
    else:
        options = job_options(options, {search.size: search.smallest_of(near)})
    card = smallest_gpu(model, allow_tight="tight" in search.accepted, **options)
    return None if card is None else OtherCard(card.gpu, near.model, near.changes, card.usable_bytes, card.needed_bytes)


class Search(NamedTuple):
    """What is searched: the size, the verdicts that are good enough, the shortest sequences, and who is asked."""

    size: Size
    accepted: tuple[str, ...]
    min_seq_len: int | None
    engine: Engine = "analytic"
    progress: Progress | None = None

    @property
    def smallest(self) -> int:
        """The size below which nothing is asked."""
        return self.min_seq_len if self.size == "seq_len" and self.min_seq_len else 1

    def smallest_of(self, plan: Plan) -> int:
        """The size at which a plan was asked that fits at none: longer than its completions where it writes them."""
        return plan.seq_len if self.size == "seq_len" else self.smallest


def _plan(model: object, gpu: str, search: Search, options: JobOptions, changes: Mapping[str, object]) -> Plan:
    """The plan with the largest size of one job; of size 0, with the verdict at the smallest, where nothing fits."""
    if search.engine == "trace":
        return _traced_plan(model, gpu, search, options, changes)
    size, accepted, (smallest, ceiling) = search.size, search.accepted, _ends(search, model, options)
    ask = _estimates(model, gpu, size, options, smallest)
    start = ask(smallest)
    if (why := _unknown(start)) is not None:
        raise RefusedError(f"fit: {why}")

    def probe(number: int) -> Probe:
        return _probe(ask(max(number, smallest)), accepted)

    if not _probe(start, accepted).accepted:
        edge, answer = Largest(0, smallest), start
    else:
        most_asked = MOST_ASKED if not changes else ASKED_OF_OTHERS
        edge = largest(probe, ceiling=ceiling, most_asked=most_asked)
        edge = edge if edge.size >= smallest else Largest(0, smallest)
        answer = ask(edge.size or smallest)
    return _plan_at(edge, answer, ask, size, changes)


def _plan_at(edge: Largest, answer: Estimate, ask: Callable[[int], Estimate], size: Size, changes: Mapping[str, object]) -> Plan:
    """The plan of an answer, with what keeps it from the next size."""
    beyond = ask(edge.size + 1) if edge.size and not edge.bounded else None if edge.size else answer
    if beyond is not None and (why := _unknown(beyond)) is not None:
        plan = Plan.of(answer, edge._replace(bounded=True), size=size, changes=changes, binding=None)
        number = f"{size.replace('_', ' ')} {edge.size + 1:,}"
        return plan._replace(warnings=(*plan.warnings, f"from {number} on, nothing is known: {why}"), next_is_known=False)
    plan = Plan.of(answer, edge, size=size, changes=changes, binding=None if beyond is None else Binding.of(answer, beyond))
    if beyond is None or size != "batch_size":
        return plan
    return plan._replace(next_larger=f"Batch size {beyond.assumptions['batch_size']:,}")


def _traced_plan(model: object, gpu: str, search: Search, options: JobOptions, changes: Mapping[str, object]) -> Plan:
    """The same by traces, around the answer of the formulas where there are any."""
    size, seen, (smallest, ceiling) = search.size, dict[int, Estimate](), _ends(search, model, options)
    word = size.replace("_", " ")

    def ask(number: int) -> Estimate:
        if number not in seen:
            tell = search.progress
            telling = None if tell is None else lambda what, share: tell(f"{word} {number:,}: {what}", share)
            seen[number] = estimate(model, gpu=gpu, engine="trace", progress=telling, **job_options(options, {size: number}))
        return seen[number]

    try:
        guess = _plan(model, gpu, search._replace(engine="analytic"), options, changes).size
    except RefusedError:
        guess = GUESSES[size]
    edge = largest_traced(
        lambda number: _probe(ask(number), search.accepted),
        smallest=smallest,
        ceiling=ceiling,
        guess=guess,
    )
    return _plan_at(edge, ask(edge.size or smallest), ask, size, changes)


def _estimates(model: object, gpu: str, size: Size, options: JobOptions, smallest: int) -> Callable[[int], Estimate]:
    """The job at any size: by its formulas' own sizes where they have a name for it.

    A batch size that the trainer refuses is asked as the next larger one that it accepts.
    """
    start = estimate(model, gpu=gpu, **job_options(options, {size: smallest}))
    assert isinstance(start.origin, Question)
    job = start.origin.inventory.job

    @cache
    def at(number: int) -> Estimate:
        if number == smallest:
            return start
        if size == "r":
            return estimate(model, gpu=gpu, **job_options(options, {"r": number}))
        return start.at(**{size: number})

    def ask(number: int) -> Estimate:
        if size != "batch_size":
            return at(number)
        sized = job.setup.model_copy(update={"batch_size": number})
        return at(accepted_batch(sized, job.replicas))

    return ask


def _ends(search: Search, model: object, options: JobOptions) -> tuple[int, int]:
    """The first and the last size that is asked: sequences have one token more than the completions that a job writes, and end at
    the model's table of positions, if it has one."""
    if search.size != "seq_len":
        return search.smallest, CEILINGS[search.size]
    longest = options.get("max_completion_length")
    sized = job_options(options, {"seq_len": longest + 1}) if isinstance(longest, int) else options
    job = prepare(model, **sized)
    written = job.setup.max_completion_length if job.setup.by.generates else None
    last = CEILINGS["seq_len"]
    return max(search.smallest, (written or 0) + 1), min(last, job.architecture.max_positions or last)


def _unknown(result: Estimate) -> str | None:
    """Why there is no verdict of a job; None where there is one."""
    if result.peaks is None:
        return without_formula(result)
    if result.peaks.incomplete and result.engine == "analytic":
        return result.peaks.incomplete[0]
    why = result.peaks.unreserved
    return None if why is None else f"reserved bytes are not known: {why}"


def _probe(result: Estimate, accepted: tuple[str, ...]) -> Probe:
    """The estimate on its one card, as `largest` reads it; where nothing is known, it does not fit."""
    if _unknown(result) is not None:
        return Probe(False, sys.maxsize, sys.maxsize, 0)
    assert result.peaks is not None
    (card,) = result.gpus
    left_over = 0 if "tight" in accepted else -int(-TIGHT * card.usable_bytes // 1)
    room = card.usable_bytes - card.context_bytes - left_over
    return Probe(card.verdict in accepted, result.peaks.allocated, card.needed_bytes - card.context_bytes, room)

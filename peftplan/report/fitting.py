"""Plans as text: the answer in the first line, then the other plans, then what comes nearest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peftplan.optim import parse_optim
from peftplan.planning.choosing import Member
from peftplan.planning.fit_result import CEILINGS, Fit, Plan
from peftplan.report.cards import card_name
from peftplan.report.screen import Glyphs
from peftplan.report.tabular import Column
from peftplan.results.verdict import Verdict
from peftplan.units import format_bytes

PLAN_COLUMNS = (
    Column("plan"),
    Column("batch", right=True),
    Column("seq", right=True),
    Column("r", right=True),
    Column("needs", right=True),
    Column("left", right=True),
    Column("verdict"),
    Column("what binds", wide=True),
)
CARD_COLUMNS = (
    Column("card"),
    Column("usable", right=True),
    Column("needs", right=True),
    Column("left", right=True),
    Column("verdict"),
)
MEMBER_COLUMNS = (
    Column("method"),
    Column("largest model"),
    Column("needs", right=True),
    Column("left", right=True),
    Column("verdict"),
)
RANKING = (
    "Plans are ranked by method, then by tokens per step: full > DoRA > LoRA > QDoRA > QLoRA > IA3 > prompts. "
    "That order is advice; tasks differ."
)
NOT_UNDER_FSDP2 = ("adafactor", "galore_adafactor")
"""Optimizers that FSDP2 refuses, as it does those of bitsandbytes; DeepSpeed runs them."""
MOST_CARDS = 10
"""Cards that a table shows, the smallest that do."""
NO_CARD = "No card in the catalogue can run the job."
WORDS = {"batch_size": "batch size", "seq_len": "sequence length", "r": "rank", "model": "model"}


def divided(assumptions: Mapping[str, object]) -> str | None:
    """What changes most where several GPUs have too little room under DDP; None where nothing was compared that divides it."""
    if assumptions.get("strategy") != "ddp" or assumptions.get("quant") == "int8":
        return None
    optimizer = parse_optim(str(assumptions["optim"]))
    by_zero = optimizer.package == "bitsandbytes" or optimizer.name in NOT_UNDER_FSDP2
    return f"DDP keeps the whole model on each GPU; --strategy {'zero3' if by_zero else 'fsdp2 or zero3'} divides it among them"


def _over(plan: Plan) -> str:
    """The number of GPUs, of which the numbers are those of the one that needs most."""
    world = plan.assumptions.get("world_size")
    return f" over {world} GPUs ({plan.assumptions['strategy']}), per GPU:" if world else ""


def headline(result: Fit, marks: Glyphs) -> str:
    """The answer: the largest size of the job as typed."""
    first, word = result.plans[0], WORDS[result.size]
    job = f"{card_name(result.gpu)}: {result.model}{marks.dot}{first.method}{_over(first)}"
    if first.verdict == "does_not_run":
        return f"{marks.fails} {job} does not run: {first.reason}"
    needs = f"needs {format_bytes(first.needed_bytes)} of {format_bytes(first.usable_bytes)}{_assumed(first)}"
    if not first.size and first.verdict == "tight":
        return f"{marks.tight} {job} is tight at the smallest {word}, and fits at none: {needs} (--allow-tight accepts it)"
    if not first.size and result.size == "seq_len" and first.seq_len > 1:
        return f"{marks.fails} {job} does not fit at {first.seq_len:,} tokens, nor at more: it {needs}{_others(result)}"
    if not first.size:
        where = "with" if result.size == "model" else "at"
        because = f", because of its evaluation of {rows} rows" if (rows := _evaluated_rows(first)) else ""
        return f"{marks.fails} {job} does not fit {where} any {word}{because}: {where} the smallest it {needs}{_others(result)}"
    verb = "fits" if first.verdict == "fits" else "runs, tightly,"
    if result.size == "model":
        largest = "the largest there is" if first.bounded else "the largest that does"
        return f"{marks.fits} {job} {verb} with {first.model}, {largest}; it {needs}"
    more = "" if first.next_is_known else ", and perhaps more"
    if first.bounded and first.next_is_known:
        of_model = result.size == "seq_len" and first.size < CEILINGS["seq_len"]
        more = " (all that the model has)" if of_model else ", and more: the search ended there"
    return f"{marks.fits} {job} {verb} up to {word} {first.size:,}{more}; it {needs}"


def _evaluated_rows(plan: Plan) -> object:
    """How many rows an evaluation has where it, and no step, needs most."""
    return plan.assumptions["eval_batch_size"] if plan.binding is not None and plan.binding.phase == "evaluate" else None


def _others(result: Fit) -> str:
    """How many of the other plans fit, where the job as typed does not."""
    count = sum(bool(plan.size) for plan in result.plans[1:])
    return f"; {count} of the plans below {'fit' if count > 1 else 'fits'}" if count else ""


def _assumed(plan: Plan) -> str:
    return f", {format_bytes(plan.context_bytes)} of CUDA context assumed" if plan.context_assumed else ""


def remarks(result: Fit) -> Iterator[str]:
    """What the answer's number means, where it may surprise."""
    first, word = result.plans[0], WORDS[result.size]
    yield from (f"Warning: {warning}" for warning in first.warnings)
    if result.engine == "trace" and result.size != "model":
        yield f"Only sizes around the answer were traced; whether every smaller {word} fits was not checked."
    if first.binding is not None and first.verdict != "does_not_run":
        following = first.next_larger or f"{word.capitalize()} {first.size + 1:,}"
        beyond = f"{following} {_would(first.binding.verdict)}" if first.size else "At the smallest"
        yield f"{beyond}: {first.binding.text(grows=first.size > 0)}."
    divides = any("strategy" in plan.changes for plan in result.plans)
    if not first.size and not divides and (sentence := divided(first.assumptions)) is not None:
        yield f"{sentence}."
    if first.fits_again is not None:
        yield (
            f"{word.capitalize()} {first.fits_again:,} fits again: torch's allocator places blocks differently there. "
            f"From {first.asked_from:,} to {first.size:,} every size was checked and fits."
        )
    for plan in result.nearest:
        if plan.binding is not None:
            of_model = f" with {plan.model}" if result.size == "model" else ""
            yield f"Also tried: {_name(plan)}{of_model} {_would(plan.verdict)}: {plan.binding.text(grows=False)}."
    if (card := result.other_card) is not None:
        needs = f"{format_bytes(card.needed_bytes)} of {format_bytes(card.usable_bytes)}"
        size = f"with {card.model}" if result.size == "model" else f"at the smallest {word}"
        how = f"{changed(card.changes) or 'as typed'}, {size}"
        yield f"The smallest card that can run it: {card_name(card.gpu)}, {how} (needs {needs}; --which-gpu lists more)."


def _would(verdict: str) -> str:
    return "would be tight" if verdict == "tight" else "does not fit"


def ranking(result: Fit) -> str | None:
    """How the plans are ranked, where there are others than the job as typed."""
    return RANKING if len(result.plans) > 1 else None


def plan_columns(result: Fit) -> tuple[Column, ...]:
    """The columns of the plans: the model too, where that is what plans differ in."""
    first, *others = PLAN_COLUMNS
    return (first, Column("model", whole=True), *others) if result.size == "model" else PLAN_COLUMNS


def plan_cells(result: Fit) -> list[tuple[str, ...]]:
    """A row per plan; `what binds` is the category and the phase that grow into the limit at the next larger size."""
    return [
        (
            _name(plan),
            *((plan.model,) if result.size == "model" else ()),
            f"{plan.batch_size:,}",
            f"{plan.seq_len:,}" if plan.seq_len else "",
            "" if plan.r is None else str(plan.r),
            format_bytes(plan.needed_bytes),
            format_bytes(plan.headroom_bytes),
            _words(plan.verdict),
            "" if plan.binding is None else f"{plan.binding.category.replace('_', ' ')} in {plan.binding.phase}",
        )
        for plan in result.plans
    ]


def _name(plan: Plan) -> str:
    return changed(plan.changes) or f"as typed ({plan.method})"


def changed(changes: Mapping[str, object]) -> str:
    """Options as one would type them: `--method qlora --gradient-checkpointing`."""
    parts = []
    for name, value in changes.items():
        option = name.replace("_", "-")
        parts.append(f"--{option}" if value is True else f"--no-{option}" if value is False else f"--{option} {value}")
    return " ".join(parts)


def facts(result: Fit) -> list[dict[str, object]]:
    """One record per plan, for CSV."""
    return [
        {
            "gpu": result.gpu,
            **plan.to_dict(result.size),
            "binding": plan.binding and plan.binding.text(grows=plan.size > 0),
            "changes": changed(plan.changes),
            "warnings": "; ".join(plan.warnings),
        }
        for plan in result.plans
    ]


def card_cells(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """A row per card that takes the job."""
    return [
        (v.gpu, format_bytes(v.usable_bytes), format_bytes(v.needed_bytes), format_bytes(v.headroom_bytes), _words(v.verdict))
        for v in verdicts
    ]


def member_cells(members: Sequence[Member]) -> list[tuple[str, ...]]:
    """A row per method with the largest model that the card takes."""
    return [(member.method, _largest(member), *_needs(member.verdict)) for member in members]


def _largest(member: Member) -> str:
    """The model; `at least` where larger ones have no formula."""
    if member.model is None:
        return "-" if member.error else "none"
    return f"at least {member.model}" if member.error else member.model


def refusals(members: Sequence[Member]) -> str | None:
    """What is not known of methods, a line each."""
    return "\n".join(f"{member.method}: {member.error}" for member in members if member.error) or None


def _needs(verdict: Verdict | None) -> tuple[str, str, str]:
    if verdict is None:
        return "", "", ""
    return format_bytes(verdict.needed_bytes), format_bytes(verdict.headroom_bytes), _words(verdict.verdict)


def _words(verdict: str) -> str:
    return verdict.replace("_", " ")

"""Plans as text: the answer in the first line, then the other plans, then what comes nearest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftplan.planning.choosing import Member
from peftplan.planning.fit_result import Fit, Plan
from peftplan.planning.result import Verdict
from peftplan.report.tabular import Column
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
MOST_CARDS = 10
"""Cards that a table shows, the smallest that do."""
NO_CARD = "No card of the catalogue takes the job."
WORDS = {"batch_size": "batch size", "seq_len": "sequence length", "r": "rank"}


def headline(result: Fit) -> str:
    """The answer: the largest size of the job as typed."""
    first, word = result.plans[0], WORDS[result.size]
    if not first.size:
        return (
            f"✗ {result.gpu}: {result.model} · {first.method} does not fit at any {word}; "
            f"at the smallest it needs {format_bytes(first.needed_bytes)} of {format_bytes(first.usable_bytes)}"
        )
    left = f"needs {format_bytes(first.needed_bytes)} of {format_bytes(first.usable_bytes)}"
    more = ", and more: the search ended there" if first.bounded else ""
    return f"✓ {result.gpu}: {result.model} · {first.method} fits up to {word} {first.size:,}{more} ({left})"


def remarks(result: Fit) -> Iterator[str]:
    """What the answer's number means, where it may surprise."""
    first, word = result.plans[0], WORDS[result.size]
    if first.binding is not None:
        yield f"{_one_more(first, word)}: {first.binding.text}."
    if first.fits_again is not None:
        yield (
            f"{word} {first.fits_again:,} fits again: torch's allocator places blocks differently there. "
            f"Every size up to {first.size:,} fits."
        )
    for plan in result.nearest:
        if plan.binding is not None:
            yield f"nearest that does not fit: {_name(plan)}: {plan.binding.text}"


def _one_more(plan: Plan, word: str) -> str:
    if not plan.size or plan.binding is None:
        return "What is in the way"
    verdict = "would be tight" if plan.binding.verdict == "tight" else "does not fit"
    return f"{word.capitalize()} {plan.size + 1:,} {verdict}"


def plan_cells(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """A row per plan; `what binds` is the category and the phase that grow into the limit at the next larger size."""
    return [
        (
            _name(plan),
            f"{plan.batch_size:,}",
            f"{plan.seq_len:,}",
            "" if plan.r is None else str(plan.r),
            format_bytes(plan.needed_bytes),
            format_bytes(plan.headroom_bytes),
            plan.verdict,
            "" if plan.binding is None else f"{plan.binding.category} in {plan.binding.phase}",
        )
        for plan in plans
    ]


def _name(plan: Plan) -> str:
    return changed(plan.changes) or f"as typed ({plan.method})"


def changed(changes: Mapping[str, Any]) -> str:
    """Options as one would type them: `--method qlora --gradient-checkpointing`."""
    parts = []
    for name, value in changes.items():
        option = name.replace("_", "-")
        parts.append(f"--{option}" if value is True else f"--no-{option}" if value is False else f"--{option} {value}")
    return " ".join(parts)


def facts(result: Fit) -> list[dict[str, Any]]:
    """One record per plan, for CSV."""
    return [
        {**plan.to_dict(result.size), "binding": plan.binding and plan.binding.text, "changes": changed(plan.changes)}
        for plan in result.plans
    ]


def card_cells(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """A row per card that takes the job."""
    return [
        (v.gpu, format_bytes(v.usable_bytes), format_bytes(v.needed_bytes), format_bytes(v.headroom_bytes), v.verdict)
        for v in verdicts
    ]


def member_cells(members: Sequence[Member]) -> list[tuple[str, ...]]:
    """A row per method with the largest model that the card takes."""
    return [(member.method, member.model or "none", *_needs(member.verdict)) for member in members]


def _needs(verdict: Verdict | None) -> tuple[str, str, str]:
    if verdict is None:
        return "", "", ""
    return format_bytes(verdict.needed_bytes), format_bytes(verdict.headroom_bytes), verdict.verdict

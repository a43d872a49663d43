"""What to change when a job does not fit, as rows of text."""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.report.cards import card_name
from peftplan.results.advice import FITS, Advice, Advised
from peftplan.results.estimate import Estimate
from peftplan.units import GIB, format_bytes

COLUMNS = ("change", "peak", "saves", "then")
NOW = "(none)"
"""The job as it is, in the column of changes."""
UNKNOWN = "no advice: the job has no formulas, and a trace is not repeated with other options"


def rows(result: Estimate, gpu: str, changes: Iterable[Advice]) -> list[tuple[str, str, str, str]]:
    """The job as it is on a card, then each change: its options, the peak where it was replayed, what it saves, the verdict."""
    assert result.peaks is not None
    unchanged = (NOW, format_bytes(result.peaks.allocated), "", "does not fit")
    return [unchanged, *(_row(advice, gpu) for advice in changes)]


def _row(advice: Advice, gpu: str) -> tuple[str, str, str, str]:
    peak = "" if advice.peak_allocated is None else format_bytes(advice.peak_allocated)
    return command_line(advice, gpu), peak, format_bytes(advice.saving_bytes), _verdict(advice)


def _verdict(advice: Advice) -> str:
    """In words. A change that was not replayed, and whose tensors leave enough room, may fit."""
    return "may fit" if advice.verdict is None else advice.verdict.replace("_", " ")


def title(gpu: str, engine: str) -> str:
    """The heading of the column of changes; a traced job's are not traced."""
    return f"{COLUMNS[0]}, for {gpu}" + (" (by formulas)" if engine == "trace" else "")


def outcome(advice: Advice) -> str:
    """What a change brings, in a few words."""
    saved = f"saves {advice.saving_bytes / GIB:,.1f} GiB"
    if advice.verdict is None:
        return f"{saved}, {_verdict(advice)}"
    if advice.headroom_bytes is None or advice.verdict not in FITS:
        return saved
    left = f"{advice.headroom_bytes / GIB:,.1f} GiB left" if advice.headroom_bytes >= 0 else "releases cached memory"
    return f"{advice.verdict}, {left}"


def kept_strategy(result: Estimate) -> str | None:
    """The strategy that was chosen, which no change replaces."""
    return str(result.assumptions["strategy"]) if "strategy" in result.chosen else None


def without_help(gpu: str, advised: Advised, *, strategy: str | None = None) -> str | None:
    """One sentence where no change makes the job fit, under that `strategy`; None where one does."""
    if advised.helps:
        return None
    if not advised.counted:
        return f"{card_name(gpu)}: {UNKNOWN}"
    alone = "" if advised.several_gpus is None else " on one card"
    why = f"no change that peftplan knows makes it fit{alone}{f' with --strategy {strategy}' if strategy else ''}"
    if advised.weights_alone is not None:
        why = f"no change helps{alone}, since the weights alone take {format_bytes(advised.weights_alone)}"
    other = "no single card of the catalogue would do"
    if advised.smallest_card is not None:
        other = f"the smallest card it {'may fit' if advised.lower_bound else 'fits'} is the {card_name(advised.smallest_card)}"
    return f"{card_name(gpu)}: {why}; {other}"


def command_line(advice: Advice, gpu: str) -> str:
    """The options as they are typed, a number of GPUs with the card."""
    typed = (("gpu", f"{value}x{gpu}") if name == "gpus" else (name, value) for name, value in advice.options.items())
    return " ".join(_option(name, value) for name, value in typed)


def _option(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else {"keep-outputs": "--drop-outputs"}.get(flag, f"--no-{flag}")
    return f"--{flag} {value}"

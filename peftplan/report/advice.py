"""What to change when a job does not fit, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftplan.planning.advice import Advice
from peftplan.units import format_bytes

COLUMNS = ("change", "peak", "saves", "then")
NOW = "(none)"
"""The job as it is, in the column of changes."""


def rows(found: Sequence[Advice]) -> list[tuple[str, str, str, str]]:
    """The job as it is, then each change."""
    unchanged = found[0].peak_allocated + found[0].saving_bytes
    return [(NOW, format_bytes(unchanged), "", "does not fit"), *map(row, found)]


def title(gpu: str, engine: str) -> str:
    """The heading of the column of changes; a traced job's are not traced."""
    return f"{COLUMNS[0]}, for {gpu}" + (" (by formulas)" if engine == "trace" else "")


def row(advice: Advice) -> tuple[str, str, str, str]:
    """One change as its options on the command line, the peak with it, what it saves, the verdict."""
    words = " ".join(_option(name, value) for name, value in advice.options.items())
    verdict = advice.verdict.replace("_", " ")
    return words, format_bytes(advice.peak_allocated), format_bytes(advice.saving_bytes), verdict


def _option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else {"keep-outputs": "--drop-outputs"}.get(flag, f"--no-{flag}")
    return f"--{flag} {value}"

"""A check of measured runs, in the format that is asked for."""

from __future__ import annotations

from peftplan.accuracy.check import Check
from peftplan.report.accuracy import as_markdown, facts, junit
from peftplan.report.writing import as_json

FORMATS = ("table", "json", "markdown", "junit")


def check(checked: Check, *, fmt: str) -> None:
    """Write a check to stdout."""
    if fmt == "json":
        as_json(facts(checked))
    elif fmt == "junit":
        print(junit(checked))
    elif fmt == "markdown":
        print("\n\n".join(as_markdown(checked)))
    else:
        from peftplan.report import accuracy_terminal

        accuracy_terminal.check(checked)

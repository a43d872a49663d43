"""A check of measured runs, in the format that is asked for."""

from __future__ import annotations

import json
import sys

from peftplan.accuracy.check import Check
from peftplan.report.accuracy import as_markdown, facts, junit

FORMATS = ("table", "json", "markdown", "junit")


def check(checked: Check, *, fmt: str) -> None:
    """Write a check to stdout."""
    if fmt == "json":
        json.dump(facts(checked), sys.stdout, indent=2, ensure_ascii=False)
        print()
    elif fmt == "junit":
        print(junit(checked))
    elif fmt == "markdown":
        print("\n\n".join(as_markdown(checked)))
    else:
        from peftplan.report import accuracy_terminal

        accuracy_terminal.check(checked)

"""Rows of text that every format shares."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from peftplan.memory.ledger import CATEGORIES
from peftplan.planning.result import COUNTED, Estimate
from peftplan.units import format_bytes

LINE_COLUMNS = ("category", "name", "bytes", "place", "formula", "source")


def line_rows(result: Estimate) -> list[tuple[str, ...]]:
    """One row per line of the ledger."""
    return [
        (line.category, line.name.replace("{}", "*"), str(line.bytes()), line.place, line.formula, line.source)
        for line in result.ledger
    ]


def category_rows(result: Estimate) -> list[tuple[str, str, str]]:
    """(category, bytes, GiB) of what is counted, in the fixed order; empty categories are left out."""
    by_category = result.ledger.by_category()
    return [
        (category, f"{by_category[category]:,}", format_bytes(by_category[category]))
        for category in CATEGORIES
        if category in COUNTED and by_category[category]
    ]


def assumption_rows(assumptions: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) as text: lists joined, booleans as yes and no, names of module families shortened to what is told apart."""
    rows = []
    for name, value in assumptions.items():
        if name == "notes" or (name == "trust_remote_code" and not value):
            continue
        if name == "target_modules" and isinstance(value, list):
            value = list(dict.fromkeys(target.rpartition("}.")[2].rpartition(".")[2] for target in value))
        if isinstance(value, bool):
            value = "yes" if value else "no"
        rows.append((name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))
    return rows


def write_csv(columns: Sequence[str], rows: Iterable[Sequence[str]], stream: IO[str]) -> None:
    """RFC 4180 rows with a header."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)

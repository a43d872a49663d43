"""Write docs/published-counts.md from data/published/trainable_counts.jsonl: `python tools/published_counts.py`.

Nothing is computed here but how many rows are of each kind; `tests/test_published_counts.py` makes every row's call and checks
what the row says of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "published" / "trainable_counts.jsonl"
OUTPUT = ROOT / "docs" / "published-counts.md"
Row = dict[str, Any]

READINGS: dict[str, str] = {
    "original-head-too": "trainable holds the head twice: peft 0.3 to 0.5 train the original beside its copy",
    "head-in-place": "total lacks the copy of the head: peft up to 0.2 trains the head itself",
    "packed-4bit": "total counts packed 4-bit weights, two elements to a byte",
    "without-adapter": "total is the base without the adapter (AdapterHub)",
    "packed-4bit-without-adapter": "total is the packed 4-bit base without head and adapter (AdapterHub)",
    "plus": "a stated sum lies between the two: what the run trained or held besides",
}
"""How a printed number is made from ours, where it is not simply equal."""

KINDS: dict[str, str] = {
    "equal": "equal",
    "inferred": "equal, once one fact that the source leaves out is read off the count",
    "differs": "equal, once the stated difference in counting is applied",
    "not expressible": "no call of peftplan says it",
}

INTRO = """# Published counts

Do peftplan's parameter counts match what others have printed? Model cards, notebooks and issues often show the line of
`print_trainable_parameters()`. This page lists such counts beside what `peftplan.estimate` returns for the same run, and explains
every difference.

`data/published/trainable_counts.jsonl` has each count with its source, the call, and how to read the printed number; the tests
make every call and compare exactly. `tools/published_counts.py` writes this page from that file."""

EQUAL_NOTE = """*Equal* means that every number of the source is equal. In the second row, a number does not check the fact that
was read off it; a table below says which fact that is."""

SUMS_NOTE = "Where the sizes are known, the printed number is checked all the same, against a sum written out in the row:"


def load_rows() -> list[Row]:
    """The rows in the order of the file."""
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def kind(row: Row) -> str:
    """One of `KINDS`; a row that needs both a difference and an inference counts as `differs`."""
    if "not_expressible" in row:
        return "not expressible"
    if any(reading != "equal" for reading in row["reading"].values()):
        return "differs"
    return "inferred" if "inferred" in row else "equal"


def readings(row: Row) -> list[str]:
    """The names in `READINGS` that a row uses."""
    names = ("plus" if isinstance(reading, dict) else reading for reading in row.get("reading", {}).values())
    return [name for name in names if name != "equal"]


def page(rows: list[Row]) -> str:
    """The whole page."""
    kinds = Counter(map(kind, rows))
    left_out = [row["not_expressible"] for row in rows if kind(row) == "not expressible"]
    sums = sum("trainable_sum" in row for row in left_out)
    parts = [
        INTRO,
        _table(("result", "rows"), [(text, str(kinds[name])) for name, text in KINDS.items()] + [("all", str(len(rows)))]),
        EQUAL_NOTE,
        "## Counted differently",
        _table(("how", "rows"), _counted(READINGS, (name for row in rows for name in readings(row)))),
        _table(("id", "model", "why"), [_why(row) for row in rows if kind(row) == "differs"]),
        "## Read off the count",
        _table(("id", "model", "what"), [(row["id"], _model(row), row["inferred"]) for row in rows if "inferred" in row]),
        "## Not expressible",
        f"{SUMS_NOTE} {sums} of {len(left_out)}.",
        _table(("reason", "rows"), [(name, str(n)) for name, n in sorted(Counter(r["reason"] for r in left_out).items())]),
        _table(("id", "model", "method", "why"), [_left_out(row) for row in rows if kind(row) == "not expressible"]),
        "## All rows",
        _table(("id", "model", "method", "trainable", "total", "source", "result"), [_line(row) for row in rows]),
    ]
    return "\n\n".join(parts) + "\n"


def _counted(names: dict[str, str], used: Iterable[str]) -> list[tuple[str, str]]:
    counts = Counter(used)
    return [(text, str(counts[name])) for name, text in names.items()]


def _why(row: Row) -> tuple[str, ...]:
    return row["id"], _model(row), row["because"]


def _left_out(row: Row) -> tuple[str, ...]:
    gap = row["not_expressible"]
    return row["id"], _model(row), row["method"], f"{gap['reason']}: {gap['because']}"


def _line(row: Row) -> tuple[str, ...]:
    total = f"{row['total']:,}" if "total" in row else "not printed"
    return row["id"], _model(row), row["method"], f"{row['trainable']:,}", total, _source(row), kind(row)


def _source(row: Row) -> str:
    """Repository, path and revision, or the address where there is no repository; and the licence where one is stated."""
    place = row.get("url") or " ".join(part for part in (row["repo"], row["path"], row.get("rev", "")[:12]) if part)
    return f"{place} ({row['licence']})" if "licence" in row else str(place)


def _model(row: Row) -> str:
    return str(row["model"])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    OUTPUT.write_text(page(load_rows()), encoding="utf-8")

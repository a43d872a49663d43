"""Rows that every format shares: cells of text for people, facts for programs."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

from peftplan.ledger import EVERY_CATEGORY, Category, Place
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks
from peftplan.results.verdict import Verdict
from peftplan.units import MIB, format_bytes


class Column(NamedTuple):
    """One column of a table: numbers stand to the right, a narrow terminal leaves `wide` ones out, `whole` ones never wrap."""

    header: str
    right: bool = False
    wide: bool = False
    whole: bool = False


class LineFacts(NamedTuple):
    """One line of the ledger, as tables show it."""

    category: Category
    name: str
    bytes: int
    place: Place
    formula: str
    source: str


def line_facts(result: Estimate) -> list[LineFacts]:
    """The lines of the ledger, category by category."""
    facts = [
        LineFacts(line["category"], line["name"], line["bytes"], line["place"], line["formula"], line["source"])
        for line in result.lines()
    ]
    return sorted(facts, key=lambda line: EVERY_CATEGORY.index(line.category))


def family(name: str) -> str:
    """A family of modules as it is shown: `model.layers.*.mlp.up_proj`."""
    return name.replace("{}", "*")


def category_rows(result: Estimate) -> list[tuple[str, str, str]]:
    """(category, bytes, GiB) of what is counted, in the fixed order; empty categories are left out."""
    by_category = result.ledger.by_category()
    return [
        (category, f"{by_category[category]:,}", format_bytes(by_category[category]))
        for category in EVERY_CATEGORY
        if category in result.counted and by_category.get(category)
    ]


def largest_line(result: Estimate) -> str:
    """What fills a card most."""
    line = result.largest_line
    return f"{family(line.name)} ({line.category}), {format_bytes(line.bytes())}"


def context(verdict: Verdict) -> str:
    """The CUDA context that a verdict counts, and whether it was assumed."""
    return format_bytes(verdict.context_bytes) + (" assumed" if verdict.context_assumed else "")


def needs(result: Estimate) -> list[str]:
    """What `needed` counts, where it is not the same on every card."""
    if len({verdict.needed_bytes - verdict.context_bytes for verdict in result.gpus}) < 2:
        return []
    first = result.gpus[0].gpu
    return [f"needed: reserved bytes with each card's kernels and its CUDA context; the sums are {first}'s"]


def incomplete(peaks: Peaks) -> list[str]:
    """What a peak leaves out, in lines: none where it is complete."""
    return [f"the peak is a lower bound: {what}" for what in peaks.incomplete]


def labels(result: Estimate, columns: Iterable[str]) -> list[dict[str, object]]:
    """Rows of a CSV without bytes: `incomplete` where a peak is a lower bound or missing, and each `warning`."""
    incomplete = result.peaks.incomplete if result.peaks else result.not_modelled
    unsupported = [f"{key}: {row['why']}" for key, row in (result.config["unsupported"] if result.config else {}).items()]
    incomplete = (*unsupported, *incomplete)
    rows = [*(("incomplete", what) for what in incomplete), *(("warning", what) for what in result.warnings)]
    return [{**dict.fromkeys(columns), "category": category, "name": what} for category, what in rows]


def not_counted(result: Estimate) -> str:
    """What the numbers leave out."""
    if result.peaks is None:
        return f"Not counted yet, so no peak is stated: {'; '.join(result.not_modelled)}."
    return f"Not counted in the sums: {'; '.join(result.not_modelled)}."


GROUPED_FROM = 100_000
"""Whole numbers from here on are read with their thousands apart; batch sizes and lengths as people type them."""


def beside_card(result: Estimate) -> Iterator[str]:
    """What a step needs that is on no card: CUDA managed memory, and host memory of a strategy, if more than counts of steps."""
    if result.managed_bytes:
        yield f"{format_bytes(result.managed_bytes)} of paged optimizer states in CUDA managed memory"
    over_gpus = result.distributed
    if over_gpus is not None and over_gpus.host_bytes >= MIB:
        per_node = format_bytes(over_gpus.host_bytes * (over_gpus.strategy.gpus or 1))
        yield f"{format_bytes(over_gpus.host_bytes)} per rank in host memory, {per_node} on a node"


def reserved_range(peaks: Peaks) -> str | None:
    """Both ends of the reserved bytes that depend on the GPU's pace, and the reason; None where they do not."""
    if not peaks.by_pace or peaks.reserved is None or peaks.reserved_at_most is None:
        return None
    least, most = format_bytes(peaks.reserved), format_bytes(peaks.reserved_at_most)
    if least == most:
        return f"reserved {most}, however late the GPU is (FSDP1's record_stream)"
    return f"reserved {least} to {most}, by how late the GPU is (FSDP1's record_stream); verdicts count the most"


def assumption_rows(assumptions: Mapping[str, object]) -> list[tuple[str, str]]:
    """(name, value) as text: lists joined, booleans as yes and no, names of module families shortened to what is told apart."""
    rows = []
    for name, value in assumptions.items():
        if name == "notes" or (name == "trust_remote_code" and not value):
            continue
        if name == "target_modules" and isinstance(value, list):
            value = list(dict.fromkeys(_told_apart(target) for target in value))
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if isinstance(value, int) and value >= GROUPED_FROM:
            value = f"{value:,}"
        rows.append((name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))
    return rows


def _told_apart(target: str) -> str:
    """The end of a module family's name: `q_proj`; with what it is an item of, where that is all (`mlp.*`)."""
    parts = family(target).split(".")
    return ".".join(parts[-2:]) if parts[-1] == "*" else parts[-1]


def write_csv(facts: Sequence[Mapping[str, object]], stream: IO[str]) -> None:
    """RFC 4180 rows under a header of the facts' names: null is empty, a list of texts is joined by `;`, other nests are JSON."""
    import csv

    writer = csv.DictWriter(stream, tuple(facts[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_cell(value) for name, value in fact.items()} for fact in facts)


FORMULA = ("=", "+", "-", "@")
"""A spreadsheet takes a cell that begins so for a formula; an apostrophe before it makes it text."""


def _csv_cell(value: object) -> object:
    cell = _csv_text(value)
    if not isinstance(cell, str):
        return cell
    return f"'{printable(cell)}" if cell.startswith(FORMULA) else printable(cell)


def _csv_text(value: object) -> object:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ";".join(value)
    if isinstance(value, (list, dict, bool)):
        return json.dumps(value, ensure_ascii=False)
    return value


def printable(text: str) -> str:
    """Text of a file from elsewhere, fit for a terminal: control characters other than line ends become question marks."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def texts(row: Iterable[str | int | None]) -> list[str]:
    """Cells as people read them: thousands separated, `-` for what is not known or not set."""
    return ["-" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell for cell in row]

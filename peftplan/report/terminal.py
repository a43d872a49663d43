"""Rich tables for the terminal: readable at 80 columns and without colour. A pipe gets every column, one line per row."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Column as TableColumn
from rich.table import Table
from rich.text import Text

from peftplan.planning.result import Estimate, Peaks

if TYPE_CHECKING:
    from peftplan.planning.advice import Advice
from peftplan.report import peak
from peftplan.report.tabular import (
    NO_ADVICE,
    Column,
    assumption_rows,
    category_rows,
    context,
    incomplete,
    largest_line,
    line_facts,
    needs,
    not_counted,
    printable,
)
from peftplan.units import format_bytes, format_count

WIDE = 110
"""Terminals of at least this many columns show the wide columns of a table too."""
WIDER = 150
"""Tensors alive at the peak have one row each from here on; below, what they are stands under their names."""
NARROWEST = 80
"""A terminal with fewer columns breaks the lines itself: a table made for it would cut digits off."""
PIPE_WIDTH = 10_000
"""A pipe without COLUMNS has no width: nothing is folded, so that grep and awk see whole rows."""
GAP = 2
"""Blanks between columns."""
READABLE = 10
"""Letters that a column of words keeps beside long names."""
SHORT = 20
"""Assumptions of up to this many characters share a row, two to a row; longer ones get a line of their own."""


class _Printable(Console):
    """A console on which no name of a file or a config moves the cursor or changes colours."""

    def render_str(self, text: str, **style: Any) -> Text:
        return super().render_str(printable(text), **style)


def console() -> Console:
    """Where text goes: stdout, with markup, highlighting and emoji off."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    made = _Printable(highlight=False, markup=False, emoji=False, width=PIPE_WIDTH if piped else None)
    made.width = max(made.width, NARROWEST)
    return made


def show(out: Console, parts: Iterable[RenderableType]) -> None:
    """Print to the console; what is no terminal gets no colour and no trailing blanks."""
    if out.is_terminal:
        for part in parts:
            out.print(part)
        return
    with out.capture() as captured:
        for part in parts:
            out.print(part)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def rows(columns: Sequence[Column], cells: Iterable[Sequence[str]], *, above: str | None, below: str | None) -> None:
    """One table, with a line above and a line below it where there is something to say."""
    out = console()
    kept = [index for index, column in enumerate(columns) if not column.wide or out.width >= WIDE]
    table = _table(*(columns[index] for index in kept))
    for row in cells:
        table.add_row(*(row[index] for index in kept))
    show(out, (*((above, "") if above else ()), _fitted(table, out.width), *(("", below) if below else ())))


def estimate(result: Estimate, *, verbose: bool, explain_peak: bool = False) -> None:
    """Counts, bytes by category, verdicts, assumptions, and what is not counted."""
    out = console()
    config = result.method["config"]
    rank = f" r={config['r']}" if "r" in config else ""
    parts: list[RenderableType] = [
        Text(printable(f"{result.model['name']} · {result.method['name']}{rank} · {result.engine}"), style="bold"),
        *(Text(printable(f"warning: {warning}"), style="yellow") for warning in result.warnings),
        "",
        _counts(result),
        "",
        _categories(result),
    ]
    if result.peaks:
        parts += _peaks(result.peaks)
    if explain_peak:
        parts += ["", *_largest(result, everything=verbose, wide=out.width >= WIDER)]
    if result.managed_bytes:
        managed = format_bytes(result.managed_bytes)
        parts.append(f"and {managed} of paged optimizer states in CUDA managed memory, outside torch's allocator")
    if result.gpus:
        parts += [
            "",
            _verdicts(result),
            *(f"{v.gpu}: {v.reason}" for v in result.gpus if v.reason),
            *needs(result),
            f"largest line: {largest_line(result)}",
        ]
        for gpu, found in result.advice.items():
            parts += ["", _advice(gpu, found, engine=result.engine) if found else NO_ADVICE.format(gpu=gpu)]
    if verbose:
        parts += [f"{v.gpu}: {v.why}; context: {v.context_source}" for v in result.gpus]
        parts += ["", *_lines(result, width=out.width)]
    parts += ["", Text("Assumptions", style="bold"), *_assumptions(result, verbose=verbose, width=out.width)]
    parts += [f"note: {note}" for note in result.assumptions.get("notes", ())]
    parts += ["", not_counted(result)]
    show(out, parts)


def _table(*columns: Column, footer: Sequence[str] = (), header: bool = True) -> Table:
    """A plain table. Names and numbers (the first column, and those to the right) never wrap where there is room for them."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_footer=bool(footer), collapse_padding=True)
    made.show_header = header
    for index, column in enumerate(columns):
        made.add_column(
            column.header,
            justify="right" if column.right else "left",
            overflow="fold",
            footer=footer[index] if footer else "",
            no_wrap=column.right or index == 0,
        )
    return made


def _fitted(table: Table, width: int) -> Table:
    """The table; its names fold where they and the numbers leave the words no room, since a number without its end is another."""
    room = width
    names, *others = table.columns
    for column in others:
        longest = _longest(column)
        room -= GAP + (longest if column.no_wrap else min(longest, READABLE))
    if _longest(names) > room:
        names.no_wrap, names.width = False, room
    return table


def _longest(column: TableColumn) -> int:
    """Letters of the longest line of a column."""
    return max(len(line) for cell in (column.header, *column.cells) for line in str(cell).split("\n"))


def _counts(result: Estimate) -> Table:
    share = result.trainable_parameters / result.total_parameters
    shown = _table(Column("parameters"), Column("count", right=True), Column("", right=True), Column("", right=True))
    trainable = result.trainable_parameters
    shown.add_row("trainable", f"{trainable:,}", format_count(trainable), f"{share:.4%}")
    shown.add_row("total", f"{result.total_parameters:,}", format_count(result.total_parameters), "")
    return shown


def _categories(result: Estimate) -> Table:
    total = result.ledger.bytes()
    peaks = result.peaks
    title = f"memory at the peak, in {peaks.phase}" if peaks else "memory that is counted"
    footer = (
        "sum, the peak" if peaks and not peaks.incomplete else "sum, a lower bound of the peak",
        f"{total:,}",
        format_bytes(total),
    )
    shown = _table(Column(title), Column("bytes", right=True), Column("", right=True), footer=footer)
    for row in category_rows(result):
        shown.add_row(*row)
    return shown


def _peaks(peaks: Peaks) -> list[RenderableType]:
    """Each phase's own peak, and what the allocator reserves."""
    shown = _table(Column("peak of each phase"), Column("bytes", right=True), Column("", right=True))
    for phase, num_bytes in peaks.by_phase.items():
        shown.add_row(phase, f"{num_bytes:,}", format_bytes(num_bytes))
    parts: list[RenderableType] = ["", shown]
    if peaks.reserved is not None:
        parts.append(f"reserved: {peaks.reserved:,} bytes, {format_bytes(peaks.reserved)} ({peaks.reserved_source})")
    return parts + [Text(f"incomplete: {what}", style="bold") for what in incomplete(peaks)]


def _largest(result: Estimate, *, everything: bool, wide: bool) -> list[RenderableType]:
    """The largest groups of tensors at the peak; in a narrow terminal what a group is stands below whose it is."""
    found = peak.rows(result)
    shown, rest = peak.split(found, everything=everything)
    total = sum(row.bytes for row in found)
    middle = (Column("what"), Column("tensor"), Column("made by")) if wide else ()
    blanks = [""] * len(middle)
    table = _table(
        Column(f"largest at the peak, in {peak.peaks_of(result).phase}"),
        *middle,
        Column("copies", right=True),
        Column("bytes", right=True),
        Column("share", right=True),
        footer=("sum, the peak", *blanks, f"{sum(row.copies for row in found):,}", f"{total:,}", "100.0%"),
    )
    table.columns[0].no_wrap = False
    for row in shown:
        what = (row.category, peak.tensor(row), peak.operation(row))
        name = (peak.kind(row.name), *what) if wide else (f"{peak.kind(row.name)}\n  {' · '.join(filter(None, what))}",)
        table.add_row(*name, f"{row.copies:,}", f"{row.bytes:,}", f"{row.share:.1%}")
    if rest:
        copies, num_bytes = sum(row.copies for row in rest), sum(row.bytes for row in rest)
        table.add_row(f"… and {len(rest):,} more lines", *blanks, f"{copies:,}", f"{num_bytes:,}", f"{num_bytes / total:.1%}")
    return [table]


def _verdicts(result: Estimate) -> Table:
    unknown = "since the trace is incomplete" if result.peaks else "until the peak is modelled"
    numbers = (Column(name, right=True) for name in ("usable", "needed", "context", "left over"))
    shown = _table(Column("gpu"), *numbers, Column("verdict"))
    shown.columns[0].no_wrap = False  # ids of up to 29 letters
    shown.columns[-1].min_width = len("does not fit")
    for v in result.gpus:
        words = v.words + (f" {unknown}" if v.verdict == "unknown" else "")
        usable, needed, left = map(format_bytes, (v.usable_bytes, v.needed_bytes, v.headroom_bytes))
        shown.add_row(v.gpu, usable, needed, context(v), left, words)
    return shown


def _advice(gpu: str, found: Sequence[Advice], *, engine: str) -> Table:
    """What would make the job fit a card, or bring it nearer."""
    from peftplan.report import advice

    others = advice.COLUMNS[1:]
    shown = _table(Column(advice.title(gpu, engine)), *(Column(name, right=name != "then") for name in others))
    shown.columns[0].no_wrap = False
    for row in advice.rows(found):
        shown.add_row(*row)
    return shown


def _lines(result: Estimate, *, width: int) -> list[RenderableType]:
    """Every line of the ledger under its category, source and place; in a narrow terminal a formula stands below its line."""
    wide = width >= WIDE
    parts: list[RenderableType] = [Text("Lines: bytes = copies × round512(itemsize × dims)", style="bold")]
    for (category, source, place), lines in groupby(line_facts(result), key=itemgetter("category", "source", "place")):
        where = "" if place == "device" else f" · {place} memory"
        shown = _table(Column(""), Column("", right=True), *((Column(""),) if wide else ()), header=False)
        for line in lines:
            cells = (f"  {line['name']}", f"{line['bytes']:,}", line["formula"])
            shown.add_row(*(cells if wide else (f"{cells[0]}\n    {cells[2]}", cells[1])))
        parts += [Text(f"{category} · {source}{where}", style="bold"), _fitted(shown, width)]
    return parts


def _assumptions(result: Estimate, *, verbose: bool, width: int) -> list[RenderableType]:
    """Lists and long values first, a line each; then the short ones, two to a row where there is room."""
    found = dict(assumption_rows(result.assumptions))
    if not verbose:
        # Where a built-in config was found is in parentheses behind what it is.
        found["model"] = found["model"].partition(" (")[0]
    lists = {name for name, value in result.assumptions.items() if isinstance(value, list)}
    long = [name for name, value in found.items() if len(value) > SHORT or name in lists]
    short = [(name, value) for name, value in found.items() if name not in long]
    half = (len(short) + 1) // 2
    pairs = [(*left, *right) for left, right in zip_longest(short[:half], short[half:], fillvalue=("", ""))]
    aligned = _aligned(pairs)
    room = all(len(line) <= width for line in aligned)
    return [*(f"{name}: {found[name]}" for name in long), *(aligned if room else _aligned(short))]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text with their columns under each other."""
    widths = [max(map(len, column)) + GAP for column in zip(*cells, strict=True)]
    return ["".join(map(str.ljust, row, widths)).rstrip() for row in cells]

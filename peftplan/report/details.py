"""An estimate in full, `-v`: every byte, every line with its formula, every assumption, as rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, zip_longest
from operator import attrgetter
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.report import configs, peak
from peftplan.report.tabular import (
    Column,
    assumption_rows,
    category_rows,
    context,
    incomplete,
    largest_line,
    line_facts,
    needs,
    not_counted,
    reserved_range,
)
from peftplan.report.terminal import GAP, WIDE, console, fitted, show, table
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks
from peftplan.units import format_bytes, format_count

if TYPE_CHECKING:
    from peftplan.results.advice import Advised

WIDER = 150
"""Tensors alive at the peak have one row each from here on; below, what they are stands under their names."""
SUMS = {None: "sum, the peak", "at_least": "sum, a lower bound of the peak", "at_most": "sum, an upper bound of the peak"}
SHORT = 20
"""Assumptions of up to this many characters share a row, two to a row; longer ones get a line of their own."""


def estimate(result: Estimate, *, explain_peak: bool = False) -> None:
    """Below the verdicts: counts, bytes by category, what each card has, every line, every assumption, what is not counted."""
    out = console()
    parts: list[RenderableType] = ["", _counts(result), "", _categories(result)]
    if result.peaks:
        parts += _peaks(result.peaks)
    if explain_peak:
        parts += ["", fitted(_largest(result, everything=True, wide=out.width >= WIDER), out.width)]
    if result.managed_bytes:
        managed = format_bytes(result.managed_bytes)
        parts.append(f"and {managed} of paged optimizer states in CUDA managed memory, outside torch's allocator")
    if result.gpus:
        reasons = (f"{v.gpu}: {v.reason}" for v in result.gpus if v.reason)
        parts += ["", _verdicts(result), *reasons, *needs(result), f"largest line: {largest_line(result)}"]
        for gpu, advised in result.advice.items():
            parts += ["", *_advice(result, gpu, advised)]
    parts += [f"{v.gpu}: {v.why}; context: {v.context_source}" for v in result.gpus]
    parts += ["", *_host(result), "", *_lines(result, width=out.width)]
    parts += ["", Text("Assumptions", style="bold"), *_assumptions(result, width=out.width)]
    parts += [f"note: {note}" for note in result.assumptions.get("notes", ())]
    if result.config:
        parts += ["", Text(configs.summary(result.config), style="bold"), *configs.keys(result.config)]
        parts += configs.assumed(result.config)
    parts += ["", not_counted(result)]
    show(out, parts)


def _counts(result: Estimate) -> Table:
    share = result.trainable_parameters / result.total_parameters
    grid = table(Column("parameters"), Column("count", right=True), Column("", right=True), Column("", right=True))
    trainable = result.trainable_parameters
    grid.add_row("trainable", f"{trainable:,}", format_count(trainable), f"{share:.4%}")
    grid.add_row("total", f"{result.total_parameters:,}", format_count(result.total_parameters), "")
    return grid


def _categories(result: Estimate) -> Table:
    total = result.ledger.bytes()
    peaks = result.peaks
    title = f"memory at the peak, in {peaks.phase}" if peaks else "memory that is counted"
    footer = (
        SUMS[result.bound] if peaks else SUMS["at_least"],
        f"{total:,}",
        format_bytes(total),
    )
    grid = table(Column(title), Column("bytes", right=True), Column("", right=True), footer=footer)
    for row in category_rows(result):
        grid.add_row(*row)
    return grid


def _peaks(peaks: Peaks) -> list[RenderableType]:
    """Each phase's own peak, and what the allocator reserves."""
    grid = table(Column("peak of each phase"), Column("bytes", right=True), Column("", right=True))
    for phase, num_bytes in peaks.by_phase.items():
        grid.add_row(phase, f"{num_bytes:,}", format_bytes(num_bytes))
    parts: list[RenderableType] = ["", grid]
    if peaks.reserved is not None:
        parts.append(f"reserved: {peaks.reserved:,} bytes, {format_bytes(peaks.reserved)} ({peaks.reserved_source})")
    if ends := reserved_range(peaks):
        parts.append(Text(ends))
    if peaks.unreserved is not None:
        parts.append(Text(f"reserved: not known ({peaks.unreserved})"))
    return parts + [Text(f"incomplete: {what}", style="bold") for what in incomplete(peaks)]


def largest(result: Estimate) -> None:
    """The largest groups of tensors at the peak, below an answer."""
    out = console()
    show(out, ("", fitted(_largest(result, everything=False, wide=out.width >= WIDER), out.width)))


def _largest(result: Estimate, *, everything: bool, wide: bool) -> Table:
    """The largest groups of tensors at the peak; in a narrow terminal what a group is stands below whose it is."""
    groups = peak.rows(result)
    rows, rest = peak.split(groups, everything=everything)
    total = sum(row.bytes for row in groups)
    middle = (Column("what"), Column("tensor"), Column("made by")) if wide else ()
    blanks = [""] * len(middle)
    grid = table(
        Column(f"largest at the peak, in {peak.peaks_of(result).phase}"),
        *middle,
        Column("copies", right=True),
        Column("bytes", right=True),
        Column("share", right=True),
        footer=("sum, the peak", *blanks, f"{sum(row.copies for row in groups):,}", f"{total:,}", "100.0%"),
    )
    for row in rows:
        what = (row.category, peak.tensor(row), peak.operation(row))
        name = (peak.kind(row.name), *what) if wide else (f"{peak.kind(row.name)}\n  {' · '.join(filter(None, what))}",)
        grid.add_row(*name, f"{row.copies:,}", f"{row.bytes:,}", f"{row.share:.1%}")
    if rest:
        copies, num_bytes = sum(row.copies for row in rest), sum(row.bytes for row in rest)
        grid.add_row(f"… and {len(rest):,} more lines", *blanks, f"{copies:,}", f"{num_bytes:,}", f"{num_bytes / total:.1%}")
    return grid


def _verdicts(result: Estimate) -> Table:
    if result.peaks and result.peaks.unreserved is not None:
        unknown = "(reserved bytes are not known)"
    else:
        unknown = "(no peak)" if not result.peaks else "(a bound)"
    numbers = (Column(name, right=True) for name in ("usable", "needed", "context", "left over"))
    grid = table(Column("gpu"), *numbers, Column("verdict"))
    grid.columns[0].no_wrap = False  # ids of up to 29 letters
    grid.columns[-1].min_width = len("does not fit")
    for v in result.gpus:
        words = v.words + (f" {unknown}" if v.verdict == "unknown" else "")
        usable, needed, left = map(format_bytes, (v.usable_bytes, v.needed_bytes, v.headroom_bytes))
        grid.add_row(v.gpu, usable, needed, context(v), left, words)
    return grid


def _advice(result: Estimate, gpu: str, advised: Advised) -> list[RenderableType]:
    """What would make the job fit a card, or bring it nearer."""
    from peftplan.report import advice

    parts: list[RenderableType] = []
    if changes := advised.rows():
        columns = (Column(name, right=name != "then") for name in advice.COLUMNS[1:])
        grid = table(Column(advice.title(gpu, result.engine)), *columns)
        grid.columns[0].no_wrap = False
        for row in advice.rows(result, gpu, changes):
            grid.add_row(*row)
        parts.append(grid)
    sentence = advice.without_help(gpu, advised, strategy=advice.kept_strategy(result))
    return [*parts, sentence] if sentence else parts


def _host(result: Estimate) -> list[RenderableType]:
    """Host memory and disk."""
    if result.host is None:
        return []
    from peftplan.report import host

    grid = table(*host.COLUMNS)
    for row in host.cells(result.host):
        grid.add_row(*row)
    return [grid, *host.remarks(result.host)]


def _lines(result: Estimate, *, width: int) -> list[RenderableType]:
    """Every line of the ledger under its category, source and place; in a narrow terminal a formula stands below its line."""
    wide = width >= WIDE
    parts: list[RenderableType] = [Text("Lines: bytes = copies × round512(itemsize × dims)", style="bold")]
    for (category, source, place), lines in groupby(line_facts(result), key=attrgetter("category", "source", "place")):
        where = "" if place == "device" else f" · {place} memory"
        grid = table(Column(""), Column("", right=True), *((Column(""),) if wide else ()), header=False)
        for line in lines:
            cells = (f"  {line.name}", f"{line.bytes:,}", line.formula)
            grid.add_row(*(cells if wide else (f"{cells[0]}\n    {cells[2]}", cells[1])))
        parts += [Text(f"{category} · {source}{where}", style="bold"), fitted(grid, width)]
    return parts


def _assumptions(result: Estimate, *, width: int) -> list[RenderableType]:
    """Lists and long values first, a line each; then the short ones, two to a row where there is room."""
    values = dict(assumption_rows(result.assumptions))
    lists = {name for name, value in result.assumptions.items() if isinstance(value, list)}
    long = [name for name, value in values.items() if len(value) > SHORT or name in lists]
    short = [(name, value) for name, value in values.items() if name not in long]
    half = (len(short) + 1) // 2
    pairs = [(*left, *right) for left, right in zip_longest(short[:half], short[half:], fillvalue=("", ""))]
    aligned = _aligned(pairs)
    room = all(len(line) <= width for line in aligned)
    return [*(f"{name}: {values[name]}" for name in long), *(aligned if room else _aligned(short))]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text with their columns under each other."""
    widths = [max(map(len, column)) + GAP for column in zip(*cells, strict=True)]
    return ["".join(map(str.ljust, row, widths)).rstrip() for row in cells]

"""Rich tables for the terminal: readable at 80 columns and without colour."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.planning.result import Estimate, Verdict
from peftplan.report.tabular import assumption_rows, category_rows, line_rows
from peftplan.units import format_bytes, format_count


def show(*parts: RenderableType) -> None:
    """Print to stdout. Markup and number highlighting are off, and a pipe gets no colour and no trailing blanks."""
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        for part in parts:
            console.print(part)
        return
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def table(*columns: tuple[str, str], footer: Sequence[str] = ()) -> Table:
    """A plain table; each column is (header, left or right). Left columns fold long words, right ones never wrap."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_footer=bool(footer))
    for index, (header, justify) in enumerate(columns):
        made.add_column(
            header,
            justify="right" if justify == "right" else "left",
            overflow="fold",
            footer=footer[index] if footer else "",
            no_wrap=justify == "right",
        )
    return made


def estimate(result: Estimate, *, verbose: bool) -> None:
    """Counts, bytes by category, verdicts, assumptions, and what is not counted."""
    config = result.method["config"]
    rank = f" r={config['r']}" if "r" in config else ""
    parts: list[RenderableType] = [
        Text(f"{result.model['name']} · {result.method['name']}{rank} · {result.engine}", style="bold"),
        "",
        _counts(result),
        "",
        _categories(result),
    ]
    if result.managed_bytes:
        managed = format_bytes(result.managed_bytes)
        parts.append(f"and {managed} of paged optimizer states in CUDA managed memory, outside torch's allocator")
    if result.gpus:
        parts += ["", _verdicts(result.gpus), *(f"{v.gpu}: {v.why}" for v in result.gpus)]
    if verbose:
        parts += ["", _lines(result)]
    parts += ["", Text("Assumptions", style="bold"), *_assumptions(result)]
    parts += [f"note: {note}" for note in result.assumptions.get("notes", ())]
    parts += ["", f"Not counted yet, so no peak is stated: {', '.join(result.not_modelled)}."]
    show(*parts)


def _counts(result: Estimate) -> Table:
    share = result.trainable_parameters / result.total_parameters
    shown = table(("parameters", "left"), ("count", "right"), ("", "right"), ("", "right"))
    trainable = result.trainable_parameters
    shown.add_row("trainable", f"{trainable:,}", format_count(trainable), f"{share:.4%}")
    shown.add_row("total", f"{result.total_parameters:,}", format_count(result.total_parameters), "")
    return shown


def _categories(result: Estimate) -> Table:
    total = result.persistent_bytes
    footer = ("sum, a lower bound of the peak", f"{total:,}", format_bytes(total))
    shown = table(("memory that is counted", "left"), ("bytes", "right"), ("", "right"), footer=footer)
    for row in category_rows(result):
        shown.add_row(*row)
    return shown


def _verdicts(verdicts: Sequence[Verdict]) -> Table:
    shown = table(("gpu", "left"), ("usable", "right"), ("left over", "right"), ("verdict", "left"))
    for v in verdicts:
        words = v.verdict.replace("_", " ") + (" until the peak is modelled" if v.verdict == "unknown" else "")
        shown.add_row(v.gpu, format_bytes(v.usable_bytes), format_bytes(v.headroom_bytes), words)
    return shown


def _lines(result: Estimate) -> Table:
    shown = table(("category", "left"), ("line", "left"), ("bytes", "right"), ("formula · source", "left"))
    for category, name, num_bytes, _, formula, source in line_rows(result):
        shown.add_row(category, name, f"{int(num_bytes):,}", f"{formula} · {source}")
    return shown


SHORT = 20
"""Values up to this many characters share a row, two to a row; longer ones get a line of their own."""


def _assumptions(result: Estimate) -> list[RenderableType]:
    rows = assumption_rows(result.assumptions)
    short = [row for row in rows if len(row[1]) <= SHORT]
    half = (len(short) + 1) // 2
    grid = Table.grid(padding=(0, 2))
    for left, right in zip_longest(short[:half], short[half:], fillvalue=("", "")):
        grid.add_row(*left, *right)
    return [*(f"{name}: {value}" for name, value in rows if len(value) > SHORT), grid]

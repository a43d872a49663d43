"""A comparison as text: a row per method and card, with a bar of what it needs against the largest."""

from __future__ import annotations

from peftplan.planning.compare import Compared, Comparison
from peftplan.report.screen import glyphs
from peftplan.report.tabular import Column
from peftplan.units import format_bytes, format_count

COLUMNS = (
    Column("method"),
    Column("trainable", right=True),
    Column("peak", right=True),
    Column("card"),
    Column("needs", right=True),
    Column("left", right=True),
    Column("verdict"),
    Column("adapter", right=True, wide=True),
    Column("peak, against the largest", wide=True),
)
OF_WAYS = (
    *(Column("method"), Column("strategy"), Column("GPUs", right=True), Column("card")),
    *(Column("needs", right=True), Column("left", right=True), Column("verdict"), Column("peak", right=True, wide=True)),
    *(Column("trainable", right=True, wide=True), Column("peak, against the largest", wide=True)),
)
"""The columns where several ways to share the job are compared."""
OF_CARDS = ("card", "needs", "left", "verdict")
ONE = "one GPU"
BAR = 24
"""Blocks of the longest bar."""


def heading(result: Comparison) -> str:
    """What the rows are about."""
    over = f", {result.over}, per GPU" if result.over else ""
    methods = len({row.method for row in result.rows})
    return f"{result.model}: {methods} method{'s' if methods > 1 else ''}{', traced' if result.engine == 'trace' else ''}{over}"


def answers(result: Comparison) -> list[str]:
    """For each method the fewest GPUs that take it, and how; nothing where one way is compared."""
    methods = dict.fromkeys(row.method for row in result.rows) if result.of_ways else ()
    return [_fewest(method, [row for row in result.rows if row.method == method and row.verdict]) for method in methods]


def _fewest(method: str, rows: list[Compared]) -> str:
    """The fewest GPUs with the best verdict that any row has."""
    best = next((verdict for verdict in ("fits", "tight", "unknown") if any(row.verdict == verdict for row in rows)), None)
    if best is None:
        return f"{method}: {'fits none of these' if rows else 'no verdict'}"
    fewest = min(row.world_size or 1 for row in rows if row.verdict == best)
    by_card: dict[str, list[str]] = {}
    for row in rows:
        if (row.verdict, row.world_size) == (best, fewest):
            by_card.setdefault(row.gpu or "", []).append(row.strategy or "")
    by = {card: f" by {', '.join(strategies)}" if fewest > 1 else "" for card, strategies in by_card.items()}
    ways = " · ".join(f"{fewest} × {card}{how}" for card, how in by.items())
    return f"{method}: {'fits' if best == 'fits' else f'{best} on'} {ways}"


def _of_ways(result: Comparison) -> list[tuple[str, ...]]:
    """A row per method, strategy, number of GPUs and card; what is the same as in the row above is left blank."""
    largest = max((row.peak_allocated or 0 for row in result.rows), default=0)
    rows: list[tuple[str, ...]] = []
    before: tuple[object, object] = (None, None)
    counted: set[str] = set()
    for row in result.rows:
        same_method = before[0] == row.method
        count = "" if row.method in counted else _count(row)
        counted |= {row.method} if count else set()
        names = ("" if same_method else row.method, "" if before == (row.method, row.strategy) else row.strategy or ONE)
        verdict = (row.verdict or ("error" if row.error else "")).replace("_", " ")
        sizes = (*_needs_and_left(row), verdict, _size(row.peak_allocated), count)
        rows.append((*names, str(row.world_size), row.gpu or "", *sizes, bar(row.peak_allocated or 0, largest)))
        before = (row.method, row.strategy)
    return rows


def cells(result: Comparison) -> list[tuple[str, ...]]:
    """A row per method and card; what is the same as in the row above is left blank."""
    if result.of_ways:
        return _of_ways(result)
    largest = max((row.peak_allocated or 0 for row in result.rows), default=0)
    rows: list[tuple[str, ...]] = []
    before = None
    for row in result.rows:
        again = before == row.method
        shared = ("", "", "") if again else (row.method, _count(row), _size(row.peak_allocated))
        last = ("", "") if again else (_size(row.adapter_bytes), bar(row.peak_allocated or 0, largest))
        rows.append((*shared, row.gpu or "", *_needs_and_left(row), (row.verdict or "").replace("_", " "), *last))
        before = row.method
    return rows


def visible(result: Comparison) -> tuple[tuple[Column, ...], list[tuple[str, ...]]]:
    """Columns and rows; without a card, those of the methods alone, for which every terminal has room."""
    if result.of_ways:
        return OF_WAYS, cells(result)
    if any(row.gpu for row in result.rows):
        return COLUMNS, cells(result)
    of_method = [index for index, column in enumerate(COLUMNS) if column.header not in OF_CARDS]
    columns = tuple(COLUMNS[index]._replace(wide=False) for index in of_method)
    return columns, [tuple(row[index] for index in of_method) for row in cells(result)]


def below(result: Comparison) -> list[str]:
    """The wide columns in lines of their own, one per method, for a terminal that has no room for them."""
    if result.of_ways:
        return []
    wide = [index for index, column in enumerate(COLUMNS) if column.wide]
    lines = [("", *(COLUMNS[index].header for index in wide))]
    lines += [(row[0], *(row[index] for index in wide)) for row in cells(result) if row[0]]
    names, sizes = (max(len(line[at]) for line in lines) for at in (0, 1))
    return [f"{name.ljust(names)}  {size.rjust(sizes)}  {blocks}".rstrip() for name, size, blocks in lines]


def errors(result: Comparison) -> list[str]:
    """Warnings, and why a row has no numbers or does not run on a card, a line each."""
    warned = dict.fromkeys((_named(row), warning) for row in result.rows for warning in row.warnings)
    failed = dict.fromkeys(f"{_named(row)}: {row.error}" for row in result.rows if row.error)
    refused = dict.fromkeys(f"{row.gpu}: {_named(row)} does not run: {row.reason}" for row in result.rows if row.reason)
    return [*(f"{job}: warning: {warning}" for job, warning in warned), *failed, *refused]


def _named(row: Compared) -> str:
    return f"{row.method} by {row.strategy}" if row.strategy else row.method


def label(row: Compared) -> str:
    """What a bar of a row is called."""
    if row.world_size is None:
        return row.method
    return f"{row.method}, {row.world_size} × {row.strategy}" if row.strategy else f"{row.method}, {ONE}"


def _count(row: Compared) -> str:
    return "" if row.trainable_parameters is None else format_count(row.trainable_parameters)


def _needs_and_left(row: Compared) -> tuple[str, str]:
    """What the card needs and has left, at least; where the need is a lower bound, what is left is not known."""
    if row.needed_is_lower_bound:
        return f"at least {_size(row.needed_bytes)}", ""
    if row.needed_is_upper_bound:
        return f"at most {_size(row.needed_bytes)}", _size(row.headroom_bytes)
    return _size(row.needed_bytes), _size(row.headroom_bytes)


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)


def bar(size: int, largest: int) -> str:
    """Blocks in proportion to the largest; at least one for what is not nothing."""
    return glyphs().shades[0] * max(round(BAR * size / largest), size > 0) if largest else ""

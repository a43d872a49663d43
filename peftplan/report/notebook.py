"""Results as notebooks show them: `_repr_html_` of an estimate, a comparison, a fit, a serving, an inspection, lists of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, NamedTuple

from peftplan.frames import Listing
from peftplan.planning.compare import Compared, Comparison
from peftplan.planning.fit_result import Fit
from peftplan.planning.inspection import Inspection
from peftplan.planning.serving_result import Serving
from peftplan.report import answer, comparing, fitting, markup, modules, tabular
from peftplan.report import serving as serving_report
from peftplan.report.bar import WITH_MARGIN, Segment, segments
from peftplan.report.cards import card_name
from peftplan.report.colours import COLOURS as CATEGORIES
from peftplan.report.markup import Html, Stretch
from peftplan.report.screen import UNICODE, Colour, Part, Screen
from peftplan.report.tabular import Column
from peftplan.results.estimate import Estimate
from peftplan.results.verdict import Verdict
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.results.grid import Grid

WHOLE_LINES = Screen(10**6, UNICODE)
"""A notebook folds its lines itself."""
BESIDES = {**dict.fromkeys(("allocator", WITH_MARGIN), "#9aa0a6"), "context": "#5f6368", "other": "#c4c7cc"}
"""Colours of what lies outside torch's tensors."""
MOST_ROWS = 500
"""Rows of a table that a notebook shows."""
COLOURS: Mapping[str, str] = dict(CATEGORIES.items())
VERDICT_COLOURS: Mapping[str, Colour] = {"fits": "green", "tight": "yellow", "unknown": "yellow"}


def as_html(result: object) -> str:
    """A result as HTML."""
    return markup.page(*VIEWS[type(result).__name__](result))


def estimate(result: Estimate) -> Iterator[Html]:
    """The answer with its bar; lines and assumptions are folded."""
    title, *verdicts = answer.head(result, WHOLE_LINES)
    yield markup.paragraph("".join(part.text for part in title), strong=True)
    yield from map(markup.row, verdicts)
    yield markup.paragraph(answer.counts(result))
    card = next((card for card in result.gpus if not card.lower_bound), None) if result.peaks else None
    yield markup.row(answer.peak(result, WHOLE_LINES)[0])
    yield from _bar(segments(result, card), card)
    yield from map(markup.row, answer.changes(result, WHOLE_LINES))
    yield from (markup.paragraph(f"note: {note}") for note in result.assumptions.get("notes", ()))
    columns = (Column("category"), Column("line"), Column("bytes", right=True), Column("", right=True), Column("formula"))
    lines = [
        (line.category, line.name, f"{line.bytes:,}", format_bytes(line.bytes), line.formula)
        for line in tabular.line_facts(result)
    ]
    yield markup.folded(f"{len(lines)} lines", _rows(columns, lines))
    yield _assumptions(result.assumptions)


def _bar(parts: list[Segment], card: Verdict | None) -> Iterator[Html]:
    stretches = [Stretch(_colour(part.name), part.bytes, f"{part.name} {format_bytes(part.bytes)}") for part in parts]
    total = sum(part.bytes for part in parts)
    yield markup.bar(stretches, scale=max(total, card.usable_bytes if card else 0))
    yield markup.legend(stretches)
    if card is not None:
        of = f"{format_bytes(card.needed_bytes)} of {card_name(card.gpu)}'s {format_bytes(card.usable_bytes)}"
        yield markup.paragraph(f"{of}; the whole bar is {'what is needed' if total > card.usable_bytes else 'the card'}")


def _colour(name: str) -> str:
    return COLOURS.get(name.replace(" ", "_"), BESIDES.get(name, BESIDES["other"]))


def comparison(result: Comparison) -> Iterator[Html]:
    """A row per method and card, each method with a bar of its peak by category."""
    largest = max((row.peak_allocated or 0 for row in result.rows), default=0)
    yield markup.paragraph(comparing.heading(result), strong=True)
    yield from map(markup.paragraph, comparing.answers(result))
    columns, cells = comparing.visible(result)
    bars = (_peak_bar(row, largest) for row in result.rows)
    drawn = [(*texts[:-1], bar if texts[-1] else "") for texts, bar in zip(cells, bars, strict=True)]
    columns = (*columns[:-1], Column("peak by part"))
    yield markup.table(*_verdict_behind("card", columns, drawn))
    categories = {name for row in result.rows for name in row.by_category or {}}
    yield markup.legend([Stretch(COLOURS[name], 0, name.replace("_", " ")) for name in COLOURS if name in categories])
    yield from map(markup.paragraph, comparing.errors(result))


def _peak_bar(row: Compared, largest: int) -> Html:
    parts = [
        Stretch(_colour(name), size, f"{name.replace('_', ' ')} {format_bytes(size)}")
        for name, size in (row.by_category or {}).items()
    ]
    return Html(f'<div style="min-width:110px">{markup.bar(parts, scale=largest)}</div>') if parts else Html("")


def _verdict_behind(
    header: str, columns: Sequence[Column], rows: Iterable[Sequence[str]]
) -> tuple[list[Column], list[tuple[str, ...]]]:
    """A table with its coloured verdicts moved to behind a column, where a phone shows them; as it is, where it has none."""
    headers = [column.header for column in columns]
    if "verdict" not in headers:
        return [*columns], [tuple(row) for row in rows]
    verdict, behind = headers.index("verdict"), headers.index(header) + 1
    order = [*range(behind), verdict, *(at for at in range(behind, len(columns)) if at != verdict)]
    moved = [tuple(_verdict(row[at]) if at == verdict else row[at] for at in order) for row in rows]
    return [columns[at] for at in order], moved


def _verdict(words: str) -> Html:
    """A verdict with its mark in colour."""
    if not words:
        return Html("")
    marks = {"fits": UNICODE.fits, "tight": UNICODE.tight, "unknown": UNICODE.unknown}
    mark = markup.coloured(marks.get(words, UNICODE.fails), VERDICT_COLOURS.get(words, "red"))
    return Html(f"{mark} {markup.text(words)}")


def fit(result: Fit) -> Iterator[Html]:
    """The answer, then the plans."""
    yield markup.paragraph(fitting.headline(result, UNICODE), strong=True)
    yield from map(markup.paragraph, fitting.remarks(result))
    yield _rows(*_verdict_behind("plan", fitting.plan_columns(result), fitting.plan_cells(result)))
    if (order := fitting.ranking(result)) is not None:
        yield markup.paragraph(order)


def serving(result: Serving) -> Iterator[Html]:
    """A table per section, with a bar of what is loaded."""
    yield markup.paragraph(serving_report.heading(result), strong=True)
    yield from (markup.row((Part(line.strip(), colour),)) for line, colour in serving_report.verdicts(result, UNICODE))
    loaded = {"base": result.loaded.base, "adapters": result.loaded.all_adapters}
    loaded |= {"KV cache": result.cache.num_bytes} if result.cache else {}
    palette = cycle((COLOURS["weights"], COLOURS["adapter_weights"], COLOURS["activations"]))
    parts = [
        Stretch(colour, size, f"{name} {format_bytes(size)}")
        for colour, (name, size) in zip(palette, loaded.items(), strict=False)
    ]
    yield markup.bar(parts, scale=result.total)
    yield markup.legend(parts)
    for section in serving_report.sections(result):
        if section.columns[0].header == "assumption":
            continue
        yield markup.table(section.columns, section.rows)
        if section.below:
            yield markup.paragraph(section.below)
    yield from map(markup.paragraph, serving_report.remarks(result))
    yield _assumptions(result.assumptions)


def inspection(result: Inspection) -> Iterator[Html]:
    """The modules of a model; with a pattern, how many of each family it matches."""
    yield markup.paragraph(modules.heading(result), strong=True)
    if (matches := modules.matches(result)) is not None:
        yield markup.paragraph(matches)
    yield _rows(modules.columns(result), [tabular.texts(row) for row in modules.cells(result)])


def listing(result: Listing[NamedTuple]) -> Iterator[Html]:
    """A table of the records."""
    yield _records(result.records(), len(result))


def grid(result: Grid) -> Iterator[Html]:
    """What a grid is about, and its first rows."""
    yield markup.paragraph(repr(result)[1:-1], strong=True)
    yield _records(list(islice(result, MOST_ROWS)), result.num_rows)


def _records(first: Sequence[Mapping[str, object]], count: int) -> Html:
    """A table of the first of so many records."""
    columns = [Column(name.replace("_", " "), right=isinstance(value, int)) for name, value in (first or [{}])[0].items()]
    return _rows(columns, [tuple(map(_cell, record.values())) for record in first], count)


def _cell(value: object) -> str:
    """A field of a record as text; nothing for what is not known, and for none."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _assumptions(assumptions: Mapping[str, object]) -> Html:
    rows = tabular.assumption_rows(assumptions)
    return markup.folded(f"{len(rows)} assumptions", _rows((Column("assumption"), Column("value")), rows))


def _rows(columns: Sequence[Column], rows: Sequence[Sequence[str]], count: int = 0) -> Html:
    """A table of the first rows, and how many more there are; `count`: of all rows, where these are the first alone."""
    html = markup.table(columns, rows[:MOST_ROWS])
    more = max(count, len(rows)) - MOST_ROWS
    return Html(html + markup.paragraph(f"and {more:,} more rows")) if more > 0 else html


VIEWS: dict[str, Callable[..., Iterator[Html]]] = {
    "Estimate": estimate,
    "Comparison": comparison,
    "Fit": fit,
    "Serving": serving,
    "Inspection": inspection,
    "Listing": listing,
    "Grid": grid,
}

"""A check in a terminal: drift by source, method and model, one line per peak, then what failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from peftplan.accuracy.check import Check
from peftplan.accuracy.drift import ON_ONE, ON_SEVERAL, WITHIN, Answer, Summary, apart, summaries
from peftplan.accuracy.engines import FIGURES, OVERALL
from peftplan.report import accuracy, terminal
from peftplan.report.tabular import Column

ONE_TABLE = 160
"""From so many columns on a group's name has a column of its own, as it has in a pipe; below, it stands above its lines."""
WITH_WORST = 110
"""From so many columns on the record of the worst drift is named."""


def check(checked: Check) -> None:
    """Write a check to stdout."""
    out = terminal.console()
    terminal.show(out, map(Text, accuracy.headline(checked.engine, checked.answers)))
    for of_side, groupings in zip(apart(checked.answers), (ON_ONE, ON_SEVERAL), strict=True):
        _groups(out, of_side, groupings, several=groupings is ON_SEVERAL)
    print()
    refused = [f"refused: {times} × {why}" for times, why in accuracy.refused(checked.answers)]
    terminal.show(out, map(Text, [*refused, *accuracy.endings(checked)]))


def _groups(out: Console, answers: Sequence[Answer], groupings: Iterable[str], *, several: bool) -> None:
    for by in groupings:
        if rows := summaries(answers, by, OVERALL if by != "setup" else FIGURES):
            print()
            if out.width >= ONE_TABLE:
                head = f"{by}, several GPUs" if several else by
                terminal.rows([Column(head), *_columns()], accuracy.summary_cells(rows), above=None, below=None)
                continue
            if several:
                terminal.show(out, [Text("several GPUs", style="bold")])
            terminal.show(out, _grouped(by, rows, worst_named=out.width >= WITH_WORST))


def _columns() -> list[Column]:
    of_summary = [Column(name, right=name not in ("peak", "of")) for name in accuracy.SUMMARY]
    return of_summary + [Column(name, right=True) for name in accuracy.SHARES]


def _grouped(by: str, rows: Sequence[Summary], *, worst_named: bool) -> Iterable[Text]:
    """A heading, and per group its name and a line for each of its peaks."""
    shares = "".join(f"{f'≤ {limit} %':>7}" for limit in WITHIN)
    heading = f"{by:<12}{'rows':>5}{'median':>10}{'abs median':>12}{'worst':>10}{shares}{'wrong':>7}"
    yield Text(heading + ("  worst of" if worst_named else ""), style="bold")
    yield Text("─" * len(heading))
    for group, of_group in groupby(rows, key=lambda row: row.group):
        yield Text(group, style="bold")
        yield from (_line(row, worst_named=worst_named) for row in of_group)


def _line(row: Summary, *, worst_named: bool) -> Text:
    drifts = f"{row.median:>+8.2f} %{row.median_unsigned:>10.2f} %{row.worst:>+8.2f} %"
    shares = "".join(f"{share:>7.0%}" for share in row.within)
    line = f"  {row.figure:<10}{row.rows:>5}{drifts}{shares}{row.wrong:>7}"
    return Text(f"{line}  {row.worst_id}" if worst_named else line, no_wrap=True, overflow="ellipsis")

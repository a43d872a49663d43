"""Where a result becomes text: one function per result. Tables and Markdown are for people, JSON and CSV for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftplan.report import tabular
from peftplan.report.writing import as_json, fields, in_markdown, remarks, rows
from peftplan.results.estimate import Estimate

if TYPE_CHECKING:
    from peftplan.oom.diagnosis import Diagnosis
    from peftplan.planning.choosing import Member
    from peftplan.planning.compare import Comparison
    from peftplan.planning.configs import ConfigEntry
    from peftplan.planning.fit_result import Fit
    from peftplan.planning.inspection import Inspection
    from peftplan.planning.replayed import Replayed
    from peftplan.planning.serving_result import Serving
    from peftplan.results.rehearsal import Rehearsal
    from peftplan.results.verdict import Verdict


def estimate(result: Estimate, *, fmt: str, verbose: bool, explain_peak: bool = False) -> None:
    """Write an estimate to stdout as a table, JSON, CSV (one row per line of the ledger) or Markdown.

    `explain_peak` adds the largest tensors alive at the peak: a section for people, the key `largest` in JSON, and in CSV these
    instead of the lines.
    """
    if explain_peak:
        from peftplan.report import peak

        peak.peaks_of(result)
    if fmt == "json":
        as_json(result.to_dict() | ({"largest": peak.facts(result)} if explain_peak else {}))
    elif fmt == "csv":
        facts = peak.facts(result) if explain_peak else [line._asdict() for line in tabular.line_facts(result)]
        tabular.write_csv([*facts, *tabular.labels(result, facts[0])], sys.stdout)
    elif fmt == "markdown":
        from peftplan.report import markdown

        print(markdown.estimate(result, verbose=verbose, explain_peak=explain_peak))
    else:
        _for_people(result, verbose=verbose, explain_peak=explain_peak)


def estimates(results: Sequence[Estimate], *, fmt: str, verbose: bool, explain_peak: bool = False) -> None:
    """Estimates of one job on different numbers of GPUs: in JSON a list, for people one answer, or tables one after the other."""
    if fmt == "json" and len(results) > 1:
        from peftplan.report import peak

        largest = [{"largest": peak.facts(result)} if explain_peak else {} for result in results]
        as_json([result.to_dict() | more for result, more in zip(results, largest, strict=True)])
        return
    if fmt == "table" and not (verbose or explain_peak):
        from peftplan.report import answer, screen

        of_stdout = screen.Screen(screen.width(), screen.glyphs())
        screen.show(answer.answers(results, of_stdout))
        return
    for number, result in enumerate(results):
        if number:
            print()
        estimate(result, fmt=fmt, verbose=verbose, explain_peak=explain_peak)


def _for_people(result: Estimate, *, verbose: bool, explain_peak: bool) -> None:
    """The answer in a few lines; with `verbose` or `explain_peak` tables too, which need rich."""
    from peftplan.report import answer, screen

    of_stdout = screen.Screen(screen.width(), screen.glyphs())
    screen.show(answer.head(result, of_stdout) if verbose else answer.answer(result, of_stdout))
    if not (verbose or explain_peak):
        return
    from peftplan.report import details

    if verbose:
        details.estimate(result, explain_peak=explain_peak)
    else:
        details.largest(result)


def replayed(result: Replayed, *, fmt: str) -> None:
    """A replay: peaks by phase; for people, also what fragmentation cost and where memory ran out."""
    from peftplan.report import replayed as report

    if fmt == "json":
        as_json(report.document(result))
        return
    below = "\n".join(report.remarks(result))
    rows(report.COLUMNS, report.cells(result), report.facts(result), fmt=fmt, above=report.heading(result), below=below)


def serving(result: Serving, *, fmt: str) -> None:
    """Files, merge and device bytes: a table per section for people, a row per number in CSV."""
    from peftplan.report import serving as report

    if fmt == "json":
        as_json(result.to_dict())
    elif fmt == "csv":
        tabular.write_csv(result.records(), sys.stdout)
    else:
        _serving_head(result, fmt=fmt)
        for section in report.sections(result):
            rows(section.columns, section.rows, (), fmt=fmt, below=section.below)
            print()
        remarks(report.remarks(result), fmt=fmt)


def _serving_head(result: Serving, *, fmt: str) -> None:
    """What the tables are about, and the verdicts."""
    from peftplan.report import screen
    from peftplan.report import serving as report

    lines = list(report.verdicts(result, screen.glyphs()))
    if fmt == "markdown":
        print(f"## {in_markdown(report.heading(result))}\n", *(f"{in_markdown(line.strip())}\n" for line, _ in lines), sep="\n")
        return
    print(tabular.printable(report.heading(result)))
    screen.show(row for line, colour in lines for row in screen.wrapped(line, screen.width(), colour=colour))
    print()


def fits(results: Sequence[Fit], *, fmt: str) -> None:
    """Plans for each card: the answer first, then a table of all plans and what comes nearest."""
    from peftplan.report import fitting, screen

    if fmt == "json":
        documents = [result.to_dict() for result in results]
        as_json(documents[0] if len(documents) == 1 else {"schema_version": documents[0]["schema_version"], "cards": documents})
        return
    if fmt == "csv":
        tabular.write_csv([row for result in results for row in fitting.facts(result)], sys.stdout)
        return
    for number, result in enumerate(results):
        above = "\n".join((fitting.headline(result, screen.glyphs()), *fitting.remarks(result)))
        if number:
            print()
        below = fitting.ranking(result) if result is results[-1] else None
        rows(fitting.plan_columns(result), fitting.plan_cells(result), fitting.facts(result), fmt=fmt, above=above, below=below)


def comparison(result: Comparison, *, fmt: str) -> None:
    """A row per method and card; for people with a bar of what each method needs."""
    from peftplan.report import comparing

    if fmt == "json":
        as_json(result.to_dict())
        return
    (columns, cells), below = comparing.visible(result), "\n".join(comparing.errors(result)) or None
    above, instead = "\n".join([comparing.heading(result), *comparing.answers(result)]), comparing.below(result)
    rows(columns, cells, result.records(), fmt=fmt, above=above, below=below, instead=instead)


def oom(result: Diagnosis, *, fmt: str) -> None:
    """Why memory ran out: the cause first."""
    from peftplan.report import oom as report
    from peftplan.report import screen

    if fmt == "json":
        as_json(result.to_dict())
    elif fmt == "csv":
        tabular.write_csv(report.facts(result), sys.stdout)
    else:
        lines = list(report.lines(result, screen.glyphs()))
        remarks(report.in_markdown(lines) if fmt == "markdown" else lines, fmt=fmt)


def rehearsal(result: Rehearsal, *, fmt: str) -> None:
    """What a rehearsal showed. JSON is one line, the last of stdout; CSV and Markdown have a row per rank, so perhaps none."""
    from peftplan.report import markdown
    from peftplan.report import rehearsal as report
    from peftplan.report.screen import Screen, glyphs, show, width

    if fmt == "json":
        print(json.dumps(result.to_dict(), allow_nan=False), flush=True)
    elif fmt == "csv" and result.ranks:
        tabular.write_csv(report.facts(result), sys.stdout)
    elif fmt == "markdown" and result.ranks:
        facts = report.facts(result)
        print(
            markdown.table(tuple(facts[0]), [["" if value is None else str(value) for value in fact.values()] for fact in facts])
        )
    elif fmt == "table":
        show(report.rows(result, Screen(width(), glyphs())))


def cards(verdicts: Sequence[Verdict], *, fmt: str) -> None:
    """Cards that take a job, the smallest first."""
    from peftplan.report import fitting

    above = f"{len(verdicts)} cards in the catalogue can run the job, the smallest first"
    larger = len(verdicts) - fitting.MOST_CARDS
    below = f"and {larger} with more memory (--format csv lists all)" if larger > 0 else None if verdicts else fitting.NO_CARD
    cells, facts = fitting.card_cells(verdicts[: fitting.MOST_CARDS]), [v.to_dict() for v in verdicts]
    rows(fitting.CARD_COLUMNS, cells, facts, fmt=fmt, above=above, below=below)


def members(of_family: Sequence[Member], *, fmt: str, gpu: str) -> None:
    """The largest model of a family that a card takes, by method."""
    from peftplan.report import fitting

    facts = [member.to_dict() for member in of_family]
    rows(
        fitting.MEMBER_COLUMNS,
        fitting.member_cells(of_family),
        facts,
        fmt=fmt,
        above=f"The largest model that fits {gpu}, by method",
        below=fitting.refusals(of_family),
    )


def configs(entries: Sequence[ConfigEntry], *, fmt: str) -> None:
    """A line for each file; text shows what a folder holds besides training configs as a number alone."""
    from peftplan.report.configs import COLUMNS, cells, listed, names, notes, summed

    lines = listed(entries)
    called = names(lines)
    facts = [fields(entry) for entry in entries]
    rows(
        COLUMNS,
        [cells(entry, called[entry.file]) for entry in lines],
        facts,
        fmt=fmt,
        below=summed(entries),
        instead=notes(lines),
    )


def inspection(result: Inspection, *, fmt: str) -> None:
    """The modules of a model; with a pattern, how many of each family it matches."""
    from peftplan.report import modules

    if fmt == "json":
        as_json(result.to_dict())
        return
    facts, title = result.records(), modules.heading(result)
    rows(modules.columns(result), modules.cells(result), facts, fmt=fmt, above=title, below=modules.matches(result))

"""Where a result becomes text: one function per thing shown. Tables and Markdown are for people, JSON and CSV for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftplan.report import tabular
from peftplan.report.tabular import Column
from peftplan.results.estimate import Estimate
from peftplan.units import MIB

if TYPE_CHECKING:
    from peftplan.arch.catalogue import ModelEntry
    from peftplan.hardware.gpus import Gpu
    from peftplan.oom.diagnosis import Diagnosis
    from peftplan.planning.choosing import Member
    from peftplan.planning.compare import Comparison
    from peftplan.planning.configs import ConfigEntry
    from peftplan.planning.fit_result import Fit
    from peftplan.planning.inspection import Inspection
    from peftplan.planning.practice import Practice
    from peftplan.planning.replayed import Replayed
    from peftplan.planning.serving_result import Serving
    from peftplan.results.estimate import Verdict
    from peftplan.results.rehearsal import Rehearsal

Cells = Sequence[Sequence[str | int | None]]
Facts = Sequence[Mapping[str, object]]


def estimate(result: Estimate, *, fmt: str, verbose: bool, explain_peak: bool = False) -> None:
    """Write an estimate to stdout as a table, JSON, CSV (one row per line of the ledger) or Markdown.

    `explain_peak` adds the largest tensors alive at the peak: a section for people, the key `largest` in JSON, and in CSV these
    instead of the lines.
    """
    if explain_peak:
        from peftplan.report import peak

        peak.peaks_of(result)
    if fmt == "json":
        _json(result.to_dict() | ({"largest": peak.facts(result)} if explain_peak else {}))
    elif fmt == "csv":
        facts = peak.facts(result) if explain_peak else tabular.line_facts(result)
        tabular.write_csv([*facts, *tabular.labels(result, facts[0])], sys.stdout)
    elif fmt == "markdown":
        from peftplan.report import markdown

        print(markdown.estimate(result, verbose=verbose, explain_peak=explain_peak))
    else:
        _for_people(result, verbose=verbose, explain_peak=explain_peak)


def estimates(results: Sequence[Estimate], *, fmt: str, verbose: bool, explain_peak: bool = False) -> None:
    """Estimates of one job on different numbers of GPUs: in JSON a list, for people one after the other."""
    if fmt == "json" and len(results) > 1:
        from peftplan.report import peak

        largest = [{"largest": peak.facts(result)} if explain_peak else {} for result in results]
        _json([result.to_dict() | more for result, more in zip(results, largest, strict=True)])
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
        _json(report.document(result))
        return
    below = "\n".join(report.remarks(result))
    _rows(report.COLUMNS, report.cells(result), report.facts(result), fmt=fmt, above=report.heading(result), below=below)
    if fmt == "markdown":
        print(f"\n{_markdown(report.heading(result))}", *map(_markdown, report.remarks(result)), sep="\n\n")


def serving(result: Serving, *, fmt: str) -> None:
    """Files, merge and device bytes: a table per section for people, a row per number in CSV."""
    from peftplan.report import serving as report

    if fmt == "json":
        _json(result.to_dict())
    elif fmt == "csv":
        tabular.write_csv(result.records(), sys.stdout)
    else:
        _serving_head(result, fmt=fmt)
        for section in report.sections(result):
            _rows(section.columns, section.rows, (), fmt=fmt, below=section.below)
            print(f"\n{section.below}\n" if fmt == "markdown" and section.below else "")
        _remarks(report.remarks(result), fmt=fmt)


def _serving_head(result: Serving, *, fmt: str) -> None:
    """What the tables are about, and the verdicts."""
    from peftplan.report import screen
    from peftplan.report import serving as report

    lines = list(report.verdicts(result, screen.glyphs()))
    if fmt == "markdown":
        print(f"## {_markdown(report.heading(result))}\n", *(f"{_markdown(line.strip())}\n" for line, _ in lines), sep="\n")
        return
    print(tabular.printable(report.heading(result)))
    screen.show(row for line, colour in lines for row in screen.wrapped(line, screen.width(), colour=colour))
    print()


def fits(results: Sequence[Fit], *, fmt: str) -> None:
    """Plans for each card: the answer first, then a table of all plans and what comes nearest."""
    from peftplan.report import fitting, screen

    if fmt == "json":
        documents = [result.to_dict() for result in results]
        _json(documents[0] if len(documents) == 1 else {"schema_version": documents[0]["schema_version"], "cards": documents})
        return
    if fmt == "csv":
        tabular.write_csv([row for result in results for row in fitting.facts(result)], sys.stdout)
        return
    for number, result in enumerate(results):
        above = "\n".join((fitting.headline(result, screen.glyphs()), *fitting.remarks(result)))
        if number:
            print()
        if fmt == "markdown":
            print(f"{above}\n")
        below = fitting.ranking(result) if result is results[-1] else None
        _rows(fitting.plan_columns(result), fitting.plan_cells(result), fitting.facts(result), fmt=fmt, above=above, below=below)


def comparison(result: Comparison, *, fmt: str) -> None:
    """A row per method and card; for people with a bar of what each method needs."""
    from peftplan.report import comparing

    if fmt == "json":
        _json(result.to_dict())
        return
    cells, below = comparing.cells(result), "\n".join(comparing.errors(result)) or None
    _rows(comparing.COLUMNS, cells, result.records(), fmt=fmt, above=comparing.heading(result), below=below)
    if fmt == "markdown" and below:
        print(f"\n{_markdown(below)}")


def oom(result: Diagnosis, *, fmt: str) -> None:
    """Why memory ran out: the cause first."""
    from peftplan.report import oom as report

    if fmt == "json":
        _json(result.to_dict())
    elif fmt == "csv":
        tabular.write_csv(report.facts(result), sys.stdout)
    else:
        _remarks(list(report.lines(result)), fmt=fmt)


def rehearsal(result: Rehearsal, *, fmt: str) -> None:
    """What a rehearsal showed. JSON is one line, the last of stdout."""
    from peftplan.report import rehearsal as report
    from peftplan.report.screen import Screen, glyphs, show, width

    if fmt == "json":
        print(json.dumps(result.to_dict(), allow_nan=False), flush=True)
    elif fmt in ("csv", "markdown"):
        tabular.write_csv(report.facts(result), sys.stdout)
    else:
        show(report.rows(result, Screen(width(), glyphs())))


def cards(verdicts: Sequence[Verdict], *, fmt: str) -> None:
    """Cards that take a job, the smallest first."""
    from peftplan.report import fitting

    above = f"{len(verdicts)} cards of the catalogue take the job, the smallest first"
    larger = len(verdicts) - fitting.MOST_CARDS
    below = f"and {larger} with more memory (--format csv lists all)" if larger > 0 else None if verdicts else fitting.NO_CARD
    cells, facts = fitting.card_cells(verdicts[: fitting.MOST_CARDS]), [v.to_dict() for v in verdicts]
    _rows(fitting.CARD_COLUMNS, cells, facts, fmt=fmt, above=above, below=below)


def members(of_family: Sequence[Member], *, fmt: str, gpu: str) -> None:
    """The largest model of a family that a card takes, by method."""
    from peftplan.report import fitting

    facts = [member.to_dict() for member in of_family]
    _rows(
        fitting.MEMBER_COLUMNS,
        fitting.member_cells(of_family),
        facts,
        fmt=fmt,
        above=f"The largest model that {gpu} takes, by method",
        below=fitting.refusals(of_family),
    )


def models(entries: Sequence[ModelEntry], *, fmt: str) -> None:
    """The catalogue: name, parameters, model type, id."""
    columns = (Column("model"), Column("parameters", right=True), Column("model type"), Column("id", wide=True))
    cells = [(e.name, e.num_parameters, e.model_type, e.repo_id) for e in entries]
    _rows(columns, cells, [_fields(e) for e in entries], fmt=fmt, below=f"{len(entries)} model{'' if len(entries) == 1 else 's'}")


def configs(entries: Sequence[ConfigEntry], *, fmt: str) -> None:
    """A line for each file; text shows what a folder holds besides training configs as a number alone."""
    from peftplan.report.configs import COLUMNS, cells, listed, notes, summed

    shown = listed(entries)
    facts = [_fields(entry) for entry in entries]
    _rows(COLUMNS, [cells(entry) for entry in shown], facts, fmt=fmt, below=summed(entries), instead=notes(shown))


def methods(*, fmt: str) -> None:
    """The registry of methods."""
    from peftplan.methods import METHODS, OTHER_PEFT_TYPES

    columns = (Column("method"), Column("what trains"), Column("source", wide=True))
    cells = [(m.name, m.summary, m.source) for m in METHODS.values()]
    shown = ("name", "peft_type", "summary", "source", "quant")
    others = ", ".join(other.lower().replace("_", "-") for other in OTHER_PEFT_TYPES)
    below = f"counted by the installed peft (extra trace): {others}"
    _rows(columns, cells, [{key: getattr(m, key) for key in shown} for m in METHODS.values()], fmt=fmt, below=below)


def method(name: str, *, fmt: str) -> None:
    """One method's fields with their defaults."""
    from peftplan.methods import config_class, method_named

    entry = method_named(name)
    config = config_class(entry)
    cells, facts = [], []
    for key, field in config.model_fields.items():
        required = field.is_required()
        default = None if required else _plain(entry.defaults.get(key, field.get_default(call_default_factory=True)))
        cells.append((key, "required" if required else None if default in (None, {}, []) else str(default)))
        facts.append({"field": key, "required": required, "default": default})
    title = f"{entry.name}: {entry.summary} ({entry.source})"
    ignored = f"accepted, without effect on memory: {', '.join(sorted(config.no_effect))}" if config.no_effect else None
    _rows((Column("field"), Column("default")), cells, facts, fmt=fmt, above=title, below=ignored)


def schemas(*, fmt: str) -> None:
    """What has a JSON Schema, and which command prints it."""
    from peftplan.report.documents import DOCUMENTS

    columns = (Column("schema"), Column("printed by"), Column("what it holds", wide=True))
    cells = [(name, f"{document.command} --format json", document.text) for name, document in DOCUMENTS.items()]
    facts = [{"name": name, "command": document.command, "text": document.text} for name, document in DOCUMENTS.items()]
    _rows(columns, cells, facts, fmt=fmt)


def practices(rows: Sequence[Practice], *, fmt: str) -> None:
    """Advice from practice, each row with its source."""
    from peftplan.report import practice, screen

    if fmt == "table":
        screen.show(practice.lines(rows, screen.width()))
        return
    columns = (Column("topic"), Column("methods"), Column("advice"), Column("source"), Column("url"))
    cells = [(row.topic, ", ".join(row.methods), row.advice, row.source, row.url) for row in rows]
    _rows(columns, cells, practice.facts(rows), fmt=fmt)


def gpus(cards: Sequence[Gpu], *, fmt: str) -> None:
    """The cards: the marketed size, what nvidia-smi shows, what a program can use, and why."""
    from peftplan.hardware.gpus import OF_A_REQUEST
    from peftplan.hardware.usable import usable_bytes

    columns = (
        Column("gpu"),
        Column("marketed", right=True),
        Column("nvidia-smi", right=True),
        Column("usable", right=True),
        Column("compute capability"),
        Column("name", wide=True),
    )
    cells, facts = [], []
    for gpu in cards:
        usable = usable_bytes(gpu)
        marketed = f"{gpu.marketed_gb} GB" if gpu.marketed_gb else None
        total = f"{gpu.total_mib:,} MiB" if gpu.total_mib else None
        cells.append((gpu.id, marketed, total, f"{usable.bytes // MIB:,} MiB", gpu.compute_capability, gpu.name))
        of_card = {name: value for name, value in _fields(gpu).items() if name not in OF_A_REQUEST}
        facts.append({**of_card, "usable_bytes": usable.bytes, "usable_source": usable.why})
    below = None if cards else "0 cards"
    _rows(columns, cells, facts, fmt=fmt, below=below)


def inspection(result: Inspection, *, fmt: str) -> None:
    """The modules of a model; with a pattern, how many of each family it matches."""
    from peftplan.report import modules

    if fmt == "json":
        _json(result.to_dict())
        return
    facts, title = result.to_dict()["modules"], modules.heading(result)
    _rows(modules.columns(result), modules.cells(result), facts, fmt=fmt, above=title, below=modules.matches(result))


def _rows(
    columns: Sequence[Column],
    cells: Cells,
    facts: Facts,
    *,
    fmt: str,
    above: str | None = None,
    below: str | None = None,
    instead: Sequence[str] = (),
) -> None:
    """One list in the asked format: cells for people (with a line above and below in a table), facts for programs.

    `instead`: lines that stand below a table which is too narrow for its wide columns.

    An empty list is no table: a CSV is empty then, and people read the line below.
    """
    if fmt == "json":
        _json(facts)
    elif not cells:
        print(end=f"{below}\n" if below and fmt != "csv" else "")
    elif fmt == "csv":
        tabular.write_csv(facts, sys.stdout)
    elif fmt == "markdown":
        from peftplan.report import markdown

        print(markdown.table([column.header for column in columns], map(tabular.texts, cells)))
    else:
        from peftplan.report import terminal

        terminal.rows(columns, map(tabular.texts, cells), above=above, below=below, instead=instead)


def _remarks(lines: Sequence[str], *, fmt: str) -> None:
    """Lines of text: folded to the terminal, or as paragraphs."""
    if fmt == "markdown":
        print("\n\n".join(map(_markdown, lines)))
    else:
        from peftplan.report import terminal

        terminal.show(terminal.console(), lines)


def _markdown(text: str) -> str:
    """A line of text in Markdown."""
    from peftplan.report.markdown import plain

    return plain(text)


def _json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _fields(item: Any) -> dict[str, Any]:
    """A named tuple as JSON-able values."""
    return {name: _plain(value) for name, value in item._asdict().items()}


def _plain(value: object) -> object:
    if hasattr(value, "_asdict"):
        return _fields(value)
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return value

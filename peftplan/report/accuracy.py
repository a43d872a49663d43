"""A check as text: Markdown for people, JSON for programs, JUnit XML for CI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from xml.etree import ElementTree

from peftplan.accuracy.check import Check, shown
from peftplan.accuracy.drift import ON_ONE, ON_SEVERAL, WITHIN, Answer, Summary, apart, summaries, totals
from peftplan.accuracy.engines import BY_PHASE, FIGURES, OVERALL
from peftplan.accuracy.records import SetupSaid
from peftplan.report import markdown

SCHEMA_VERSION = 1
SHARES = (*(f"≤ {limit} %" for limit in WITHIN), "wrong verdicts")
SUMMARY = ("peak", "rows", "median", "median absolute error", "worst", "of")
TITLES: dict[SetupSaid, str] = {
    "as labelled": "runs that state everything that ran, as labelled",
    "with an inferred stack": "runs that state everything that ran, with an inferred stack",
    "leaves something open": "runs that leave something open",
}
RANKS: dict[SetupSaid, str] = {
    "as labelled": "state everything that ran, as labelled",
    "with an inferred stack": "state everything that ran, with an inferred stack",
    "leaves something open": "leave something open",
}
UPDATE = "If this is intended, `peftplan check --engine {engine} --update-baseline` stores what is stated now."


def summary_cells(rows: Iterable[Summary]) -> list[tuple[str, ...]]:
    """Summaries as cells under (group, *SUMMARY, *SHARES)."""
    return [
        (
            row.group,
            row.figure,
            str(row.rows),
            f"{row.median:+.2f} %",
            f"{row.median_unsigned:.2f} %",
            f"{row.worst:+.2f} %",
            row.worst_id,
            *(f"{share:.0%}" for share in row.within),
            str(row.wrong),
        )
        for row in rows
    ]


def headline(engine: str, answers: Sequence[Answer]) -> list[str]:
    """What was checked, in lines: runs on one GPU, then ranks of several."""
    on_one, several = apart(answers)
    lines = _counted("measured run", engine, on_one) if on_one or not several else []
    for setup, runs in TITLES.items():
        lines += _verdicts(f"Wrong verdicts, of {runs}", [answer for answer in on_one if answer.record.setup == setup])
    if several:
        lines += _counted("measured rank", engine, several, of=" of several GPUs")
        states = Counter(answer.record.setup for answer in several)
        lines.append(f"Of these ranks, {', '.join(f'{number} {RANKS[setup]}' for setup, number in sorted(states.items()))}.")
        for setup, state in RANKS.items():
            lines += _verdicts(f"Wrong verdicts, of ranks that {state}", [rank for rank in several if rank.record.setup == setup])
    return lines


def _counted(run: str, engine: str, answers: Sequence[Answer], *, of: str = "") -> list[str]:
    sums = totals(answers)
    lines = [
        f"{sums.records} {run}{'' if sums.records == 1 else 's'}{of}, engine {engine}: {sums.with_peak} with a stated peak,"
        f" {sums.no_peak} with no peak stated, {sums.refused} refused.",
    ]
    if sums.counts_printed:
        lines.append(f"Parameter counts: {sums.counts_equal} of {sums.counts_printed} printed by the runs are equal.")
    lines += _bounds(answers)
    if sums.out_of_memory:
        verdicts = ", ".join(f"{number} {verdict}" for verdict, number in sums.out_of_memory.items())
        lines.append(f"Verdicts on the cards where runs ran out of memory: {verdicts}.")
    return lines


def _bounds(answers: Sequence[Answer]) -> list[str]:
    bounds = [answer.bound for answer in answers if answer.bound is not None]
    if not bounds:
        return []
    shares = [one.stated / one.measured for one in bounds]
    above = sum(share > 1 for share in shares)
    return [
        f"{len(bounds)} more runs measured only reserved or device bytes, which this engine does not state: of these the stated"
        f" allocated peak is {median(shares):.0%} (median), {min(shares):.0%} to {max(shares):.0%}; {above} lie above,"
        " which is impossible."
    ]


def _verdicts(title: str, answers: Sequence[Answer]) -> list[str]:
    cards = {"own": "on the card it ran on", "below": "on a card 1 % below its peak", "above": "on a card 10 % above its peak"}
    counted = totals(answers).verdicts.items()
    counts = [f"{wrong} of {number} {cards[kind]}" for kind, (wrong, number) in counted if number]
    return [f"{title}: {', '.join(counts)}."] if counts else []


def endings(checked: Check) -> list[str]:
    """Failures, and what to do about them."""
    lines = [failure.text(checked.engine) for failure in checked.failures]
    if any(failure.kind == "baseline" for failure in checked.failures):
        lines.append(UPDATE.format(engine=checked.engine))
    if checked.new:
        lines.append(f"{checked.new} records state more than the baseline contains; --update-baseline adds it.")
    return lines or ["Nothing changed against the baseline, and no tolerance is exceeded."]


def refused(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """(how many, why) of what the engine refuses, most frequent first."""
    reasons: dict[str, int] = {}
    for answer in answers:
        if answer.stated.refused is not None:
            reasons[answer.stated.refused] = reasons.get(answer.stated.refused, 0) + 1
    return [(str(times), why) for why, times in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))]


def as_markdown(checked: Check) -> list[str]:
    """The paragraphs of a check."""
    parts = ["\n".join(f"- {markdown.plain(line)}" for line in headline(checked.engine, checked.answers))]
    parts += tables(checked.answers)
    if refusals := refused(checked.answers):
        parts.append(markdown.table(("refused", "why"), refusals))
    return [*parts, "\n".join(f"- {markdown.plain(line)}" for line in endings(checked))]


def tables(answers: Sequence[Answer]) -> list[str]:
    """Markdown tables of drift by group and by phase, those of several GPUs last; none where no peak is stated."""
    parts = []
    for of_side, groupings in zip(apart(answers), (ON_ONE, ON_SEVERAL), strict=True):
        for by in groupings:
            if rows := summaries(of_side, by, OVERALL):
                head = by if groupings is ON_ONE else f"{by}, several GPUs"
                parts.append(markdown.table((head, *SUMMARY, *SHARES), summary_cells(rows)))
        if rows := summaries(of_side, "source", BY_PHASE):
            parts.append(markdown.table(("by phase", *SUMMARY, *SHARES), summary_cells(rows)))
    return parts


def facts(checked: Check) -> dict[str, object]:
    """The JSON of a check: versioned, bytes as integers, drift in percent."""
    on_one, several = apart(checked.answers)
    return {
        "schema_version": SCHEMA_VERSION,
        "engine": checked.engine,
        **_totals_facts(on_one, ON_ONE),
        "several_gpus": _totals_facts(several, ON_SEVERAL),
        "rows": [_row_facts(answer) for answer in checked.answers],
        "failures": [
            {"kind": f.kind, "id": f.case.record.id, "file": shown(f.case.path), "line": f.case.line, "what": f.what}
            for f in checked.failures
        ],
    }


def _totals_facts(answers: Sequence[Answer], groupings: Iterable[str]) -> dict[str, object]:
    total = totals(answers)
    return {
        "records": total.records,
        "with_peak": total.with_peak,
        "no_peak_stated": total.no_peak,
        "refused": total.refused,
        "counts": {"printed": total.counts_printed, "equal": total.counts_equal},
        "out_of_memory": total.out_of_memory,
        "verdicts": {kind: {"wrong": wrong, "asked": judged} for kind, (wrong, judged) in total.verdicts.items()},
        "summary": {by: [_summary_facts(row) for row in summaries(answers, by, FIGURES)] for by in groupings},
    }


def _summary_facts(row: Summary) -> dict[str, object]:
    return {
        "group": row.group,
        "peak": row.figure,
        "rows": row.rows,
        "median_percent": round(row.median, 4),
        "median_unsigned_percent": round(row.median_unsigned, 4),
        "worst_percent": round(row.worst, 4),
        "worst_id": row.worst_id,
        "wrong_verdicts": row.wrong,
        "within": {str(limit): round(share, 4) for limit, share in zip(WITHIN, row.within, strict=True)},
    }


def _row_facts(answer: Answer) -> dict[str, object]:
    record, predicted = answer.record, answer.stated
    return {
        "id": record.id,
        "file": shown(answer.case.path),
        "line": answer.case.line,
        "source": record.circumstances.source,
        "model": record.run.model_name,
        "method": record.run.method_name,
        "strategy": record.run.strategy,
        "num_gpus": record.circumstances.num_gpus,
        "exact": record.exact,
        "setup": record.setup,
        "refused": predicted.refused,
        "figures": [
            {"peak": one.figure, "measured": one.measured, "stated": one.stated, "drift_percent": round(one.drift, 4)}
            for one in answer.compared
        ],
        "trainable": {"printed": record.counts.trainable, "stated": predicted.trainable},
        "total": {"printed": record.counts.total, "stated": predicted.total},
        "verdict": predicted.verdict,
        "wrong_verdicts": answer.wrong_verdicts,
    }


def junit(checked: Check) -> str:
    """One test case per record, named by source and id; skipped where there is nothing to compare."""
    suite = ElementTree.Element("testsuite", name=f"peftplan check, engine {checked.engine}", tests=str(len(checked.answers)))
    failed = {answer.record.id: [f for f in checked.failures if f.case is answer.case] for answer in checked.answers}
    suite.set("failures", str(sum(bool(failures) for failures in failed.values())))
    suite.set("errors", "0")
    skipped = 0
    for answer in checked.answers:
        case = ElementTree.SubElement(
            suite, "testcase", classname=answer.record.circumstances.source, name=answer.record.id, file=shown(answer.case.path)
        )
        if failures := failed[answer.record.id]:
            text = "\n".join(failure.text(checked.engine) for failure in failures)
            ElementTree.SubElement(case, "failure", message=failures[0].what).text = text
        elif not answer.compared and answer.record.counts.trainable is None:
            skipped += 1
            ElementTree.SubElement(case, "skipped", message=answer.stated.refused or "no peak stated")
        drifts = "; ".join(f"{one.figure} {one.drift:+.2f} %" for one in answer.compared)
        ElementTree.SubElement(case, "system-out").text = drifts or "no peak stated"
    suite.set("skipped", str(skipped))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode")

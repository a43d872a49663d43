"""Write docs/published-figures.md: memory that other projects printed, beside the estimate of the same job: `python -m
tools.published_figures`.

data/published/figures.jsonl has a row for each figure of torchtune and ms-swift: what was printed where, the `job` (MODEL and
options) or the published config that is estimated, what a rehearsal of a release of that time took, and the `reason` of a
difference, a name in `REASONS`. Where the tokens of a script's data are published, `longest` is the longest row, which is
estimated; `day` is what ran then: releases and arguments. Unsloth's figures are those of its notebooks
(`tests/job/configs/data/unsloth.jsonl`), ranks of several GPUs those of data/runs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peftplan
from peftplan.accuracy.engines import RUNS, read_cases
from peftplan.accuracy.records import Metric
from peftplan.allocator.program import PHASE, WIDTH, Program, replay
from peftplan.cli.rehearse import job_of
from peftplan.errors import PeftplanError
from peftplan.job.configs.plan import ConfigPlan
from peftplan.results.estimate import Estimate, Peaks
from peftplan.units import GIB
from tests.job.configs.published import plan, records
from tools.config_page import table
from tools.notebook_peaks import COPIES, left_open

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "published" / "figures.jsonl"
PAGE = ROOT / "docs" / "published-figures.md"
UNITS = {"GB": 10**9, "GiB": GIB}
NEAR = 3.0
"""Percent within which an estimate stands beside a figure without a reason."""
Row = dict[str, Any]
MEGATRON = "Megatron-Core runs it, whose step peftplan does not count"
OFFLOADED = "reserved bytes are not stated where the host holds the base"
OF_RANKS = ("fms_fsdp1", "fsdp_qlora", "ms_swift_ranks", "ms_swift")
RANKS_NEAR = 0.01
REASONS = {
    "within": f"the estimate is within {NEAR:.0f} % or rounds to the figure",
    "lengths": "it does so for the longest row that the data set's publisher counted, and not for a row of `max_length`",
    "release": "what a release of that time does otherwise: shown by a rehearsal of it, an estimate, or its file and line",
    "changed": "a commit changed the job after the figure was taken",
    "copied": "the comment came with another script, whose figure it is",
    "card": "more than a card of 80 GB gives to torch: the comment names the card",
    "pictures": "pictures come on top: the estimate is of the text part, and lower",
    "unstated": "the source does not state the flags of the job: checkpoints, offloading, optimizer and rank",
    "open": "nothing found explains the difference, which stands beside it",
}
"""Why a figure is what it is, in one word."""
LONGEST = 1 << 15
"""Tokens up to which a length is sought that meets a figure."""


def load_rows() -> list[Row]:
    """The rows in the order of the file."""
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def estimated(source: ConfigPlan | str, **options: Any) -> Estimate | str:
    """The estimate of a job or a config, or why there is none."""
    try:
        if isinstance(source, str):
            model, of_job = job_of(source)
            result = peftplan.estimate(model, **{**of_job, **options})  # type: ignore[arg-type]
        else:
            result = peftplan.estimate(config=source, **options)
    except PeftplanError as error:
        return "the model is not built in" if "cannot be reached" in str(error) else str(error).replace("|", "\\|")[:160]
    return result if result.peaks is not None else result.not_modelled[0]


def reserved_by_loading(peaks: Peaks) -> int | None:
    """What a replay of loading alone reserves."""
    if peaks.run is None or peaks.reserved is None:
        return None
    run = peaks.run()
    program, sizes = run.program()
    events = memoryview(program.events).cast("q")
    begins = [place for place in range(0, len(events), WIDTH) if events[place] == PHASE]
    cut = next(place for place in begins if program.phases[events[place + 1]] != "load")
    loading = Program(events[:cut].tobytes(), *program[1:])
    return replay(loading, sizes, ties_by_address=run.script.ties_by_address).reserved


def figure(peaks: Peaks, metric: str) -> int | None:
    """What a printed figure compares with; where its metric is not stated, reserved bytes."""
    if metric == "reserved, load":
        return reserved_by_loading(peaks)
    if metric == "allocated, load":
        return peaks.by_phase["load"]
    return peaks.allocated if metric == "allocated" else peaks.reserved


def beside(printed: float, nbytes: int | None, unit: str) -> tuple[str, str]:
    """A number in the unit of a printed one, and by how many percent it is off."""
    if nbytes is None:
        return "–", "–"
    return f"{nbytes / UNITS[unit]:.2f}", f"{100 * (nbytes / UNITS[unit] / printed - 1):+.1f} %"


def torchtune(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """What, printed, metric, estimated, rehearsed, the reason, what is assumed and what shows it."""
    for row in rows:
        if row["tool"] == "torchtune":
            result = estimated(row["job"]) if "job" in row else "–"
            peaks = None if isinstance(result, str) else result.peaks
            ours = beside(row["printed"], figure(peaks, row["metric"]) if peaks else None, row["unit"])
            real = beside(row["printed"], row.get("rehearsed"), row["unit"])
            notes = [*row.get("assumes", ()), *([f"*inferred*: {row['inferred']}"] if "inferred" in row else []), row.get("why")]
            release = row.get("versions", {}).get("torchtune", "–")
            cells = (row["what"], f"{row['printed']} {row['unit']}", row["metric"], *ours, *real, release, row.get("reason", "–"))
            yield (*cells, "; ".join(filter(None, notes)))


def command(row: Row) -> Row:
    """The command of a script that a comment is about."""
    commands = [record for record in records("swift") if record["path"] == row["path"]]
    record: Row = commands[min(row.get("command", 0), len(commands) - 1)]
    return record


def job_of_script(row: Row, *, day: bool = False) -> tuple[ConfigPlan, dict[str, Any]]:
    """What is read of an ms-swift script, on its `day` if so asked, and the options that follow from its data and that day."""
    record = command(row)
    then = dict(row["day"]) if day else {}
    release = {"script": peftplan.Script(transformers=then.pop("transformers"))} if day else {}
    longest = {"seq_len": row["longest"]["tokens"]} if "longest" in row else {}
    return plan(record | {"values": record["values"] | row.get("set", {}) | then}), release | longest


def meets(printed: float, gib: float) -> bool:
    """Whether a number rounds to a figure, or is near it."""
    digits = len(f"{printed:g}".partition(".")[2])
    return round(gib, digits) == printed or abs(gib / printed - 1) <= NEAR / 100


def length_that_meets(row: Row) -> int | None:
    """The tokens of a row at which the job of a script reserves what was printed; None if it does so at no length."""
    source, options = job_of_script(row, day="day" in row)

    def reserved(length: int) -> float:
        result = estimated(source, **{**options, "seq_len": length})
        peaks = None if isinstance(result, str) else result.peaks
        return 0.0 if peaks is None or peaks.reserved is None else peaks.reserved / GIB

    below, above = 0, LONGEST
    if reserved(above) < row["printed"] or reserved(16) > row["printed"]:
        return None
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if reserved(middle) < row["printed"] else (below, middle)
    return above


def swift(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """Script, what its comment says, since when, estimated, difference, the length that meets it, reason and what shows it."""
    for row in rows:
        if row["tool"] == "ms-swift":
            cells, reason, shown = ("–", "–"), "–", MEGATRON
            if not command(row)["program"].startswith("megatron"):
                read, options = job_of_script(row)
                result = estimated(read, **options)
                peaks = None if isinstance(result, str) else result.peaks
                nbytes = figure(peaks, "reserved") if peaks else None
                cells = beside(row["printed"], nbytes, "GiB")
                reason, shown = row.get("reason", "–"), "reserved bytes are not stated" if peaks else str(result)
                if nbytes is not None:
                    shown = "; ".join(_shown(row, nbytes, read))
            met = length_that_meets(row) if cells[0] != "–" else None
            length = "–" if met is None else f"{met:,}"
            yield (row["path"].removeprefix("examples/"), row["what"], row.get("date", "–"), *cells, length, reason, shown)


def _shown(row: Row, nbytes: int, read: ConfigPlan) -> Iterator[str]:
    """What shows the reason of a row."""
    if row["reason"] == "open":
        yield f"{nbytes / GIB - row['printed']:+.1f} GiB"
    if "longest" in row:
        yield f"a row of {row['longest']['tokens']:,} tokens ({row['longest']['of']})"
    if "rehearsed" in row:
        number, off = beside(row["printed"], row["rehearsed"], "GiB")
        yield f"rehearsed with ms-swift {row['versions']['ms-swift']}: {number} GiB, {off}"
    if "day" in row:
        source, options = job_of_script(row, day=True)
        result = estimated(source, **options)
        assert not isinstance(result, str)
        assert result.peaks is not None
        then = ", ".join(f"{key} {value}" for key, value in row["day"].items())
        yield f"estimated with {then}: {' GiB, '.join(beside(row['printed'], result.peaks.reserved, 'GiB'))}"
    if row.get("shown"):
        yield row["shown"]
    yield from filter(None, (read.assumed.get("optim"), *read.warnings()))


def unsloth(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """Notebook, release, card; after loading and at the end: printed, estimated, difference; what the config leaves open."""
    known = {row["path"]: row for row in rows if row["tool"] == "unsloth"}
    for record in records("unsloth"):
        measured = record.get("measured", {})
        if not measured.get("peak_reserved_gb") or record["path"].startswith(COPIES):
            continue
        row = known.get(record["path"], {})
        result = estimated(plan(record), **row.get("options", {}))
        peaks = None if isinstance(result, str) else result.peaks
        start, end = measured["start_reserved_gb"], measured["peak_reserved_gb"]
        loaded = beside(start, reserved_by_loading(peaks) if peaks else None, "GiB")
        whole = beside(end, peaks.reserved if peaks else None, "GiB")
        facts = () if isinstance(result, str) else left_open(record, result.trainable_parameters, lengths="assumes" not in row)
        unlike = loaded[1] != "–" and abs(float(loaded[1].removesuffix(" %"))) > NEAR
        of_loading = [f"after loading: {row.get('loaded', 'open, the loader of that release')}"] if unlike else []
        why = result if isinstance(result, str) else "; ".join((*row.get("assumes", ()), *of_loading, *facts))
        yield (record["path"][3:], measured.get("unsloth", "–"), measured["gpu"], f"{start}", *loaded, f"{end}", *whole, why)


def ranks() -> Iterator[tuple[str, ...]]:
    """Measured runs of several GPUs that are more than 1 % off: id, job, metric, measured, estimated, difference, the reason."""
    stated = json.loads((RUNS / "baseline.json").read_text(encoding="utf-8"))["engines"]["analytic"]
    for case in read_cases([RUNS / f"{name}.jsonl" for name in OF_RANKS]):
        record, sizes = case.record, case.record.run.options
        metric: Metric = "reserved" if record.peaks.overall.allocated is None else "allocated"
        measured, ours = record.peaks.figure(metric), stated[record.id]["figures"].get(metric)
        assert measured is not None
        number, off = beside(measured / GIB, ours, "GiB")
        if ours is None or abs(ours / measured - 1) > RANKS_NEAR:
            job = f"{record.run.model_name}, {record.run.method}, {sizes['batch_size']} x {sizes['seq_len']}"
            why = OFFLOADED if ours is None else "; ".join((*record.unknown, *record.differs))
            yield record.id, job, metric, f"{measured / GIB:.2f}", number, off, why


def left_out() -> Iterator[tuple[str, ...]]:
    """Source, the reason why no setup describes its runs, how many."""
    lines = (RUNS / "not_expressible.jsonl").read_text(encoding="utf-8").splitlines()
    counts = Counter((row["source"], row["why"]) for row in map(json.loads, lines))
    for (source, why), number in sorted(counts.items()):
        yield source, why, str(number)


def page(rows: list[Row]) -> str:
    """The whole page."""
    recipes, scripts, notebooks, off = [*torchtune(rows)], [*swift(rows)], [*unsloth(rows)], [*ranks()]
    tallies = (
        ("torchtune", "estimate", [cells[4] for cells in recipes]),
        ("torchtune", "rehearsal of a release of that time", [cells[6] for cells in recipes]),
        ("ms-swift", "estimate", [cells[4] for cells in scripts]),
        ("Unsloth, after loading", "estimate", [cells[5] for cells in notebooks]),
        ("Unsloth, at the end", "estimate", [cells[8] for cells in notebooks]),
    )
    return f"""# Published figures

<!-- written by tools/published_figures.py -->
How far are estimates from the memory that other tools print in their own documentation? Each row below is such a figure, with its
source in `data/published/figures.jsonl`, the estimate of the same job, and the reason of a difference. Few of these figures say
all that decides them: the data's lengths, the releases, often even which bytes were read.

{table(("figures", "beside", "all", "with a number", "within 3 %", "within 10 %"), [_tally(*each) for each in tallies])}

Of torchtune's figures with a number {_summary(recipes, 8)}; of ms-swift's {_summary(scripts, 6)}. The reasons:

{table(("reason", "what it says", "torchtune", "ms-swift"), _reasons(recipes, scripts))}

## torchtune

Releases 0.1.0, 0.3.0 and 0.4.0 ran as their recipes, each in an environment of its own, on the emulated card with torch 2.13.

{table(("what", "printed", "metric", "estimated", "off", "rehearsed", "off", "release", "reason", "assumed, shown by"), recipes)}

## ms-swift

Comments of its example scripts, in GiB per GPU, most of them rounded to a whole number; *since* is the day on which the comment
first stood there. ms-swift itself prints the bytes that torch reserved. Metric, card and releases are not stated; the estimate is
of 4.6.0. *met at* is the tokens of a row, or of a batch that is joined into one, at which the estimate is the figure: a dash
where it is above it at 16 tokens or below it at {LONGEST:,}.

docs/source_en/Instruction/Supported-models-and-datasets.md of commit 3602360a5 counts the tokens of data sets. Where the last
column names one of its lines, the estimate is of the longest row there. Counts that leave out answers are not used: three sets of
different answers to the same questions have one count.

{table(("script", "comment", "since", "reserved", "off", "met at", "reason", "shown by"), scripts)}

## Unsloth

Its notebooks print GiB that torch has reserved, before training and after it. What is reserved before training, the config says,
but for the release that loaded the model and what else ran before; the peak needs the lengths of the rows too. The estimate is of
release 2026.10.9.

{
        table(
            ("notebook", "release", "card", "loaded", "estimated", "off", "peak", "estimated", "off", "not in the config"),
            notebooks,
        )
    }

## Several GPUs

Of {
        sum(1 for _ in read_cases([RUNS / f"{name}.jsonl" for name in OF_RANKS]))
    } ranks that were measured, those that are more than 1 % off, or have no number, in GiB; [Accuracy](accuracy.md) has all.

{table(("id", "job", "metric", "measured", "estimated", "off", "why"), off)}

## Runs that no setup describes

{table(("source", "why", "rows"), [*left_out()])}
"""


def _reasons(recipes: list[tuple[str, ...]], scripts: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Reason, what it says, how many figures of each tool have it."""
    ours, theirs = Counter(cells[8] for cells in recipes), Counter(cells[6] for cells in scripts)
    yield from ((name, says, str(ours[name]), str(theirs[name])) for name, says in REASONS.items())


def _summary(rows: list[tuple[str, ...]], column: int) -> str:
    """How many figures are met, how many have a reason, and how many are open."""
    counts = Counter(cells[column] for cells in rows)
    explained = sum(counts[name] for name in REASONS.keys() - {"within", "open"})
    return f"{counts['within']} are within, {explained} have a reason, {counts['open']} are open"


def _tally(figures: str, beside_what: str, off: list[str]) -> tuple[str, ...]:
    """How many differences are small."""
    numbers = [abs(float(cell.removesuffix(" %"))) for cell in off if cell != "–"]
    counts = (len(off), len(numbers), sum(n <= NEAR for n in numbers), sum(n <= 10 for n in numbers))
    return (figures, beside_what, *map(str, counts))


if __name__ == "__main__":
    PAGE.write_text(page(load_rows()), encoding="utf-8")

"""Traced peaks against peaks that other people's runs measured: prints a Markdown page, `--write` writes docs/trace-drift.md.

`python tools/trace_drift.py [--parts t4 runs metamath unscored] [--lengths BEFORE/LONGEST ...] [--write]`, or `--run NAME`
for one run of peft's benchmark alone. The rows are data/runs (the T4's, and those of other trainers and stacks; their traces are
the baseline's: `peftplan check --engine trace --update-baseline`), data/published/peft_metamath.jsonl (reserved bytes) and
peft_metamath_unscored.jsonl (configurations without a run). What today's peft computes otherwise than the one that ran is traced
by the interpreter of `--other-peft`, whose environment has that one (0.19.1). Parts not asked for stay as they are on the page;
its words are tools/trace_drift.md. Needs the extra `trace`; the whole takes a quarter of an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from peftplan.accuracy.baseline import load
from peftplan.accuracy.drift import Answer, summaries
from peftplan.accuracy.engines import OVERALL, RUNS, ask, read_cases
from peftplan.allocator.replay import replay
from peftplan.errors import RefusedError
from peftplan.job.resolving import resolved
from peftplan.job.script import Script
from peftplan.job.setup import parse_setup
from peftplan.job.sources import load_config
from peftplan.libraries.meta import quiet_transformers
from peftplan.report.markdown import table
from peftplan.trace.engine import trace
from peftplan.trace.result import Traced
from peftplan.trace.scripted import with_empty_cache
from peftplan.units import MIB

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "data" / "published"
OUTPUT = ROOT / "docs" / "trace-drift.md"
TEMPLATE = ROOT / "tools" / "trace_drift.md"
"""The words of the page; a comment with a part's name stands for what is traced."""
Row = dict[str, Any]

T4_FIGURES = ("forward", "backward", "step", "reserved", "device")
ADA = (8, 9)
LLAMA = "llama-3.2-3b"

Lengths = tuple[int, int]
"""Length of the batch before the longest one, and of the longest one."""
LENGTHS: tuple[Lengths, ...] = ((104, 690), (120, 688))
"""Of peft's benchmark, which does not record them: the first was chosen by the rows in `CHOSEN_BY`, the second is a neighbour."""

CHOSEN_BY = ("lora/llama-3.2-3B-rank32", "ia3/llama-3.2-3B-default")
LORA_FA = "lora/llama-3.2-3B-rank32-lorafa"
OTHER_CODE = ("osf/llama-3.2-3B-rank128",)
"""Rows of methods that peft computed otherwise when it ran (0.19): causes on the page."""
BENCHMARK = {
    "dtype": "bfloat16",
    "autocast_adapter_dtype": True,
    "batch_size": 4,
    "gradient_checkpointing": False,
    "transformers": "5.13.1",
}
"""What the benchmark's runs share, for configurations without a run."""

RUN_FILES = ("vramcalc_a6000", "fms_acceleration", "canifinetune", "distilbert", "bert_large", "ms_swift")
"""Of data/runs: what is neither one of the two sources above."""
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Figure:
    """One measured number and its trace, in bytes."""

    measured: float
    traced: float

    @property
    def drift(self) -> float:
        """Signed, in percent of what was measured."""
        return 100 * (self.traced / self.measured - 1)

    def cell(self, unit: int, decimals: int) -> str:
        """`measured → traced (drift)`."""
        return f"{self.measured / unit:,.{decimals}f} → {self.traced / unit:,.{decimals}f} ({self.drift:+.2f} %)"


Figures = dict[str, Figure]
Done = tuple[Row, Figures]
Refused = tuple[str, str]


def load_rows(name: str) -> list[Row]:
    """The rows of a file of data/published, in its order."""
    return [json.loads(line) for line in (PUBLISHED / name).read_text(encoding="utf-8").splitlines()]


def metamath_trace(row: Row, *, lengths: Lengths) -> Traced:
    """Two steps of a row of peft_metamath.jsonl: a batch of the first length, then one of the second."""
    before, longest = lengths
    options = {
        "trainer": "plain",
        "dtype": row["dtype"],
        "adapter_dtype": "fp32" if row["autocast_adapter_dtype"] else row["dtype"],
        "batch_size": row["batch_size"],
        "seq_len": longest,
        "padding": True,
        "gradient_checkpointing": row["gradient_checkpointing"],
    }
    adapter = row["adapter_config"]
    return trace(
        load_config(LLAMA),
        task_type="CAUSAL_LM",
        peft_config={**adapter, "freeze_a": True} if row["experiment"] == LORA_FA else adapter,
        setup=resolved(parse_setup(options), quantized=False, supports_sdpa=True, use_cache=True),
        device=ADA,
        script=Script(outputs_outlive_step=True, earlier_seq_lens=(before,), enables_adapters_again=True).ran_on(row),
    )


def reserved(row: Row, *, lengths: Lengths) -> int:
    """Reserved bytes of a row's two steps."""
    return replay(with_empty_cache(metamath_trace(row, lengths=lengths))).peaks.reserved


def metamath_figures(row: Row, *, lengths: Sequence[Lengths]) -> Figures:
    """Reserved bytes of the whole run, by the lengths of its last two batches."""
    return {_head(pair): Figure(row["max_memory_reserved_bytes"], reserved(row, lengths=pair)) for pair in lengths}


def by_other_peft(python: str, row: Row, *, lengths: Sequence[Lengths]) -> Figures:
    """`metamath_figures` by another interpreter, whose environment has another peft."""
    arguments = ["--run", row["experiment"], "--bytes", "--lengths", *(f"{before}/{longest}" for before, longest in lengths)]
    process = subprocess.run([python, __file__, *arguments], check=True, capture_output=True, text=True)
    return {head: Figure(row["max_memory_reserved_bytes"], traced) for head, traced in json.loads(process.stdout).items()}


def answers_of(*files: str) -> list[Answer]:
    """What the trace engine says of the runs of these files, as `peftplan check` stored it; what it did not ask is asked now."""
    stored = load(RUNS / "baseline.json")
    cases = read_cases([RUNS / f"{name}.jsonl" for name in files])
    return [Answer(case, stored.stated("trace", case.record.id) or ask(case.record, "trace")) for case in cases]


def run_lines(answers: Sequence[Answer]) -> Iterator[tuple[str, ...]]:
    """One line per setup and stack: how many runs, and of each figure the median measured, what is traced, and its drift."""
    groups: dict[tuple[str, ...], list[Answer]] = {}
    for answer in answers:
        groups.setdefault(_circumstances(answer), []).append(answer)
    for circumstances, same in groups.items():
        yield *circumstances, str(len(same)), *(_median_cell(same, figure) for figure in OVERALL)


def _median_cell(answers: Sequence[Answer], figure: str) -> str:
    compared = [one for answer in answers for one in answer.overall if one.figure == figure]
    if not compared:
        return ""
    return Figure(median(one.measured for one in compared), median(one.stated for one in compared)).cell(MIB, 0)


def _circumstances(answer: Answer) -> tuple[str, str, str]:
    run, circumstances = answer.record.run, answer.record.circumstances
    o = run.options
    parts = [run.model_name.rpartition("/")[2], run.method_name, o["dtype"]]
    parts += [f"autocast {o['autocast']}"] if o["autocast"] != "none" else []
    parts += ["kbit preparation"] if o["kbit_prepare"] else []
    parts += ["checkpointing"] if o["gradient_checkpointing"] else []
    parts += [o["optim"]] if o["optim"] != "adamw_torch" else []
    accumulated = o["gradient_accumulation_steps"]
    parts.append(f"{o['batch_size']} × {o['seq_len']}" + (f" × {accumulated}" if accumulated > 1 else ""))
    return circumstances.source.partition(" ")[0], ", ".join(parts), circumstances.versions.get("transformers", "not said")


def _head(lengths: Lengths) -> str:
    return "{} after {}".format(*reversed(lengths))


def tried(rows: Sequence[Row], figures: Callable[[Row], Figures], *, key: str) -> tuple[list[Done], list[Refused]]:
    """What every row comes to; and which rows cannot be traced, with the reason."""
    scored: list[Done] = []
    refused: list[Refused] = []
    for row in rows:
        try:
            scored.append((row, figures(row)))
        except RefusedError as error:
            refused.append((row[key], str(error)))
    return scored, refused


def summary(rows: Sequence[Figures], head: str) -> str:
    """Median, median of the absolute drift, and both ends, by column."""
    lines = []
    for name in dict.fromkeys(name for figures in rows for name in figures):
        drifts = [figures[name].drift for figures in rows if name in figures]
        ends = (median(drifts), min(drifts), max(drifts))
        lines.append((name, str(len(drifts)), f"{median(map(abs, drifts)):.2f} %", *(f"{end:+.2f} %" for end in ends)))
    return table((head, "rows", "median absolute error", "median", "lowest", "highest"), lines)


def part_t4(lengths: Sequence[Lengths]) -> str:
    """The T4's rows, by how the base was loaded; and the jobs that were measured more than once."""
    answers = [answer for answer in answers_of("fitcheck_t4") if answer.record.outcome == "ok"]
    parts = []
    for loaded in LOADED:
        same = [answer for answer in answers if loaded_as(answer) == loaded]
        rows = [{name: figures[name] for name in T4_FIGURES if name in (figures := _figures(one))} for one in same]
        lines = [_t4_line(*both) for both in zip(same, rows, strict=True)]
        parts += [f"**{loaded}**", summary(rows, "peak"), table((*T4_JOB, *T4_FIGURES), lines)]
    return "\n\n".join([*parts, "Measured more than once, reserved bytes:", table(REPEATED, list(repeated_lines(answers)))])


LOADED = ("fp16", "nf4, weights copied one by one", "nf4, weights copied in threads")
T4_JOB = ("id", "model", "attention", "batch × tokens")
REPEATED = (*T4_JOB[1:], *LOADED, "traced", "lowest and highest apart")


def loaded_as(answer: Answer) -> str:
    """How the base of a T4's run came to the card."""
    one_by_one, in_threads = LOADED[1:]
    return LOADED[0] if answer.record.run.options.get("quant") is None else in_threads if answer.record.differs else one_by_one


def repeated_lines(answers: Sequence[Answer]) -> Iterator[tuple[str, ...]]:
    """One line per job that was measured more than once: what it reserved each time."""
    jobs: dict[str, list[Answer]] = {}
    for answer in answers:
        jobs.setdefault(answer.record.run.model_dump_json(exclude={"script"}), []).append(answer)
    for same in jobs.values():
        if len(same) > 1:  # whichever transformers ran
            reserved = [_figures(answer)["reserved"] for answer in same]
            times: dict[str, list[str]] = {loaded: [] for loaded in LOADED}
            for answer, figure in zip(same, reserved, strict=True):
                times[loaded_as(answer)].append(f"{figure.measured / MIB:,.0f}")
            low, high = min(one.measured for one in reserved), max(one.measured for one in reserved)
            traced = f"{reserved[0].traced / MIB:,.0f}"
            yield *_job(same[0])[1:], *(", ".join(each) for each in times.values()), traced, f"{100 * (high / low - 1):.1f} %"


def part_runs(lengths: Sequence[Lengths]) -> str:
    """The other runs, by source, and by what ran."""
    answers = answers_of(*RUN_FILES)
    lines = [
        (
            s.group.removesuffix(" (open)"),
            s.figure,
            str(s.rows),
            f"{s.median_unsigned:.2f} %",
            f"{s.median:+.2f} %",
            f"{s.worst:+.2f} %",
        )
        for s in summaries(answers, "source")
    ]
    refused = [(answer.record.id, answer.stated.refused) for answer in answers if answer.stated.refused]
    parts = [
        table(("source", "peak", "rows", "median absolute error", "median", "worst"), lines),
        table(("source", "run", "transformers", "rows", *OVERALL), run_lines(answers)),
    ]
    return "\n\n".join([*parts, *_not_traced(refused)])


def part_metamath(lengths: Sequence[Lengths], *, other_peft: str | None = None) -> str:
    """peft's benchmark."""
    every = sorted(load_rows("peft_metamath.jsonl"), key=lambda row: row["experiment"] not in CHOSEN_BY)

    def figures(row: Row) -> Figures:
        if other_peft and row["experiment"] in OTHER_CODE:
            return by_other_peft(other_peft, row, lengths=lengths)
        return metamath_figures(row, lengths=lengths)

    scored, refused = tried(every, figures, key="experiment")
    parts = [
        summary([figures_of_row for row, figures_of_row in scored if row["experiment"] not in CHOSEN_BY], "tokens"),
        f"OSF is traced with {'the peft that ran' if other_peft else 'a later peft than ran'} (causes below).",
        table(("run", *map(_head, lengths)), [_metamath_line(*one) for one in scored]),
    ]
    return "\n\n".join([*parts, *_not_traced(refused)])


def part_unscored(lengths: Sequence[Lengths]) -> str:
    """The benchmark's configurations that nobody measured."""
    lines, refused = _unscored(lengths[-1])
    rows_table = table(("configuration", "trainable", "traced reserved, GB"), lines)
    return "\n\n".join([rows_table, *_not_traced(refused)])


def _not_traced(refused: Sequence[Refused]) -> list[str]:
    return ["Not traced:", table(("row", "why"), refused)] if refused else []


def part_versions(lengths: Sequence[Lengths]) -> str:
    """What the parts were traced with."""
    stack = (f"{name} {version(name).partition('+')[0]}" for name in LIBRARIES)
    return f"Traced with {', '.join(stack)}."


PARTS: dict[str, Callable[[Sequence[Lengths]], str]] = {
    "versions": part_versions,
    "t4": part_t4,
    "metamath": part_metamath,
    "unscored": part_unscored,
    "runs": part_runs,
}
BLOCK = re.compile(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", flags=re.DOTALL)


def page(*, lengths: Sequence[Lengths], parts: Sequence[str] = tuple(PARTS), other_peft: str | None = None) -> str:
    """The whole page; what is not among `parts` as it is written now."""
    written = dict(BLOCK.findall(OUTPUT.read_text(encoding="utf-8")))
    facts = dict(zip(("before", "longest", "second_before", "second_longest"), (*lengths[0], *lengths[-1]), strict=True))
    text = re.sub(r"\{(\w+)\}", lambda match: str(facts[match[1]]), TEMPLATE.read_text(encoding="utf-8"))
    made_anew = dict(PARTS)
    made_anew["metamath"] = partial(part_metamath, other_peft=other_peft)
    for name, write_part in made_anew.items():
        block = write_part(lengths) if name in parts else written[name]
        text = text.replace(f"<!-- {name} -->", f"<!-- {name} -->\n{block}\n<!-- end -->")
    return text


def _unscored(lengths: Lengths) -> tuple[list[tuple[str, ...]], list[Refused]]:
    lines: list[tuple[str, ...]] = []
    refused: list[Refused] = []
    for row in load_rows("peft_metamath_unscored.jsonl"):
        try:
            traced = metamath_trace({**BENCHMARK, **row}, lengths=lengths)
        except RefusedError as error:
            refused.append((row["experiment"], str(error)))
            continue
        reserved = replay(with_empty_cache(traced)).peaks.reserved
        lines.append((row["experiment"], f"{traced.num_trainable:,}", f"{reserved / 10**9:.2f}"))
    return lines, refused


def _figures(answer: Answer) -> Figures:
    return {one.figure: Figure(one.measured, one.stated) for one in answer.compared}


def _job(answer: Answer) -> tuple[str, ...]:
    run = answer.record.run
    shape = f"{run.options['batch_size']} × {run.options['seq_len']}"
    return answer.record.id, run.model_name.rpartition("/")[2], run.options["attn_implementation"], shape


def _t4_line(answer: Answer, figures: Figures) -> tuple[str, ...]:
    return *_job(answer), *(figures[name].cell(MIB, 1) if name in figures else "" for name in T4_FIGURES)


def _metamath_line(row: Row, figures: Figures) -> tuple[str, ...]:
    return row["experiment"], *(figure.cell(10**9, 2) for figure in figures.values())


def _lengths(text: str) -> Lengths:
    before, longest = map(int, text.split("/"))
    return before, longest


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", help="last two batches of peft's benchmark, as BEFORE/LONGEST")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="what to trace anew")
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT.relative_to(ROOT)}")
    parser.add_argument("--run", choices=[row["experiment"] for row in load_rows("peft_metamath.jsonl")], help="one run alone")
    parser.add_argument("--bytes", action="store_true", help="of that run the traced bytes by lengths, as JSON")
    parser.add_argument("--other-peft", metavar="PYTHON", help="an interpreter with the peft that ran, for OSF")
    args = parser.parse_args()
    lengths = [_lengths(text) for text in args.lengths] if args.lengths else LENGTHS
    with quiet_transformers():
        if args.run:
            (row,) = (row for row in load_rows("peft_metamath.jsonl") if row["experiment"] == args.run)
            other = args.other_peft if args.run in OTHER_CODE else None
            figures = by_other_peft(other, row, lengths=lengths) if other else metamath_figures(row, lengths=lengths)
            by_lengths = {head: figure.traced for head, figure in figures.items()}
            print(json.dumps(by_lengths) if args.bytes else "  ".join(_metamath_line(row, figures)))
            return
        text = page(lengths=lengths, parts=args.parts, other_peft=args.other_peft)
    if args.write:
        OUTPUT.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()

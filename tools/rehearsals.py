"""Rehearse the programs of tests/rehearse/programs and write what they showed.

    python -m tools.rehearsals [NAME ...]      prints a row of JSON per program
    python -m tools.rehearsals --write         also writes tests/rehearse/rehearsals.json and the table of docs/rehearse.md
    python -m tools.rehearsals --estimate      runs none, asks both engines again about what is kept, and writes both
    python -m tools.rehearsals --release       runs the plain loop, and writes what it held with the installed release of torch

Comments at the head of a program say its card (`# gpu:`), its launcher (`# launcher:`), its own arguments (`# arguments:`), the
exit code (`# exit:`), a model that has to lie in a folder as its config, a tokenizer and a checkpoint of holes (`# prepare:`;
`{folder}` in the arguments), packages beyond the common ones (`# needs:`; without them it is left out), and, where options can
say the job, those of `peftplan estimate` (`# estimate:`; `{file}` is the program itself). A second comment of a kind goes on with
the first. Needs the CUDA build of torch, trl and datasets.
"""

from __future__ import annotations

import json
import re
import resource
import shlex
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill
from typing import Any, NamedTuple
from unittest.mock import patch

from peftplan.cli import main as peftplan_main
from peftplan.rehearse import rehearse
from peftplan.rehearse.card import torch_version
from peftplan.rehearse.inside import standins
from peftplan.report import render
from peftplan.results.rehearsal import Rehearsal
from tools import marked

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "rehearse" / "programs"
DATA = PROGRAMS.parent / "rehearsals.json"
PAGE = ROOT / "docs" / "rehearse.md"
MARKS = ("<!-- programs -->", "<!-- end of programs -->")
RELEASES = PROGRAMS.parent / "releases.json"
OF_RELEASES = ("<!-- releases -->", "<!-- end of releases -->")
REPORT = ("<!-- out of memory -->", "<!-- end of the report -->")
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets")


class Program(NamedTuple):
    """One program: its file, what it is, and its comments."""

    path: Path
    title: str
    gpu: str
    launcher: tuple[str, ...]
    arguments: tuple[str, ...]
    prepare: tuple[str, ...]
    needs: tuple[str, ...]
    exit_code: int
    estimate: tuple[str, ...]

    def command(self, folder: str) -> tuple[str, ...]:
        """What is rehearsed."""
        arguments = [argument.format(folder=folder) for argument in self.arguments]
        return (*(self.launcher or (sys.executable,)), str(self.path.relative_to(ROOT)), *arguments)

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.needs if _version(name) is None]


def programs() -> list[Program]:
    """Every program, by name."""
    return [read(path) for path in sorted(PROGRAMS.iterdir()) if path.suffix in (".py", ".yaml", ".yml")]


def read(path: Path) -> Program:
    """A program's docstring, or a config's first line, and comments."""
    text = path.read_text(encoding="utf-8")
    header: dict[str, str] = {}
    for name, words in re.findall(r"^# (gpu|launcher|arguments|prepare|needs|exit|estimate): (.+)$", text, re.MULTILINE):
        header[name] = f"{header[name]} {words}" if name in header else words
    title = text.partition('"""')[2].partition('"""')[0] if path.suffix == ".py" else text.partition("\n")[0].removeprefix("# ")
    split = {name: tuple(shlex.split(header.get(name, ""))) for name in ("launcher", "arguments", "prepare", "needs", "estimate")}
    return Program(path, title, header["gpu"], exit_code=int(header.get("exit", "0")), **split)


def estimated(program: Program, engine: str = "analytic") -> dict[str, int] | None:
    """The peaks that an engine states for the same job, of several ranks for the first, which was rehearsed; None where it cannot
    say it."""
    if not program.estimate:
        return None
    options = [option.format(file=program.path) for option in program.estimate]
    output = StringIO()
    with redirect_stdout(output), redirect_stderr(StringIO()), suppress(SystemExit):
        peftplan_main(["estimate", *options, "--gpu", program.gpu, "--engine", engine, "--format", "json"])
    document = json.loads(output.getvalue() or "{}")
    groups = (document.get("distributed") or {}).get("ranks", ())
    memory = next((group for group in groups if group["ranks"]["first"] == 0 and group["peak_allocated"]), document.get("memory"))
    if memory is None or memory["peak_allocated"] is None:
        return None
    return {"allocated": memory["peak_allocated"], "reserved": memory["peak_reserved"]}


def run(program: Program) -> dict[str, Any]:
    """One row: what the rehearsal showed, beside what the formulas say."""
    with TemporaryDirectory() as folder:
        for model in program.prepare:
            standins.write_repository(Path(folder), model)
            (Path(folder) / "tokenizer.model").write_text("\n".join(byte_tokens()), encoding="ascii")
        before = processor_seconds()
        result = rehearse(program.command(folder), gpu=program.gpu, timeout=900, stdout=sys.stderr.fileno())
    rank = result.largest_rank
    failed = result.oom
    report = {"report": printed(result)} if failed else {}
    return {
        "program": program.path.stem,
        "title": program.title,
        "gpu": program.gpu,
        "launcher": " ".join((*program.launcher, *program.arguments)) or None,
        "ended": result.ended,
        "exit_code": result.exit_code,
        "steps": result.steps,
        "peak_allocated": rank.peak_allocated if rank else None,
        "peak_reserved": rank.peak_reserved if rank else None,
        "verdict": result.gpus[0].verdict if result.gpus else None,
        **report,
        "oom": f"{failed.phase} of step {failed.step}: {failed.requested_bytes:,} bytes" if failed else None,
        "seconds": result.seconds,
        "processor_seconds": round(processor_seconds() - before, 1),
        "estimated": estimated(program),
        "traced": estimated(program, "trace"),
        "host": dict(rank.host) if rank else {},
        "versions": {name: release for name in (*LIBRARIES, *program.needs) if (release := _version(name)) is not None},
    }


def processor_seconds() -> float:
    """What all processes that were started from here and have ended took of the processor."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def printed(result: Rehearsal) -> str:
    """What `peftplan rehearse` prints on a screen of 100 columns."""
    output = StringIO()
    with redirect_stdout(output), patch.dict("os.environ", COLUMNS="100"):
        render.rehearsal(result, fmt="table")
    return output.getvalue().replace(sys.executable, "python").strip()


def byte_tokens(size: int = 128_000) -> Iterator[str]:
    """A vocabulary in tiktoken's format that makes one token of a byte."""
    for rank in range(size):
        token = rank.to_bytes(1 if rank < 256 else 4, "big")
        yield f"{b64encode(token).decode('ascii')} {rank}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, and the versions that ran."""
    lines = [
        "| program | card | steps | allocated | reserved | verdict | processor | formulas | trace |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        title = row["title"].rstrip(".") + (f" (`{row['launcher']}`)" if row["launcher"] else "")
        out = f"{row['verdict']}, in {row['oom']}" if row["oom"] else row["verdict"]
        peaks = (f"{row['peak_allocated'] or 0:,}", f"{row['peak_reserved'] or 0:,}")
        ours = (drift(row, "estimated"), drift(row, "traced"))
        taken = "–" if row["processor_seconds"] is None else f"{row['processor_seconds']:.0f} s"
        lines.append(_row((title, row["gpu"], str(row["steps"]), *peaks, out, taken, *ours)))
    return "\n".join([*lines, "", fill(versions(rows), 130, break_long_words=False, break_on_hyphens=False)])


def drift(row: dict[str, Any], engine: str) -> str:
    """Signed per cent of an engine against the rehearsal; where memory ran out, the bytes that the engine says are needed."""
    stated = row[engine]
    if not stated:
        return "–"
    if row["oom"]:
        return f"reserves {stated['reserved']:,}"
    apart = [100 * (stated[figure] / row[f"peak_{figure}"] - 1) for figure in ("allocated", "reserved")]
    return f"{apart[0]:+.4f} % / {apart[1]:+.2f} %"


def versions(rows: list[dict[str, Any]]) -> str:
    """What most programs ran with, and what others had."""
    common = Counter(tuple((name, row["versions"][name]) for name in LIBRARIES) for row in rows).most_common(1)[0][0]
    others = []
    for row in rows:
        own = [f"{name} {release}" for name, release in row["versions"].items() if (name, release) not in common]
        others += [f"`{row['program']}`: {', '.join(own)}"] if own else []
    most = ", ".join(f"{name} {release}" for name, release in common)
    return f"They ran with {most}. Beside or in place of these: {'; '.join(others)}."


def report_of(rows: list[dict[str, Any]]) -> str:
    """The report of the program that runs out of memory, as a block of Markdown."""
    report = next(row["report"] for row in rows if row["oom"])
    return f"<!-- not run: it needs the CUDA build of torch -->\n```text\n{report}\n```"


def write_release() -> None:
    """Rehearse the plain loop with the torch that is installed, and keep its peaks beside those of other releases."""
    release, cuda = torch_version()
    row = run(read(PROGRAMS / "plain.py"))
    kept = {each["torch"]: each for each in json.loads(RELEASES.read_text(encoding="utf-8"))} if RELEASES.exists() else {}
    torch = release.partition("+")[0]
    kept[torch] = {"torch": torch, "cuda": cuda, **{peak: row[peak] for peak in ("peak_allocated", "peak_reserved")}}
    rows = sorted(kept.values(), key=lambda each: tuple(map(int, each["torch"].split("."))))
    RELEASES.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    marked.write(PAGE, OF_RELEASES, table_of_releases(rows))


def table_of_releases(rows: list[dict[str, Any]]) -> str:
    """What the plain loop held, by release of torch."""
    lines = ["| torch | CUDA | allocated | reserved |", "| --- | --- | --- | --- |"]
    lines += [_row((row["torch"], row["cuda"], f"{row['peak_allocated']:,}", f"{row['peak_reserved']:,}")) for row in rows]
    return "\n".join(lines)


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def write(rows: list[dict[str, Any]]) -> None:
    """Keep the rows in place of those of the same programs, and put the table between the page's marks."""
    earlier = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else []
    by_name = {row["program"]: row for row in [*earlier, *rows]}
    rows = [by_name[program.path.stem] for program in programs() if program.path.stem in by_name]
    DATA.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    marked.write(PAGE, MARKS, table(rows))
    marked.write(PAGE, REPORT, report_of(rows))


def main(arguments: list[str]) -> None:
    """Run the named programs, or all; `--estimate`: run none, and ask the engines again; `--release`: the plain loop."""
    if "--estimate" in arguments:
        by_name = {program.path.stem: program for program in programs()}
        recorded = json.loads(DATA.read_text(encoding="utf-8"))
        ours = [(by_name[row["program"]], row) for row in recorded]
        write([row | {"estimated": estimated(program), "traced": estimated(program, "trace")} for program, row in ours])
        return
    if "--release" in arguments:
        write_release()
        return
    names = [argument for argument in arguments if not argument.startswith("-")]
    rows = []
    for program in programs():
        if (not names or program.path.stem in names) and not program.missing:
            rows.append(run(program))
            print(json.dumps(rows[-1]), flush=True)
    if "--write" in arguments:
        write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])

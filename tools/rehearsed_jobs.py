"""Rehearse jobs that are spelled in the options of `peftplan estimate`, and compare formulas and trace with them.

    python -m tools.rehearsed_jobs --seed 1 --jobs 60 --output FILE        draws jobs on one card
    python -m tools.rehearsed_jobs --jobs-from FILE --output FILE          a job per line: MODEL and options
    python -m tools.rehearsed_jobs --compare FILE [--trace] [--page PAGE]  evaluates formulas, and kept traces, against what was
                                                                           kept; --trace traces again, and keeps that in FILE

`--called` is what the jobs of a page have in common, if they are not drawn: "preferences and rewards", "recipes of torchtune".

FILE holds a row of JSON per job: its options and what it held. A job that FILE has is not run again. MODEL may be a folder with
a config, which the row keeps (`tools.drawn_ranks`). `tools.rehearsed_program`
is the program; of several GPUs it plays rank 0. Needs the CUDA build of torch, transformers, peft, trl and datasets.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peftplan.cli.rehearse import job_of
from peftplan.errors import PeftplanError
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.job.trainers import DEFAULT, TRAINERS
from peftplan.planning.estimate import estimate
from peftplan.rehearse import rehearse
from tools.rank_grid import AUTO

PROGRAM = Path(__file__).with_name("rehearsed_program.py")
MODELS = (
    *("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "smollm2-135m", "smollm2-360m", "gemma-3-270m"),
    *("pythia-160m", "pythia-410m", "gpt2", "opt-125m", "bloom-560m", "tinyllama-1.1b-chat-v1.0", "olmo-1b"),
)
LOOP = Script(outputs_outlive_step=True)
"""What the program's loop does: its variable holds the outputs until the next forward has returned."""
OF_THE_LOOP = "In a plain loop, a variable keeps the outputs until the next forward returns; the engines assume the same. "
PROGRAMS = "as a program of transformers, TRL or torch alone on the emulated card (`tools/rehearsed_jobs.py`)"
RECIPES = "recipes of torchtune"
RAN = {
    RECIPES: "on the emulated card (`tools/rehearsed_recipes.py`)",
    "preferences and rewards": "as a program of TRL, axolotl, LLaMA-Factory or ms-swift on the emulated card "
    "(`tools/rehearsed_jobs.py`), or as a recipe of torchtune (`tools/rehearsed_recipes.py`)",
}
"""What jobs have in common → how they ran, where not as `PROGRAMS`."""
UNLIKE = ("fsdp1", "zero1", "zero2")
"""Strategies whose ranks may hold unlike parts."""
PHASES = ("load", "forward", "backward", "step")
OF_LAUNCHER = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""What the command lines of axolotl and torchtune, and LLaMA-Factory v1's launcher, set for the processes that they start."""
STEPS = {"schedule_free_radam": 7}
"""Optimizer → steps until one is as all later ones, if more than 3: RAdam divides by a root from the fifth one on, where ρ is
above 4 (schedulefree 1.4.1, radam_schedulefree.py)."""


def drawn(seed: int, number: int) -> str:
    """One job on one card."""
    draw = random.Random(f"{seed} {number}")
    trainer = draw.choice(("transformers", "transformers", "trl", "plain"))
    method = draw.choice(("full", "lora", "lora", "qlora"))
    words = [draw.choice(MODELS), "--trainer", trainer, "--method", method]
    words += ["--batch-size", str(draw.choice((1, 2, 3, 4))), "--seq-len", str(draw.choice((128, 256, 384, 512, 1024)))]
    if method != "full":
        words += ["--r", str(draw.choice((4, 8, 16, 64)))]
        words += ["--use-dora"] if draw.random() < 0.2 else []
    if draw.random() < 0.5:
        words += [draw.choice(("--gradient-checkpointing", "--no-gradient-checkpointing"))]
    if draw.random() < 0.3:
        words += ["--gradient-accumulation-steps", "2"]
    if trainer != "plain" and draw.random() < 0.4:
        words += ["--optim", draw.choice(("adamw_torch", "adafactor", "sgd", "adamw_8bit", "lion_32bit"))]
    if draw.random() < 0.2:
        words += ["--attn-implementation", "eager"]
    return shlex.join(words)


def run(job: str, *, timeout: float) -> dict[str, Any]:
    """One row: what the job held, by rank."""
    words = shlex.split(job)
    gpus, nodes = (int(words[words.index(option) + 1]) if option in words else 1 for option in ("--gpus", "--nodes"))
    trainer = words[words.index("--trainer") + 1] if "--trainer" in words else DEFAULT
    with patch.dict(os.environ, OF_LAUNCHER if TRAINERS[trainer].expandable_segments else {}):
        result = rehearse(
            [sys.executable, str(PROGRAM), *program_words(words)],
            world_size=gpus * nodes,
            steps=STEPS.get(words[words.index("--optim") + 1], 3) if "--optim" in words else 3,
            timeout=timeout,
            stdout=sys.stderr.fileno(),
        )
    rank = result.largest_rank
    row: dict[str, Any] = {"job": titled(job), "ended": result.ended, "seconds": result.seconds}
    if (config := Path(words[0]) / "config.json").exists():
        row["model_config"] = json.loads(config.read_bytes())
    if rank is not None and (result.ended == "steps" or not result.program_exit):  # LOMO takes no steps
        row |= {
            "allocated": rank.peak_allocated,
            "reserved": rank.peak_reserved,
            "by_phase": dict(rank.peak_by_phase),
            "reserved_by_phase": dict(rank.reserved_by_phase),
            "host": dict(rank.host),
        }
    return row


def titled(job: str) -> str:
    """The job, with the name of a folder in place of its path."""
    words = shlex.split(job)
    return shlex.join([Path(words[0]).name, *words[1:]]) if Path(words[0]).is_dir() else job


def program_words(words: list[str]) -> list[str]:
    """The program loads a model by its Hub id."""
    from peftplan.arch import catalogue

    model = catalogue.find(words[0])
    return [words[0] if model is None else model.repo_id, *words[1:]]


def rehearsed(jobs: Iterable[str], output: Path, *, timeout: float) -> None:
    """Run the jobs that the file has not, and add their rows."""
    known = {row["job"] for row in read(output)}
    for job in jobs:
        if titled(job) not in known:
            known.add(titled(job))
            row = run(job, timeout=timeout)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows that were kept."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def estimated(row: dict[str, Any], engine: str) -> dict[str, Any]:
    """The same job's peaks by an engine of ours, of unlike ranks those of rank 0, or `error`. `options` of a row are those that
    launch files alone set, `model_config` the config of a model without a name."""
    try:
        model, options = job_of(row["job"])
        options = {**options, **row.get("options", {})}
        if not options.get("strategy") and not str(options.get("trainer")).startswith(("axolotl", "swift")):
            options.setdefault("device_map", "none")  # the program passes a model that it has loaded on the host
        if options.get("strategy") == "zero3":
            options = {**AUTO, **options}
        model = row.get("model_config", model)
        result = estimate(model, engine=engine, script=LOOP if options.get("trainer") == "plain" else NO_SCRIPT, **options)
    except PeftplanError as error:
        return {"error": str(error)}
    if result.peaks is None:
        return {"error": result.not_modelled[0]}
    written = result.to_dict()
    generates = TRAINERS[options.get("trainer", "transformers")].generates
    unlike = options.get("strategy") in UNLIKE
    memory = written["distributed"]["ranks"][0] if unlike else written["memory"]
    phases = memory["peak_by_phase"]
    generated, evaluated = phases.pop("generate", None), phases.pop("evaluate", 0)
    phases["step"] = max(phases["step"], evaluated)  # which a rehearsal counts into the step
    if generates:  # a rehearsal counts it into loading, and the step before
        phases |= {"load": None, "step": None if generated is None else max(phases["step"], generated)}
    return {"allocated": memory["peak_allocated"], "reserved": memory["peak_reserved"], "by_phase": phases}


def drifts(row: dict[str, Any], engine: str) -> dict[str, float] | None:
    """What → signed per cent of an engine's number against the rehearsal's; None where one has no number."""
    of_engine = row["traced"] if engine == "trace" else estimated(row, engine)
    if "allocated" not in row or of_engine.get("allocated") is None:
        return None
    pairs = {what: (of_engine[what], row[what]) for what in ("allocated", "reserved")}
    pairs |= {phase: (of_engine["by_phase"].get(phase), row["by_phase"].get(phase)) for phase in PHASES}
    return {what: 100 * (ours / theirs - 1) for what, (ours, theirs) in pairs.items() if ours and theirs}


def engines(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The engines that have something to say of these rows."""
    return ("analytic", "trace") if all("traced" in row for row in rows) else ("analytic",)


def compared(rows: list[dict[str, Any]], of: Iterable[str]) -> Iterator[tuple[str, dict[str, Any], dict[str, float] | None]]:
    """(engine, row, drifts) of each job."""
    for engine in of:
        for row in rows:
            yield engine, row, drifts(row, engine)


def page(results: list[tuple[str, dict[str, Any], dict[str, float] | None]], *, called: str = "") -> str:
    """The drift of each engine, then each job. `called`: what the jobs have in common, if they are not drawn at random."""
    lines = [
        f"# Drift against rehearsals{': ' if called else ''}{called}",
        "",
        f"{'Each job ran' if called else 'Random jobs on one card, each run'} {RAN.get(called, PROGRAMS)}. "
        f"{'' if called else OF_THE_LOOP}"
        "Drift is the engine's number ÷ the rehearsal's − 1, in percent.",
        "",
        "| engine | what | jobs | median absolute | lowest | highest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    columns = list(dict.fromkeys(engine for engine, _, _ in results))
    for engine in columns:
        for what in ("allocated", "reserved", *PHASES):
            values = [drift[what] for name, _, drift in results if name == engine and drift is not None and what in drift]
            if values:
                cells = (f"{statistics.median(map(abs, values)):.4f} %", f"{min(values):+.4f} %", f"{max(values):+.4f} %")
                lines.append(f"| {engine} | {what} | {len(values)} | {' | '.join(cells)} |")
    lines += ["", "## Jobs", "", "| job | " + " | ".join(f"{e} allocated / reserved" for e in columns) + " |"]
    lines += ["| --- |" + " --- |" * len(columns)]
    for job in dict.fromkeys(_spelled(row) for _, row, _ in results):
        by_engine = {engine: drift for engine, row, drift in results if _spelled(row) == job}
        lines.append(f"| `{job}` | " + " | ".join(_cell(by_engine.get(engine)) for engine in columns) + " |")
    return "\n".join(lines) + "\n"


def _spelled(row: dict[str, Any]) -> str:
    options = (
        f"{name}: {', '.join(value) if isinstance(value, list) else value}" for name, value in row.get("options", {}).items()
    )
    return "; ".join((str(row["job"]), *options))


def _cell(drift: dict[str, float] | None) -> str:
    if drift is None:
        return "–"
    reserved = f"{drift['reserved']:+.3f} %" if "reserved" in drift else "not stated"
    return f"{drift['allocated']:+.4f} % / {reserved}"


def main(arguments: list[str]) -> None:
    """Rehearse, or compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--jobs-from", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--called", default="")
    options = parser.parse_args(arguments)
    if options.output:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        jobs = options.jobs_from.read_text(encoding="utf-8").splitlines() if options.jobs_from else ()
        rehearsed([*jobs, *(drawn(options.seed, n) for n in range(options.jobs))], options.output, timeout=options.timeout)
    if options.compare:
        rows = read(options.compare)
        if options.trace:
            rows = [{**row, "traced": estimated(row, "trace")} for row in rows]
            options.compare.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        results = list(compared(rows, engines(rows)))
        for engine, row, drift in results:
            print(json.dumps({"engine": engine, "job": row["job"], "drift": drift}))
        if options.page:
            options.page.write_text(page(results, called=options.called), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

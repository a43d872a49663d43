"""Rehearse one rank of jobs over several GPUs, and compare the formulas with torch's own allocator.

    python -m tools.rank_jobs --run [NAME ...]     rehearses jobs that have no row yet, with --one the next of them (needs the
                                                   CUDA build of torch); exits 1 where there is none
    python -m tools.rank_jobs --run --late [NAME ...]  the same of FSDP1, on a card as late as the program lets it be
    python -m tools.rank_jobs                      compares, and writes the table of docs/rank-drift.md

Each job of tools/rank_grid.py runs tests/distributed/programs/trainer.py, transformers' Trainer on a small Llama, or a built-in
model through tools/rehearsed_program.py. Rows lie in tests/distributed/rank_jobs.jsonl. tools/rank_traces.py traces
the same jobs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import peftplan
from peftplan.analytic.engine import analytic_peaks
from peftplan.analytic.instant import InstantPeaks
from peftplan.analytic.of_ranks import OfRanks
from peftplan.job.inventory import on_rank
from peftplan.versions import READ_IN
from tools.rank_grid import AUTO, LLAMA, cut, jobs
from tools.rehearsed_jobs import program_words

if TYPE_CHECKING:
    from peftplan.results.estimate import Estimate

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "distributed" / "programs" / "trainer.py"
BUILT_IN = ROOT / "tools" / "rehearsed_program.py"
ROWS = ROOT / "tests" / "distributed" / "rank_jobs.jsonl"
KEPT = ROWS.with_name("rank_traces.jsonl")
LATE = ROWS.with_name("late_jobs.jsonl")
"""Rows of jobs on a card as late as the program lets it be (rehearse/card.c, "Time")."""
PAGE = ROOT / "docs" / "rank-drift.md"
MARKS = ("<!-- rank jobs -->", "<!-- end of rank jobs -->")
CARD = "h200"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed")
PHASES = ("load", "forward", "backward", "step")
Shares = list[dict[str, float]]
"""What `compared` or `compared_trace` returns, of each job."""


def options(row: dict[str, Any]) -> dict[str, Any]:
    """The job as `peftplan.estimate` takes it."""
    program = row["program"]
    if "model" in row:
        rank = {} if program["method"] == "full" else {"r": program["r"]}
        others = {name: value for name, value in program.items() if name != "r"}
        shared = {
            "gpus": row["world"],
            "strategy": row["strategy"],
            **({} if row["strategy"] == "zero0" else {"overlap_comm": True}),
        }
        return {"model": row["model"], **others, **rank, **shared, **(AUTO if row["strategy"] == "zero3" else {})}
    ours = {
        "method": program["method"],
        "gpus": row["world"],
        **({"deepspeed": config} if (config := program.get("arguments", {}).get("deepspeed")) else {"strategy": row["strategy"]}),
        "seq_len": program.get("seq_len", 512),
        "batch_size": program.get("batch_size", 1),
        "gradient_accumulation_steps": program.get("accumulation", 1),
        "gradient_checkpointing": program.get("checkpointing", True),
        "optim": program.get("optim", "adamw_torch_fused"),
        **({} if program["method"] == "full" else {"r": program.get("r", 16)}),
        **({"target_modules": targets} if (targets := program.get("target_modules")) else {}),
        **{name: program[name] for name in ("loss", "kernels", "use_reentrant") if name in program},
        **({"autocast": program["autocast"]} if "autocast" in program else {}),
        **({"dtype": "fp16"} if program.get("autocast") == "fp16" else {}),
        **{name: size for name, size in program.get("parallel", {}).items() if name in ("dp_shard_size", "cp_size", "sp_size")},
        **({"reduce_dtype": "fp32"} if "policy" in program else {}),
        **row["fsdp"],
        **({"script": peftplan.Script(transformers=row["transformers"])} if "transformers" in row else {}),
        **({"accelerate": row["accelerate"]} if "accelerate" in row else {}),
        **program.get("ddp", {}),
        **({"find_unused_parameters": False} if "ddp_find_unused_parameters" in program.get("arguments", {}) else {}),
        **({"zero3_init": False} if row["strategy"] == "zero3" else {}),  # the program makes its model first
    }
    if program["method"] == "qlora":
        tied = {"tie_word_embeddings": True}
        storage = {"bfloat16": "bf16"}.get(program.get("quant_storage", "bfloat16"), "uint8")
        model = cut(program["model"], program["layers"]) if "model" in program else LLAMA | tied
        where = {"device_map": program["device_map"]} if program.get("device_map") == "cpu" else {}
        return {"model": model, **ours, "quant_storage": storage, "kbit_prepare": "kbit" in program, **where}
    if "model" in program:
        return {"model": cut(program["model"], program["layers"]), **ours}
    return {"model": llama(program), **ours}


def llama(program: dict[str, Any]) -> dict[str, Any]:
    """The config of a job that names no model."""
    return LLAMA | program.get("config", {})


def run(names: list[str], *, most: int | None, late: bool = False) -> int:
    """Rehearse up to this many jobs without a row; returns how many. `late`: on a late card, under FSDP1."""
    from peftplan.rehearse import rehearse

    if late:
        os.environ["EMULATED_LATE"] = "1"
    file = LATE if late else ROWS
    recorded = {row["name"] for row in rows(file)}
    count = 0
    for each in jobs():
        if late and each["strategy"] != "fsdp1":
            continue
        if each["name"] in recorded or (names and not any(name in each["name"] for name in names)):
            continue
        if not version("transformers").startswith(each.get("transformers", "")):
            continue
        if not version("accelerate").startswith(each.get("accelerate", READ_IN["accelerate"])):
            continue
        if most is not None and count == most:
            break
        count += 1
        result = rehearse(
            command(each),
            gpu=f"{each['fsdp'].get('dp_shard_size', each['world'])}x{CARD}",
            world_size=1 if each["strategy"] == "device-map" else each["world"],
            rank=each.setdefault("rank", largest_rank(each)),
            steps=4 if each["strategy"] == "zero0" else 3,  # DeepSpeed's optimizer takes one as it is made
            timeout=600,
            stdout=os.open(os.devnull, os.O_WRONLY),
        )
        rank = result.largest_rank
        complete = rank is not None and set(PHASES) <= rank.peak_by_phase.keys()
        measured = (
            {"peak_by_phase": rank.peak_by_phase, "peak_reserved": rank.peak_reserved}
            if rank is not None and complete
            else {"error": result.ended}
        )
        if each["strategy"] == "device-map":
            of_devices = sorted(result.ranks, key=lambda rank: rank.device)
            measured["devices"] = [{"peak_by_phase": r.peak_by_phase, "peak_reserved": r.peak_reserved} for r in of_devices]
        with file.open("a", encoding="utf-8") as lines:
            lines.write(
                json.dumps({**each, **measured, "seconds": result.seconds, "versions": {n: version(n) for n in LIBRARIES}}) + "\n"
            )
        print(each["name"], measured, file=sys.stderr, flush=True)
    return count


def command(row: dict[str, Any]) -> tuple[str, ...]:
    """The program of a job, with what it is told."""
    if "model" not in row:
        program = row["program"]
        model = {"model": program_words([program["model"]])[0]} if "model" in program else {"config": llama(program)}
        told = (str(PROGRAM), json.dumps(program | model))
        if row["strategy"] == "fsdp1" and (cards := row["fsdp"].get("dp_shard_size")):
            nodes = ("--nnodes", str(row["world"] // cards), "--nproc-per-node", str(cards))  # torch shards within a node
            return ("env", "FSDP_SHARDING_STRATEGY=HYBRID_SHARD", "torchrun", *nodes, *told)
        return (sys.executable, *told)
    words = [word for name, value in row["program"].items() for word in spelled(name, value)]
    where = ["--strategy", row["strategy"], "--gpus", str(row["world"])]
    return (sys.executable, str(BUILT_IN), *program_words([row["model"], *words, *where]))


def spelled(name: str, value: object) -> tuple[str, ...]:
    """An option of the program."""
    option = name.replace("_", "-")
    return (f"--{option}" if value else f"--no-{option}",) if isinstance(value, bool) else (f"--{option}", str(value))


def largest_rank(row: dict[str, Any]) -> int:
    """The rank that the formulas count; the first one where the program quantizes before it knows its device."""
    if row["strategy"] not in ("zero1", "zero2") or row["program"]["method"] == "qlora":
        return 0
    peaks = peftplan.estimate(**options(row)).peaks
    return peaks.largest_ranks[0] if isinstance(peaks, OfRanks) else 0


def on_rehearsed_rank(peaks: OfRanks, rank: int) -> InstantPeaks:
    """The peaks of one rank, whether it needs most or not."""
    return peaks.of(rank) or analytic_peaks(on_rank(peaks.inventory, rank), compute_capability=peaks.compute_capability)


def rows(file: Path = ROWS) -> list[dict[str, Any]]:
    """What was rehearsed."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def kept_traces() -> dict[str, dict[str, Any]]:
    """Name of a job → the peaks of its trace."""
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    return {row.pop("name"): row for row in map(json.loads, lines)}


def compared(row: dict[str, Any]) -> dict[str, float] | None:
    """Signed difference of each phase and of reserved bytes that are stated, as a share of the rehearsal's; None without a peak
    by formula."""
    result = peftplan.estimate(**options(row), gpu=CARD)
    peaks = result.peaks
    if peaks is None:
        return None
    if "devices" in row:
        return _of_devices(result, row)
    if isinstance(peaks, OfRanks):
        peaks = on_rehearsed_rank(peaks, row.get("rank", 0))
    shares = {phase: peaks.by_phase[phase] / row["peak_by_phase"][phase] - 1 for phase in PHASES}
    return shares if peaks.reserved is None else {**shares, "reserved": peaks.reserved / row["peak_reserved"] - 1}


def _of_devices(result: Estimate, row: dict[str, Any]) -> dict[str, float]:
    """Of a `device_map`, the difference of the GPU on which it is largest. The first GPU's forward begins with its gradients."""
    assert result.distributed is not None
    each: list[dict[str, float]] = []
    for group, rehearsed in zip(result.distributed.ranks, row["devices"], strict=False):
        assert group.peaks is not None
        shares = {phase: group.peaks.by_phase[phase] / rehearsed["peak_by_phase"][phase] - 1 for phase in PHASES}
        reserved = group.peaks.reserved
        each.append(shares if reserved is None else {**shares, "reserved": reserved / rehearsed["peak_reserved"] - 1})
    return {what: max((shares[what] for shares in each), key=abs) for what in each[0]}


def compared_trace(row: dict[str, Any], traced: dict[str, Any]) -> dict[str, float]:
    """Signed difference of each phase and of reserved bytes that are stated, of a trace, as a share of the rehearsal's."""
    if "devices" in row:
        pairs = zip(traced["devices"], row["devices"], strict=True)
        each = [compared_trace(rehearsed, own) for own, rehearsed in pairs]
        return {what: max((shares[what] for shares in each), key=abs) for what in each[0]}
    shares = {phase: traced["peak_by_phase"][phase] / row["peak_by_phase"][phase] - 1 for phase in PHASES}
    reserved = traced["peak_reserved"]
    return shares if reserved is None else {**shares, "reserved": reserved / row["peak_reserved"] - 1}


def table() -> tuple[list[str], str]:
    """The comparison as Markdown, and its summary: a row for all jobs, then one per strategy, by both engines."""
    lines = [
        "| job | load | forward | backward | step | reserved | trace allocated | trace reserved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    every: dict[str, dict[str, Shares]] = {"estimated": {}, "traced": {}}  # engine → strategy → its jobs
    kept = kept_traces()
    for row in rows():
        if "error" in row:
            continue
        name = row["name"]
        estimated = compared(row)
        traced = compared_trace(row, kept[name]) if name in kept else None
        known = {} if estimated is None else estimated
        cells = [_percent(known[what]) if what in known else "–" for what in (*PHASES, "reserved")]
        cells += ["–" if traced is None else _percent(_allocated(traced))]
        cells += [_percent(traced["reserved"]) if traced and "reserved" in traced else "–"]
        lines.append(f"| {_without_json_marks(name)} | {' | '.join(cells)} |")
        for engine, shares in (("estimated", estimated), ("traced", traced)):
            if shares is not None:
                every[engine].setdefault(row["strategy"], []).append(shares)
    totals = {engine: [*chain.from_iterable(by_strategy.values())] for engine, by_strategy in every.items()}
    engines = "".join(f" {what} jobs | allocated: median | worst | reserved: median | worst |" for what in every)
    summary = [f"| strategy |{engines}", f"| --- |{' ---: |' * 5 * len(every)}", _line("all", [*totals.values()])]
    for strategy in every["estimated"]:
        summary.append(_line(strategy, [of_engine.get(strategy, []) for of_engine in every.values()]))
    return lines, "\n".join(summary)


def _allocated(shares: dict[str, float]) -> float:
    """The difference of the phase where it is largest."""
    return max((shares[phase] for phase in PHASES), key=abs)


def _percent(share: float) -> str:
    return f"{round(100 * share, 4) + 0.0:+.4f} %"  # no negative zero


def _line(strategy: str, by_engine: list[Shares]) -> str:
    """For each engine the number of jobs, median and worst of all their phases, and of reserved bytes."""
    cells = [strategy]
    for of_jobs in by_engine:
        allocated = [shares[phase] for shares in of_jobs for phase in PHASES]
        reserved = [shares["reserved"] for shares in of_jobs if "reserved" in shares]
        cells += [str(len(of_jobs)), *_median_and_worst(allocated), *_median_and_worst(reserved)]
    return f"| {' | '.join(cells)} |"


def _median_and_worst(values: list[float]) -> tuple[str, str]:
    return (f"{100 * median(map(abs, values)):.4f} %", _percent(max(values, key=abs))) if values else ("–", "–")


def _without_json_marks(name: str) -> str:
    """A job's name without the marks of JSON, and without the class that follows from the model type."""
    return re.sub(r', "architectures": \[[^]]*\]', "", name).translate(str.maketrans("", "", '{}"'))


def write() -> None:
    """Put the table into the page."""
    lines, summary = table()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text("\n\n".join([f"{before}{MARKS[0]}", summary, "\n".join(lines), f"{MARKS[1]}{after}"]), encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    if "--run" in sys.argv:
        names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
        sys.exit(not run(names, most=1 if "--one" in sys.argv else None, late="--late" in sys.argv))
    else:
        write()

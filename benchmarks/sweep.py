"""A sweep of a million points against its bars, and against estimates of its points one by one.

    OMP_NUM_THREADS=1 python benchmarks/sweep.py [--points 1000000] [--sample 500]

First the bytes that tensors request at batch × sequence × rank, as arrays; then those at world size × batch × sequence under each
strategy that shards or replicates, each in a process of its own; then `peftplan sweep` of the first grid to a CSV file, in a
process of its own, with a card; then a sample of its rows against direct estimates: requested bytes everywhere, verdicts
where they are stated. Times are the processor's, so that other programs on the machine count less; with more threads,
those of BLAS that wait would count too.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

import numpy as np

import peftplan
from peftplan.analytic.sized import Points, Sized
from peftplan.planning.sweep_grid import counted

MODEL, METHOD, CARD = "llama-3.1-8b", "qlora", "a100-80gb"
LENGTHS = 1000
RANKS = 100
STRATEGIES = ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
METHODS = ("lora", "full")
WORLDS = tuple(2**n for n in range(1, 11))
ARRAYS_BAR_S, WORLDS_BAR_S, ROWS_BAR_S, MEMORY_BAR_GIB = 1.0, 2.0, 20.0, 1.0


def arrays(points: int) -> float:
    """Processor seconds for the requested bytes of so many points."""
    axes = (np.arange(1, points // (LENGTHS * RANKS) + 1), np.arange(8, 8 * LENGTHS + 8, 8), np.arange(1, RANKS + 1))
    grid = Points(*(axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")))
    peftplan.estimate(MODEL, method=METHOD)  # the architecture is cached, as in any second estimate of a process
    start = time.process_time()
    sized = Sized(lambda rank: counted(MODEL, method=METHOD, r=rank), range(1, RANKS + 1), compute_capability="8.0")
    sized.requested(grid)
    return time.process_time() - start


def over_worlds(points: int, strategy: str, method: str) -> float:
    """Processor seconds for the requested bytes of so many points of a process's first job, without its imports."""
    axes = (np.arange(1, points // (LENGTHS * len(WORLDS)) + 1), np.arange(8, 8 * LENGTHS + 8, 8))
    grid = Points(*(axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")))
    start = time.process_time()
    for world in WORLDS:
        options = {"method": method, "gpus": world, "strategy": strategy}
        sized = Sized(lambda rank, options=options: counted(MODEL, **options), (), compute_capability="8.0")
        sized.requested(grid)
    return time.process_time() - start


def apart(points: int, strategy: str, method: str) -> float:
    """The same in a process of its own, bytecode cached as pip installs it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, __file__, "--strategy", strategy, "--method", method, "--points"]
    for few_or_all in (LENGTHS * len(WORLDS), points):  # the first writes the bytecode
        process = subprocess.run([*command, str(few_or_all)], check=True, capture_output=True, text=True, env=environment)
    return float(process.stdout)


def rows(points: int, output: Path) -> tuple[float, float, str]:
    """Processor seconds and GiB of a sweep to a file, and what it says on stderr."""
    batches, lengths = points // (LENGTHS * RANKS), f"8:{8 * LENGTHS}:8"
    grid = ["--batch-size", f"1:{batches}", "--seq-len", lengths, "--r", f"1:{RANKS}", "--method", METHOD, "--gpu", CARD]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = subprocess.run(
        [sys.executable, "-m", "peftplan", "sweep", MODEL, *grid, "--replays", "500", "--output", str(output)],
        check=True, capture_output=True, text=True,
    ).stderr  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, after.ru_maxrss / 2**20, summary.strip()


def differences(output: Path, points: int, sample: int) -> list[str]:
    """What direct estimates of a sample say otherwise; half of the sample are points with a replay or without a verdict."""
    sampled = set(random.Random(7).sample(range(points), sample // 2))
    chosen: list[dict[str, str]] = []
    near: list[dict[str, str]] = []
    with output.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if number in sampled:
                chosen.append(row)
            elif row["decided_by"] in ("replay", "") and number % 17 == 0:
                near.append(row)
    chosen += random.Random(8).sample(near, min(sample - len(chosen), len(near)))
    messages = []
    for row in chosen:
        sizes = {name: int(row[name]) for name in ("batch_size", "seq_len", "r")}
        result = peftplan.estimate(MODEL, method=METHOD, gpu=CARD, **sizes)
        assert result.peaks is not None
        if int(row["requested_bytes"]) != result.peaks.at_least:
            messages.append(f"{sizes}: {row['requested_bytes']} bytes requested, {result.peaks.at_least} by itself")
        if row["verdict"] not in ("", result.gpus[0].verdict):
            messages.append(f"{sizes}: {row['verdict']} by {row['decided_by']}, {result.gpus[0].verdict} by itself")
    print(f"compared: {len(chosen)} points, {len(messages)} differ")
    return messages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10**6)
    parser.add_argument("--sample", type=int, default=500)
    parser.add_argument("--strategy", choices=STRATEGIES, help="print the seconds of the points of one strategy alone")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="that of these points")
    arguments = parser.parse_args()
    if arguments.strategy:
        print(over_worlds(arguments.points, arguments.strategy, arguments.method))
        return 0
    print("| what | measured | bar |\n| --- | --- | --- |")
    print(f"| requested bytes of {arguments.points:,} points | {arrays(arguments.points):.2f} s | ≤ {ARRAYS_BAR_S} s |")
    for strategy, method in product(STRATEGIES, METHODS):
        seconds = apart(arguments.points, strategy, method)
        job = f"{strategy}, {method}"
        print(f"| those of {arguments.points:,} points over 2 to 1,024 GPUs, {job} | {seconds:.2f} s | ≤ {WORLDS_BAR_S} s |")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "grid.csv"
        seconds, gib, summary = rows(arguments.points, output)
        print(f"| `peftplan sweep` of them to CSV | {seconds:.1f} s | ≤ {ROWS_BAR_S} s |")
        print(f"| its memory | {gib:.2f} GiB | ≤ {MEMORY_BAR_GIB} GiB |\n\n{summary}")
        messages = differences(output, arguments.points, arguments.sample)
    print("\n".join(islice(messages, 20)))
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast an estimate is, against the numbers to hold: cold from a shell, warm in a process, over a grid of sizes, and traced.

    python benchmarks/speed.py [--repeat 20]

Cold: `peftplan estimate llama-2-70b --method qlora --r 16` against the imports that any such tool needs (click, rich, pydantic
and one small model), both as fresh processes, interleaved; the best of each counts, the others measure the machine's noise.

Traced: the same job with `--engine trace`; after imports is the first trace of a process that has imported torch, transformers,
peft and this program's engine. The median of three of either counts.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time

import peftplan

FLOOR = ("-c", "import click, rich.console, rich.table\nfrom pydantic import BaseModel\nclass A(BaseModel):\n    x: int")
MAIN = ("-m", "peftplan", "estimate", "llama-2-70b", "--method", "qlora", "--r", "16")
TRACE = (*MAIN, "--engine", "trace")
TRACE_IMPORTED = """
import time, torch, transformers, peft, peftplan, peftplan.trace.engine
from transformers.models.llama import modeling_llama
start = time.perf_counter()
peftplan.estimate("llama-2-70b", method="qlora", r=16, engine="trace")
print(time.perf_counter() - start)
"""
HELP = ("-m", "peftplan", "--help")
COLD_BAR, WARM_BAR_MS, GRID_BAR_S = 1.3, 1.0, 1.0
TRACE_BAR_S, TRACE_COLD_BAR_S, TRACE_BAR_GIB = 3.0, 10.0, 2.0


def cold(arguments: tuple[str, ...]) -> float:
    """Seconds of one fresh interpreter, bytecode cached as pip installs it."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def warm(model: str, method: str, *, repeat: int) -> float:
    """Milliseconds of one estimate in this process, architecture cached: the median."""
    peftplan.estimate(model, method=method)
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        peftplan.estimate(model, method=method)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def at_other_sizes(model: str, method: str, *, repeat: int) -> float:
    """Milliseconds of one estimate at other sizes, the job prepared: the median."""
    prepared = peftplan.estimate(model, method=method)
    times = []
    for number in range(repeat):
        start = time.perf_counter()
        _ = prepared.at(batch_size=1 + number % 8).peaks.allocated
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def replayed(model: str, method: str, *, repeat: int) -> float:
    """Milliseconds of a replay through the allocator's model: the best."""
    estimate = peftplan.estimate(model, method=method)
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        _ = estimate.at(batch_size=1).peaks.reserved
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def grid(model: str, method: str, *, repeat: int) -> float:
    """Seconds for the peaks of 1,000 batch sizes × 1,000 sequence lengths: the best."""
    import numpy as np

    prepared = peftplan.estimate(model, method=method)
    batches, lengths = np.arange(1, 1001)[:, None], np.arange(8, 8008, 8)[None]
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        prepared.at(batch_size=batches, seq_len=lengths)
        times.append(time.perf_counter() - start)
    return min(times)


def after_imports() -> float:
    """Seconds of the first trace of a fresh process."""
    said = subprocess.run([sys.executable, "-c", TRACE_IMPORTED], check=True, capture_output=True, text=True)
    return float(said.stdout)


def cpu_model() -> str:
    """The processor's name where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    repeat = parser.parse_args().repeat
    cold(MAIN), cold(FLOOR)  # fill the page cache and write the bytecode
    rounds = [(cold(FLOOR), cold(MAIN), cold(HELP)) for _ in range(repeat)]
    floor, estimate, help_ = (min(column) for column in zip(*rounds, strict=True))
    print(f"machine: {cpu_model()}, Python {platform.python_version()}, best of {repeat}\n")
    print("| what | measured | bar |\n| --- | --- | --- |")
    print(f"| floor: click, rich, pydantic and one model | {1000 * floor:.0f} ms | |")
    print(f"| `peftplan --help` | {1000 * help_:.0f} ms = {help_ / floor:.2f} × floor | |")
    print(f"| `peftplan estimate llama-2-70b …` | {1000 * estimate:.0f} ms = {estimate / floor:.2f} × floor | ≤ {COLD_BAR} × |")
    for model, method in (
        ("llama-2-70b", "qlora"),
        ("llama-2-7b", "full"),
        ("mixtral-8x7b", "lora"),
        ("bert-base-uncased", "bitfit"),
    ):
        print(f"| warm: {model}, {method} | {warm(model, method, repeat=200):.2f} ms | ≤ {WARM_BAR_MS} ms |")
    print(f"| warm, at other sizes: llama-2-70b, qlora | {at_other_sizes('llama-2-70b', 'qlora', repeat=200):.2f} ms | |")
    for model in ("llama-2-70b", "llama-2-7b"):
        print(f"| warm, replayed: {model}, qlora | {replayed(model, 'qlora', repeat=5):.0f} ms | |")
    print(f"| 1,000,000 points: llama-2-70b, qlora | {grid('llama-2-70b', 'qlora', repeat=5):.2f} s | ≤ {GRID_BAR_S} s |")
    traced, imported = (statistics.median(seconds() for _ in range(3)) for seconds in (lambda: cold(TRACE), after_imports))
    host = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"| trace of llama-2-70b, qlora, after imports | {imported:.1f} s | ≤ {TRACE_BAR_S} s |")
    print(f"| the same, cold | {traced:.1f} s | ≤ {TRACE_COLD_BAR_S} s |")
    print(f"| the same, memory of the host | {host:.2f} GiB | ≤ {TRACE_BAR_GIB} GiB |")


if __name__ == "__main__":
    main()

"""How fast an estimate is, against the numbers to hold: cold from a shell, warm in a process, over a grid of sizes, and traced.

    python benchmarks/speed.py [--repeat 20]

Cold: `peftplan estimate llama-2-70b --method qlora --r 16`, alone, with a card and as JSON, against the imports that any such
tool needs (click, rich, pydantic and one small model), all as fresh processes, interleaved; the best of each counts, the others
measure the machine's noise. Times are the processor's, so that other programs on the machine count less.

Warm: in this process, architecture cached. A peak is replayed when it is asked for: by the compiled replay, where it was built.

Advice: a cold estimate over 8 GPUs that does not fit, and so searches for changes.

Traced: the same job with `--engine trace`; after imports is the first trace of a process that has imported torch, transformers,
peft and this program's engine. The median of three of either counts.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import peftplan
from peftplan.allocator import program

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
COLD: dict[str, tuple[tuple[str, ...], float | None]] = {
    "`peftplan --help`": (HELP, None),
    "`peftplan estimate llama-2-70b …`": (MAIN, 1.3),
    "the same, with a card": ((*MAIN, "--gpu", "h100"), 1.5),
    "the same, as JSON": ((*MAIN, "--format", "json"), 1.5),
    "the same, as JSON with a card": ((*MAIN, "--format", "json", "--gpu", "h100"), 1.5),
}
"""What is started → its arguments, and how many times the floor it may take."""
AT_CARD: dict[str, dict[str, Any]] = {
    "": {},
    ", three micro batches or more": {"gradient_accumulation_steps": 4},
    ", in segments that grow": {"trainer": "axolotl"},
}
"""What is added to the job → its options."""
STRATEGIES = ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3", "device-map")
ADVISED = ("fsdp2", "zero1", "zero3")
"""Strategies under which a job that does not fit is changed."""
ADVICE_BAR_S = 2.5
WARM_BAR_MS, RANK_BAR_MS, CARD_BAR_MS, AT_BAR_MS, GRID_BAR_S = 1.0, 2.0, 15.0, 5.0, 1.0
TRACE_BAR_S, TRACE_COLD_BAR_S, TRACE_BAR_GIB = 3.0, 10.0, 2.0


def cold(arguments: tuple[str, ...]) -> float:
    """Processor seconds of one fresh interpreter, bytecode cached as pip installs it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wall(arguments: tuple[str, ...]) -> float:
    """Seconds of one fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def milliseconds(call: Callable[..., object], *, repeat: int) -> str:
    """Processor milliseconds of a call, which is told its number: the median, and the best."""
    call(0)
    times = []
    for number in range(repeat):
        start = time.process_time()
        call(number)
        times.append(1000 * (time.process_time() - start))
    return f"{statistics.median(times):.2f} ms (best {min(times):.2f})"


def with_card(number: int) -> object:
    """One estimate for a card: another batch each time, or the last replay would do."""
    return peftplan.estimate("llama-2-70b", method="qlora", r=16, batch_size=1 + number % 8, gpu="h100").peaks


def peak_of(number: int, options: dict[str, Any]) -> object:
    """The peak of the largest of eight ranks, at another length each time."""
    peaks = peftplan.estimate("llama-3.1-8b", seq_len=1024 + 8 * (number % 100), **options).peaks
    return peaks and peaks.allocated


def on_cards(number: int, options: dict[str, Any]) -> object:
    """The verdict on eight cards, at another batch each time."""
    return peftplan.estimate("llama-3.1-8b", batch_size=1 + number % 8, **options | {"gpus": None, "gpu": "8xh100"}).gpus


def grid(model: str, method: str, *, repeat: int) -> float:
    """Seconds for the peaks of 1,000 batch sizes × 1,000 sequence lengths: the best."""
    import numpy as np

    prepared = peftplan.estimate(model, method=method)
    batches, lengths = np.arange(1, 1001)[:, None], np.arange(8, 8008, 8)[None]
    times = []
    for _ in range(repeat):
        start = time.process_time()
        prepared.at(batch_size=batches, seq_len=lengths)
        times.append(time.process_time() - start)
    return min(times)


def after_imports() -> float:
    """Seconds of the first trace of a fresh process."""
    process = subprocess.run([sys.executable, "-c", TRACE_IMPORTED], check=True, capture_output=True, text=True)
    return float(process.stdout)


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
    columns = {"floor": FLOOR, **{what: arguments for what, (arguments, _) in COLD.items()}}
    for arguments in columns.values():  # fill the page cache and write the bytecode
        cold(arguments)
    rounds = [[cold(arguments) for arguments in columns.values()] for _ in range(repeat)]
    floor, *others = (min(column) for column in zip(*rounds, strict=True))
    replays = "compiled" if program.COMPILED else "interpreted"
    print(f"machine: {cpu_model()}, Python {platform.python_version()}, replay {replays}, best of {repeat}\n")
    print("| what | measured | bar |\n| --- | --- | --- |")
    print(f"| floor: click, rich, pydantic and one model | {1000 * floor:.0f} ms | |")
    for (what, (_, bar)), seconds in zip(COLD.items(), others, strict=True):
        print(f"| {what} | {1000 * seconds:.0f} ms = {seconds / floor:.2f} × floor | {f'≤ {bar} ×' if bar else ''} |")
    for model, method in (
        ("llama-2-70b", "qlora"),
        ("llama-2-7b", "full"),
        ("mixtral-8x7b", "lora"),
        ("bert-base-uncased", "bitfit"),
    ):
        instant = milliseconds(lambda _, model=model, method=method: peftplan.estimate(model, method=method), repeat=200)
        print(f"| warm: {model}, {method}, its peak not asked for | {instant} | ≤ {WARM_BAR_MS} ms |")
    for strategy in STRATEGIES:
        for method in ("lora", "qlora", "full"):
            options: dict[str, Any] = {"method": method, "strategy": strategy, "gpus": 8, "dtype": "bf16"}
            if (strategy, method) == ("fsdp1", "qlora"):
                options["quant_storage"] = "bf16"  # which FSDP1 takes alone
            warm = milliseconds(lambda _, options=options: peftplan.estimate("llama-3.1-8b", **options), repeat=100)
            print(f"| warm, 8 GPUs: llama-3.1-8b, {method}, {strategy} | {warm} | ≤ {RANK_BAR_MS} ms |")
            peak = milliseconds(lambda number, options=options: peak_of(number, options), repeat=100)
            print(f"| its peak, another length each time | {peak} | ≤ {RANK_BAR_MS} ms |")
            carded = milliseconds(lambda number, options=options: on_cards(number, options), repeat=100)
            print(f"| the same with cards, another batch each time | {carded} | ≤ {RANK_BAR_MS} ms |")
    for strategy in ADVISED:
        job = ("-m", "peftplan", "estimate", "llama-2-70b", "--method", "full", "--strategy", strategy, "--gpu", "8xa100-80gb")
        print(f"| cold, with advice: llama-2-70b, full, {strategy} | {cold(job):.1f} s | ≤ {ADVICE_BAR_S} s |")
    print(f"| warm, with a card: llama-2-70b, qlora | {milliseconds(with_card, repeat=50)} | ≤ {CARD_BAR_MS} ms |")
    prepared = peftplan.estimate("llama-2-70b", method="qlora", r=16)
    other = milliseconds(lambda number: prepared.at(batch_size=1 + number % 8), repeat=200)
    print(f"| `at` another batch: llama-2-70b, qlora, its peak not asked for | {other} | |")
    for what, options in AT_CARD.items():
        on_card = peftplan.estimate("llama-2-70b", method="qlora", r=16, gpu="h100", **options)
        carded = milliseconds(lambda number, on_card=on_card: on_card.at(batch_size=1 + number % 8).gpus, repeat=50)
        print(f"| `at` another batch with a card: llama-2-70b, qlora{what} | {carded} | ≤ {AT_BAR_MS} ms |")
    print(f"| 1,000,000 points: llama-2-70b, qlora | {grid('llama-2-70b', 'qlora', repeat=5):.2f} s | ≤ {GRID_BAR_S} s |")
    traced = statistics.median(wall(TRACE) for _ in range(3))
    imported = statistics.median(after_imports() for _ in range(3))
    host = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"| trace of llama-2-70b, qlora, after imports | {imported:.1f} s | ≤ {TRACE_BAR_S} s |")
    print(f"| the same, cold | {traced:.1f} s | ≤ {TRACE_COLD_BAR_S} s |")
    print(f"| the same, memory of the host | {host:.2f} GiB | ≤ {TRACE_BAR_GIB} GiB |")


if __name__ == "__main__":
    main()

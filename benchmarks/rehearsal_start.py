"""How much a rehearsal adds to the start of a program, against a bar.

    python benchmarks/rehearsal_start.py [--repeat 5]

A program that only imports what training programs import runs plainly and rehearsed, in turn, each time in fresh processes. The
difference is what a rehearsal adds: peftplan's own process, the scratch layer, the card, and what watches the program from
inside. The bar is one of processor seconds, summed over all processes; the clock's stand beside them. The least of each counts,
since other programs only add. Needs the CUDA build of torch. A first run, which writes bytecode and the card's library, does not
count.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

IMPORTS = {
    "torch": "import torch",
    "torch, transformers' Trainer": "import torch\nfrom transformers import Trainer",
    "torch, TRL's SFTTrainer, peft, datasets": "import torch, peft, datasets\nfrom trl import SFTTrainer",
}
BAR_S = 3.0
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
REHEARSED = (sys.executable, "-m", "peftplan", "rehearse", "--gpu", "a100-80gb", "--steps", "0", "--")


def seconds(command: tuple[str, ...]) -> tuple[float, float]:
    """Processor seconds and seconds of the clock that a command takes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **QUIET})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - began


def main() -> None:
    """Print a row for each program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    print(
        "| the program imports | alone: processor / clock | rehearsed | a rehearsal adds | bar |\n| --- | --- | --- | --- | --- |"
    )
    for name, imports in IMPORTS.items():
        program = (sys.executable, "-c", imports)
        seconds((*REHEARSED, *program))
        pairs = [(seconds(program), seconds((*REHEARSED, *program))) for _ in range(repeat)]
        alone, rehearsed = ([min(pair[which][unit] for pair in pairs) for unit in (0, 1)] for which in (0, 1))
        cells = [f"{cpu:.2f} s / {clock:.2f} s" for cpu, clock in (alone, rehearsed)]
        added = [theirs - own for theirs, own in zip(rehearsed, alone, strict=True)]
        cells += [f"{added[0]:.2f} s / {added[1]:.2f} s", f"{BAR_S:.0f} s: {'holds' if added[0] <= BAR_S else 'does not hold'}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

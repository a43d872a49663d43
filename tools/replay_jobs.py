"""The compiled replay against the interpreted one, over random jobs of the built-in models: it finds no difference.

    python tools/replay_jobs.py [--jobs 500] [--seed 0]

Of each job: allocated bytes of every phase, reserved bytes, and whether the job runs where the allocator may take a random share
of them. Every other job runs in segments that grow. Needs the compiled module (`pip install` builds it where a C compiler is).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from typing import Any

from peftplan.allocator import program
from peftplan.allocator.program import Replayed
from peftplan.analytic.instant import InstantPeaks
from peftplan.analytic.reserved import Run
from peftplan.arch import catalogue
from peftplan.errors import PeftplanError
from peftplan.job.script import Script
from peftplan.planning.estimate import estimate
from tools.analytic_grid import DRAWN

OPTIONS: dict[str, tuple[Any, ...]] = {
    "trainer": ("transformers", "trl", "plain", "qlora-paper"),
    "dtype": ("bf16", "bf16", "fp16", "fp32"),
    "autocast": (None, "none", "bf16"),
    "quant": (None, None, None, "nf4", "int8"),
    "batch_size": (1, 1, 2, 3, 8),
    "seq_len": (128, 200, 512, 1000),
    "gradient_accumulation_steps": (1, 1, 1, 2, 3),
    "gradient_checkpointing": (None, True, False),
    "use_reentrant": (None, None, True),
    "every_n_layers": (None, None, None, 2),
    "optim": (None, None, "adamw_torch", "adamw_8bit", "sgd", "adafactor", "paged_adamw_32bit", "lion_8bit"),
    "attn_implementation": (None, "sdpa", "eager"),
    "padding": (None, True),
    "keep_outputs": (None, True, False),
    "keep_gradients": (None, None, True),
    "kbit_prepare": (None, False),
    "use_cache": (None, True),
}
SCRIPTS = (
    Script(),
    Script(),
    Script(torch="2.10.0"),
    Script(outputs_outlive_step=True),
    Script(earlier_seq_lens=(64, 96), empties_cache=True),
    Script(outputs_outlive_step=True, earlier_seq_lens=(512,), torch="2.9.1"),
)


def jobs(seed: int, *, largest: float) -> Iterator[tuple[str, dict[str, Any], Script]]:
    """Random jobs without end: a model of up to so many parameters, options, and the program around the step."""
    draw = random.Random(seed)
    names = [entry.name for entry in catalogue.models() if entry.num_parameters <= largest]
    while True:
        options = {name: draw.choice(values) for name, values in OPTIONS.items()}
        options |= {"method": draw.choice(DRAWN), "r": draw.choice((None, None, 4, 13, 64))}
        yield draw.choice(names), {k: v for k, v in options.items() if v is not None}, draw.choice(SCRIPTS)


def runs(seed: int, *, largest: float = 80e9) -> Iterator[tuple[str, Run]]:
    """The runs of those jobs that have formulas, each with what it is called."""
    for model, options, script in jobs(seed, largest=largest):
        try:
            peaks = estimate(model, script=script, **options).peaks
        except PeftplanError:
            continue
        if isinstance(peaks, InstantPeaks):
            yield f"{model} {options} {script!r}", peaks.run()


def both(run: Run, capacity: int | None = None, *, expandable: bool = False) -> tuple[Replayed | None, Replayed | None]:
    """What either replay says of a run; None where the device has no room."""
    answers: list[Replayed | None] = []
    for replay in (program.replay, program.interpret):
        try:
            ties = run.script.ties_by_address
            answers.append(replay(*run.program(), ties_by_address=ties, expandable=expandable, capacity=capacity))
        except MemoryError:
            answers.append(None)
    compiled, interpreted = answers
    return compiled, interpreted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not program.COMPILED:
        parser.error("the compiled replay is not there: build it (python hatch_build.py)")
    draw = random.Random(arguments.seed)
    differing = capped = 0
    for number, (name, run) in zip(range(arguments.jobs), runs(arguments.seed), strict=False):
        expandable = number % 2 == 1
        compiled, interpreted = both(run, expandable=expandable)
        assert compiled is not None
        capacity = int(compiled.reserved * draw.uniform(0.9, 1.0))
        limited = both(run, capacity, expandable=expandable)
        capped += limited[0] is not None
        if compiled != interpreted or limited[0] != limited[1]:
            differing += 1
            print(f"{name}, {program.OPTIONS[expandable]}\n  compiled {compiled}\n  interpreted {interpreted}")
            print(f"  within {capacity:,}: {limited}")
    print(f"{arguments.jobs} jobs, {capped} of them within less than they reserve: {differing} differ")


if __name__ == "__main__":
    main()

"""Random jobs on random cards: what `fit` returns fits, and one more does not, by direct estimates and by traces.

    python -m tools.fit_triples [--triples 300] [--traced 20] [--seed S] [--rows FILE] [--out docs/fit-triples.md]

Each triple is a built-in model with formulas, a method and a card, drawn from a seed and its number; batch size, sequence length
or rank is searched. A triple that the library refuses is drawn again. `fit` may not have asked every smaller size; a dozen
of them, drawn at random, are estimated too. The `--traced` triples of the smallest models are traced at the size
that fits and at one more. `--rows` keeps a line of JSON per triple and goes on where it stopped; delete the file after a change
of the code. It ends with one line of totals, and exits 1 where an answer of `fit` was contradicted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peftplan.arch import catalogue
from peftplan.errors import PeftplanError
from peftplan.hardware.gpus import gpus
from peftplan.job.kernels import SCANNING
from peftplan.job.sources import load_config
from peftplan.memory.models import FORWARDS
from peftplan.planning.estimate import estimate
from peftplan.planning.fit import Size, fit
from tools.analytic_grid import DRAWN

SIZES: tuple[Size, ...] = ("batch_size", "seq_len", "r")
AS_TYPED = ("method", "seq_len", "gradient_checkpointing", "trainer", "loss")
LARGEST_TRACED = 4e9
"""Parameters of a model that is traced: larger ones take minutes."""
OTHERWISE = "Where a trace says otherwise, the formulas' reserved bytes differ from its own ([by how much](analytic-drift.md))."
SMALLER = 12
"""Smaller sizes that are estimated of each triple."""


class Triple(NamedTuple):
    """A job on a card, the size that `fit` searched, its answer, and what direct estimates say otherwise."""

    number: int
    model: str
    gpu: str
    size: Size
    options: dict[str, Any]
    largest: int
    bounded: bool
    fits_again: int | None
    seconds: float = 0.0
    against: tuple[str, ...] = ()
    traced: tuple[str, ...] = ()
    """The verdicts of traces at the answer and at one more, or why there is none."""

    def verdict(self, number: int, *, engine: Literal["analytic", "trace"] = "analytic") -> str:
        """The verdict of a direct estimate at one size."""
        options = {**self.options, self.size: number}
        return estimate(self.model, gpu=self.gpu, engine=engine, **options).gpus[0].verdict

    def text(self) -> str:
        """One line that names the triple and the answer."""
        return f"{self.number}: {self.model} on {self.gpu}, {self.options}: largest {self.size} {self.largest}"


@cache
def _models() -> dict[str, int]:
    entries = catalogue.models()
    known = FORWARDS.keys() - SCANNING  # whose formula is that of a kernel
    return {entry.name: entry.num_parameters for entry in entries if load_config(entry.name).get("model_type") in known}


def draw(seed: int, number: int) -> Triple:
    """Triple `number` of a seed, with the answer of `fit`, compared with direct estimates."""
    dice = random.Random(f"fit {seed} {number}")
    begin = time.process_time()
    while True:
        model, gpu, size = dice.choice(list(_models())), dice.choice(gpus()).id, dice.choice(SIZES)
        options: dict[str, Any] = {"method": dice.choice((*DRAWN, "lora", "qlora", "dora", "full"))}
        options |= {"batch_size": dice.choice((1, 1, 2, 4, 8)), "seq_len": dice.choice((256, 512, 1024, 2048, 4096))}
        options |= {} if dice.random() < 0.7 else {"gradient_checkpointing": False}
        options.pop(size, None)
        try:
            plan = fit(model, gpu=gpu, max=size, keep=AS_TYPED, **options).plans[0]
        except PeftplanError:
            continue
        if plan.verdict != "does_not_run":
            triple = Triple(number, model, gpu, size, options, plan.size, plan.bounded, plan.fits_again)
            against = tuple(contradictions(triple, dice))
            return triple._replace(against=against, seconds=time.process_time() - begin)


def contradictions(triple: Triple, dice: random.Random) -> Iterator[str]:
    """What direct estimates say otherwise than `fit`: at the answer, at one more, at smaller sizes, at what fits again."""
    largest = triple.largest
    if largest and (verdict := triple.verdict(largest)) != "fits":
        yield f"{triple.text()} is {verdict}"
    if not triple.bounded and triple.verdict(largest + 1) == "fits":
        yield f"{triple.text()}, and one more fits too"
    for size in sorted({dice.randint(1, largest) for _ in range(SMALLER)} if largest else ()):
        if (verdict := triple.verdict(size)) != "fits":
            yield f"{triple.text()}, but {size} is {verdict}"
    if triple.fits_again is not None and (verdict := triple.verdict(triple.fits_again)) != "fits":
        yield f"{triple.text()}, but {triple.fits_again} does not fit again: {verdict}"


def traced(triple: Triple) -> Triple:
    """With the verdicts of traces at the largest size, and at one more."""
    try:
        verdicts = tuple(triple.verdict(triple.largest + more, engine="trace") for more in (0, 1))
    except PeftplanError as refused:
        verdicts = (str(refused),)
    return triple._replace(traced=verdicts)


def can_be_traced(triple: Triple) -> bool:
    """Whether a trace takes seconds, and the card was what ended the search."""
    return _models()[triple.model] < LARGEST_TRACED and triple.largest > 0 and not triple.bounded


def of_rows(path: Path | None) -> dict[int, Triple]:
    """The triples that a file of rows has, by their number."""
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
    triples = (
        Triple(**{**row, **{n: tuple(row[n]) for n in ("against", "traced") if n in row}}) for row in map(json.loads, lines)
    )
    return {triple.number: triple for triple in triples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triples", type=int, default=300)
    parser.add_argument("--traced", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    triples: list[Triple] = []
    known = of_rows(arguments.rows)

    def keep(triple: Triple) -> Triple:
        print(triple.text(), *triple.traced, flush=True)
        if arguments.rows:
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(triple._asdict()) + "\n")
        return triple

    for number in range(arguments.triples):
        triples.append(known[number] if number in known else keep(draw(arguments.seed, number)))
    for at, triple in sorted(enumerate(triples), key=lambda numbered: _models()[numbered[1].model]):
        if sum(len(other.traced) == 2 for other in triples) < arguments.traced and can_be_traced(triple) and not triple.traced:
            triples[at] = keep(traced(triple))
    text = page(triples, seed=arguments.seed)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    print(text.splitlines()[-1])
    return 1 if any(triple.against for triple in triples) else 0


def page(triples: Sequence[Triple], *, seed: int) -> str:
    """The result as a page."""
    rows = [(triple, *triple.traced) for triple in triples if len(triple.traced) == 2]
    against = [line for triple in triples for line in triple.against]
    searched = Counter(triple.size for triple in triples)
    agreeing = sum(first == "fits" and second != "fits" for _, first, second in rows)
    seconds = sum(triple.seconds for triple in triples)
    lines = [
        "# Random jobs of `fit`",
        "",
        "Is the largest size that `fit` finds really the largest? This page checks its answers with single estimates and traces.",
        "",
        f"`python -m tools.fit_triples --triples {len(triples)} --traced {len(rows)} --seed {seed}` drew {len(triples)} random",
        f"triples of a model ({len({t.model for t in triples})} different ones), a method"
        f" ({len({t.options['method'] for t in triples})})",
        f"and a card ({len({t.gpu for t in triples})}); it searched"
        f" {', '.join(f'{name} {n} times' for name, n in searched.items())}.",
        f"For {sum(t.largest > 0 for t in triples)} triples some size fits; for the others not even the smallest does. Estimates",
        f"at the answer, at the next larger size and at up to {SMALLER} smaller sizes contradict"
        f" {sum(bool(t.against) for t in triples)} answers ({seconds:,.0f} s on one core).",
        "",
        *(f"- {line}" for line in against),
        *([""] if against else []),
        "The trace engine's verdicts at the answer and at the next larger size:",
        "",
        "| model | method | card | largest | verdict there | verdict at one more |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {t.model} | {t.options['method']} | {t.gpu} | {t.size} {t.largest:,} | {first} | {second} |"
            for t, first, second in rows
        ),
        "",
        *(() if agreeing == len(rows) else (OTHERWISE, "")),
        f"{len(triples)} triples, {len(against)} contradictions; {len(rows)} traced, of which {agreeing} fit at the answer"
        " and not at one more",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

"""How often the bound of `peftplan sweep` would have been wrong: random jobs, replayed where it says that they fit.

    python -m tools.sweep_bound [--jobs 300] [--checks 24] [--seed S] [--rows FILE]

Of each job a grid of batches and sequences is drawn, and a card that takes part of it. As in a sweep, the points that request too
much are left out and `PROBES` of the others are replayed; then others, drawn at random, are replayed and compared with the
bound. It prints, for several values of CAUTION and FLOOR, how many points the bound decides and how many of these it
gets wrong: those that reserve more than the bound says, and those whose verdict it would have missed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peftplan.analytic.sized import Points, Sized
from peftplan.errors import PeftplanError
from peftplan.planning.decided import PROBES, SEGMENTS, _spread
from peftplan.planning.sweep_grid import counted
from peftplan.units import GIB
from tools.analytic_grid import DRAWN
from tools.fit_triples import _models

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
LONGEST = 16384
ROOMS = (8, 12, 16, 24, 40, 48, 80, 141)
"""GiB for the allocator."""
RULES = ((0.0, 1.0), (1.0, 0.25), (1.0, 0.5), (1.0, 1.0), (2.0, 0.1), (2.0, 0.25), (2.0, 0.5), (3.0, 0.25), (3.0, 0.5))


class Row(NamedTuple):
    """A job: (requested, reserved) of its probes and of the points that check them, in a room of so many bytes."""

    model: str
    options: dict[str, Any]
    room: int
    probes: list[tuple[int, int]]
    checks: list[tuple[int, int]]


def options_of(dice: random.Random) -> dict[str, Any]:
    """Options of a job, the common methods more often than others."""
    options: dict[str, Any] = {"method": dice.choice((*DRAWN, "lora", "lora", "qlora", "qlora", "dora", "full"))}
    options["gradient_checkpointing"] = dice.random() < 0.6
    if dice.random() < 0.3:
        options["optim"] = dice.choice(("adamw_torch", "adamw_8bit", "sgd", "adafactor", "paged_adamw_8bit", "galore_adamw"))
    if dice.random() < 0.3:
        options["trainer"] = dice.choice(("plain", "trl"))
    if dice.random() < 0.2:
        options["padding"] = True
    if dice.random() < 0.2:
        options["attn_implementation"] = dice.choice(("eager", "flash_attention_2"))
    if dice.random() < 0.2:
        options["gradient_accumulation_steps"] = 4
    return options


def draw(dice: random.Random, checks: int) -> Row | None:
    """A job whose grid lies on both sides of a limit; None where the draw makes no such job."""
    model, options = dice.choice(list(_models())), options_of(dice)
    try:
        sized = Sized(lambda _: counted(model, **options), (), compute_capability="8.0")
        longest = min(LONGEST, sized.first.job.architecture.max_positions or LONGEST)
        lengths = sorted({int(2 ** dice.uniform(5, 14)) for _ in range(64)} & set(range(1, longest + 1)))
        points = Points(*(axis.ravel() for axis in np.meshgrid(BATCHES, lengths, indexing="ij")))
        requested = sized.most_requested(points)
    except PeftplanError:
        return None
    room = dice.choice(ROOMS) * GIB
    open_points = np.flatnonzero(requested <= room)
    if len(open_points) < 3 * PROBES:
        return None
    probes = _spread(open_points[np.argsort(requested[open_points], kind="stable")], PROBES).tolist()
    others = dice.sample(sorted(set(open_points.tolist()) - set(probes)), min(checks, len(open_points) - len(probes)))

    def replayed(at: int) -> tuple[int, int]:
        return int(requested[at]), sized.peaks(int(points.batch_size[at]), int(points.seq_len[at]), None).reserved

    return Row(model, options, room, [replayed(at) for at in probes], [replayed(at) for at in others])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--checks", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    dice = random.Random(f"bound {arguments.seed}")
    while len(rows) < arguments.jobs:
        if (row := draw(dice, arguments.checks)) is not None:
            rows.append(row)
            if arguments.rows:
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row._asdict()) + "\n")
    print(report(rows))


def report(rows: list[Row]) -> str:
    """What each rule decides, and gets wrong."""
    lines = ["| CAUTION | FLOOR | checked | decided | reserve more than the bound | do not fit after all |", "| --- " * 6 + "|"]
    for caution, floor in RULES:
        decided = beyond = wrong = 0
        for row in rows:
            excess = max(max(reserved / requested for requested, reserved in row.probes) - 1, 0)
            for requested, reserved in row.checks:
                bound = requested * (1 + floor + caution * excess) + SEGMENTS
                beyond += reserved > bound
                decided += bound <= row.room
                wrong += bound <= row.room < reserved
        checked = sum(len(row.checks) for row in rows)
        lines.append(f"| {caution:g} | {floor:g} | {checked} | {decided} | {beyond} | {wrong} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

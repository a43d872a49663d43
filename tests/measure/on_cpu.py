"""`python -m tests.measure.on_cpu ARGS`: the command line, or with `child` one run of a suite, on the double instead of CUDA.

`DOUBLE_CAPACITY` is the card's memory in bytes. What a child does follows from the name of its model's file: one called `dies` or
`hangs` does so, `quick` leaves a record without running anything, and any other is measured.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

CHILD = (sys.executable, "-m", "tests.measure.on_cpu", "child")
CARD = "NVIDIA A100-SXM4-80GB"
QUICK_SECONDS = 0.5


class Replayed(io.StringIO):
    """A stdin whose first line was read already."""

    def read(self, size: int | None = -1) -> str:
        return sys.__stdin__.read()  # type: ignore[union-attr]


def quick(order: dict[str, Any]) -> None:
    """A record of the order's configuration, without torch."""
    from peftplan.accuracy.jsonl import append
    from peftplan.accuracy.records import Measured, Peak, Record
    from peftplan.job.prepare import prepare
    from peftplan.measure.identity import circumstances, new_id, run_of

    run = run_of(prepare(order["model"], **order["options"]))
    time.sleep(QUICK_SECONDS)
    record = Record(
        id=new_id(run), run=run, circumstances=circumstances(gpu=CARD), outcome="ok", covers="whole-run",
        peaks=Measured(overall=Peak(allocated=1, reserved=2)),
    )  # fmt: skip
    append(Path(order["output"]), [record])


def child() -> int:
    line = sys.stdin.readline()
    order = json.loads(line)
    kind = Path(order["model"]).stem
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind in ("quick", "hangs"):
        threading.Thread(target=_as_the_real_one, daemon=True).start()
        quick(order) if kind == "quick" else time.sleep(60)
        return 0
    from peftplan.measure.child import main as measured

    with on_the_double(), patch.object(sys, "stdin", Replayed(line)):
        return measured()


def _as_the_real_one() -> None:
    sys.stdin.read()
    os._exit(3)


def on_the_double() -> ExitStack:
    from peftplan.measure import cuda
    from tests.measure.double import Double

    stack = ExitStack()
    capacity = int(os.environ.get("DOUBLE_CAPACITY", 2**36))
    stack.enter_context(patch.object(cuda, "open_device", lambda: Double(capacity=capacity)))
    stack.enter_context(patch.object(cuda, "card_name", lambda: CARD))
    return stack


def main(args: list[str]) -> int:
    if args == ["child"]:
        return child()
    from peftplan.cli import main as command_line
    from peftplan.measure import suite

    with on_the_double(), patch.object(suite, "CHILD", CHILD):
        command_line(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

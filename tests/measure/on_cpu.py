"""`python -m tests.measure.on_cpu ARGS`: the command line, or with `child` one run of a suite, on the double instead of CUDA.

`DOUBLE_CAPACITY` is the card's memory in bytes; a model named in `DOUBLE_DIES` or `DOUBLE_HANGS` ends its process so.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any
from unittest.mock import patch

from peftplan.measure import child, cuda, one, suite
from tests.measure.double import Double

CHILD = (sys.executable, "-m", "tests.measure.on_cpu", "child")


def prepare(model: Any, **options: Any) -> Any:
    """The real one, unless this run is to die or to hang."""
    if model == os.environ.get("DOUBLE_DIES"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if model == os.environ.get("DOUBLE_HANGS"):
        time.sleep(60)
    return REAL(model, **options)


REAL = one.prepare


def main(args: list[str]) -> int:
    capacity = int(os.environ.get("DOUBLE_CAPACITY", 2**36))
    with (
        patch.object(cuda, "open_device", lambda: Double(capacity=capacity)),
        patch.object(cuda, "card_name", lambda: "NVIDIA A100-SXM4-80GB"),
        patch.object(one, "prepare", prepare),
        patch.object(suite, "CHILD", CHILD),
    ):
        if args == ["child"]:
            return child.main()
        from peftplan.cli import main as command_line

        command_line(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

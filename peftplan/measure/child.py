"""One run of a suite in its own process: `python -m peftplan.measure.child`, which reads its job as one line of JSON from stdin.

The suite keeps stdin open. When the suite ends, so does this process, and the GPU is free for the next run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from peftplan.errors import PeftplanError
from peftplan.measure.one import measure_and_record

REFUSED, ORPHANED = 2, 3
"""Exit codes: the configuration cannot be run, for the reason in the last line of stderr; the suite has ended."""


def main() -> int:
    """Run the job from stdin and append its record."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_the_suite, daemon=True).start()
    try:
        measure_and_record(
            order["model"], output=Path(order["output"]), warmup=order["warmup"], steps=order["steps"], **order["options"]
        )
    except PeftplanError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


def _leave_with_the_suite() -> None:
    sys.stdin.read()
    os._exit(ORPHANED)


if __name__ == "__main__":
    sys.exit(main())

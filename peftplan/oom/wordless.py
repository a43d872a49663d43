"""Logs without torch's figures: one line says that the driver, a CUDA library or the host ran out of memory."""

from __future__ import annotations

import re
from typing import NamedTuple

from peftplan.oom.causes import Cause


class Line(NamedTuple):
    """A line of a log that tells a cause."""

    reads: re.Pattern[str]
    cause: Cause


LINES: tuple[Line, ...] = (
    Line(
        re.compile(r"CU(?:BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED"),
        Cause(
            "library",
            "a CUDA library had no memory for its own workspace: torch's allocator, or another process, holds the whole card",
            (
                "make the micro batch smaller: `peftplan fit MODEL --gpu CARD` says which size leaves room",
                "run once with CUDA_LAUNCH_BLOCKING=1: an index out of range can show up as this error too",
            ),
        ),
    ),
    Line(
        re.compile(r"CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|hipErrorOutOfMemory"),
        Cause(
            "driver",
            "the driver had no memory for what lies outside torch's allocator (a CUDA context, a kernel's code, NCCL's buffers)",
            (
                "check whether another process fills the card (nvidia-smi lists them)",
                "leave room for the context: `peftplan fit MODEL --gpu CARD` counts it",
            ),
        ),
    ),
    Line(
        re.compile(
            r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|^MemoryError\b|exitcode *: ?-9\b"
            r"|^(?:\S+: line \d+: +\d+ )?Killed(?: {2,}.*)?$"
            r"|Signal 9 \(SIGKILL\)|Out of memory: Killed process|oom-kill",
            re.MULTILINE,
        ),
        Cause(
            "host",
            "the host ran out of memory, not the card, or the process was killed for another reason: a kill leaves no message",
            (
                "`peftplan estimate MODEL -v` says what loading, merging and offloading take on the host",
                "load in the dtype of the file, start fewer workers, and offload less",
            ),
        ),
    ),
)
"""The first that a log holds wins."""


def cause_in(log: str) -> Cause | None:
    """The cause that a log tells without figures; None where it says nothing of memory."""
    return next((line.cause for line in LINES if line.reads.search(log)), None)

"""How far a GPU is that is as late as the host lets it be, under FSDP1, which frees with `record_stream`.

Source: torch, distributed/fsdp/{_runtime_utils,_limiter_utils}.py; c10/cuda/CUDACachingAllocator.cpp (`insert_events`,
`process_events`).
"""

from __future__ import annotations

from collections import deque

from peftplan.tape.tensors import Tensor

DEFAULT, PRE_UNSHARD, UNSHARD, POST_BACKWARD, ALL_REDUCE = range(5)
STREAMS = 5
IN_FLIGHT = 2
"""Freed units that the GPU may not have passed when the next one is gathered (`_FreeEventQueue`, under `limit_all_gathers`)."""


class Lag:
    """What the host has freed and a GPU that is as late as it may be has not passed.

    Work is numbered on each stream. A clock says of every stream how far it is: that of a stream tells what has been done once
    its own work is, as streams wait for each other. Collectives run one after the other, whichever stream they are called on
    (nccl, src/enqueue.cc, `ncclLaunchPrepare`). The GPU has done what the host has waited for, and no more.
    """

    def __init__(self) -> None:
        self._clocks = [[0] * STREAMS for _ in range(STREAMS)]
        self._collectives = self._done = [0] * STREAMS
        self._frees: deque[list[int]] = deque()
        """Clocks of the events of frees that the host has not waited for (`_FreeEventQueue`)."""
        self._kept: list[tuple[int, int, list[Tensor]]] = []
        """The stream that reads freed tensors, the number of its last work on them, and these."""

    def _record(self, stream: int) -> list[int]:
        self._clocks[stream][stream] += 1
        return [*self._clocks[stream]]

    def _reach(self, stream: int, clock: list[int]) -> None:
        self._clocks[stream] = [*map(max, self._clocks[stream], clock)]

    def join(self, stream: int, other: int) -> None:
        """A stream waits for another one."""
        self._reach(stream, self._record(other))

    def collective(self, stream: int) -> None:
        """A stream calls a collective."""
        self._reach(stream, self._collectives)
        self._collectives = self._record(stream)

    def keep(self, tensors: list[Tensor], stream: int) -> None:
        """Free tensors of another stream, which this one has read (`record_stream`)."""
        self._kept.append((stream, self._record(stream)[stream], tensors))

    def free(self, stream: int) -> None:
        """A unit is freed: the stream that runs then records an event."""
        self._frees.append(self._record(stream))

    def wait(self) -> None:
        """Before a gather the host waits for the last free but one."""
        if len(self._frees) >= IN_FLIGHT:
            self._pass([*map(max, self._done, self._frees.popleft())])

    def read(self) -> None:
        """The host reads a value of the default stream."""
        self._pass([*map(max, self._done, self._record(DEFAULT))])

    def leave(self) -> set[int]:
        """Let go of what the GPU has not passed; returns the storages."""
        left = {tensor.storage.number for *_, tensors in self._kept for tensor in tensors if tensor.storage is not None}
        self._kept = []
        return left

    def _pass(self, done: list[int]) -> None:
        self._done = done
        self._kept = [kept for kept in self._kept if done[kept[0]] < kept[1]]

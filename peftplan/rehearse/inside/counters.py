"""The allocator's peaks between two moments of a program, which reads and resets the same counters for itself.

torch keeps one peak for each counter since the last reset. What a reset of ours would hide from the program is remembered for it,
and its own resets are read before they happen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

PEAKS = ("allocated_bytes", "reserved_bytes")


class Counters:
    """Peaks of every device, (allocated, reserved), since `take()` was last called; `now()` reads them and lets them go on."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[int, int]] = {}
        self._hidden: dict[int, dict[tuple[str, ...], int]] = {}
        memory = torch.cuda.memory
        self._stats, self._reset = memory.memory_stats_as_nested_dict, memory.reset_peak_memory_stats
        memory.memory_stats_as_nested_dict = self._program_reads
        memory.reset_peak_memory_stats = torch.cuda.reset_peak_memory_stats = self._program_resets

    def now(self) -> dict[int, tuple[int, int]]:
        """Device → its peaks since they were last taken."""
        return {device: self._peaks(device) for device in _used()}

    def take(self) -> dict[int, tuple[int, int]]:
        """Device → its peaks since the last call; then they begin anew."""
        peaks = {}
        for device in _used():
            peaks[device] = self._peaks(device)
            hidden = self._hidden.setdefault(device, {})
            for path, counter in _counters(torch._C._cuda_memoryStats(device)):
                hidden[path] = max(hidden.get(path, 0), counter["peak"])
            torch._C._cuda_resetPeakMemoryStats(device)
            self._running.pop(device, None)
        return peaks

    def _peaks(self, device: int) -> tuple[int, int]:
        stats = torch._C._cuda_memoryStats(device)
        before = self._running.get(device, (0, 0))
        return max(before[0], stats[PEAKS[0]]["all"]["peak"]), max(before[1], stats[PEAKS[1]]["all"]["peak"])

    def _program_reads(self, device: Any = None) -> dict[str, Any]:
        stats: dict[str, Any] = self._stats(device)
        hidden = self._hidden.get(_index(device), {})
        for path, counter in _counters(stats):
            counter["peak"] = max(counter["peak"], hidden.get(path, 0))
        return stats

    def _program_resets(self, device: Any = None) -> None:
        index = _index(device)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._running[index] = self._peaks(index)
        self._hidden.pop(index, None)
        self._reset(device)


def _counters(stats: Mapping[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], dict[str, int]]]:
    """Each counter of torch's statistics that has a peak, with its path of names."""
    if "peak" in stats:
        yield path, stats  # type: ignore[misc]
        return
    for name, inner in stats.items():
        if isinstance(inner, Mapping):
            yield from _counters(inner, *path, name)


def _used() -> list[int]:
    """Devices on which something was reserved."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    counts = range(torch.cuda.device_count())
    return [index for index in counts if torch._C._cuda_memoryStats(index)["reserved_bytes"]["all"]["peak"]]


def _index(device: Any) -> int:
    from torch.cuda._utils import _get_device_index

    return int(_get_device_index(device, optional=True))

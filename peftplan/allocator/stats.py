"""Counters of the allocator and their peaks: over all, and by phase, each with the event at which it was first reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peaks:
    """Highest values of a window and the index of the event that first reached each; -1: before any event.

    `allocated` as `torch.cuda.max_memory_allocated` (sum of block sizes), `requested` as the statistic `requested_bytes` (before
    rounding), `reserved` as `torch.cuda.max_memory_reserved` (sum of segments).
    """

    allocated: int
    requested: int
    reserved: int
    allocated_at: int
    requested_at: int
    reserved_at: int

    def __or__(self, later: Peaks) -> Peaks:
        """The peaks of both windows; a tie belongs to the earlier one."""
        allocated = max((self.allocated, self.allocated_at), (later.allocated, later.allocated_at), key=_value)
        requested = max((self.requested, self.requested_at), (later.requested, later.requested_at), key=_value)
        reserved = max((self.reserved, self.reserved_at), (later.reserved, later.reserved_at), key=_value)
        return Peaks(allocated[0], requested[0], reserved[0], allocated[1], requested[1], reserved[1])


def _value(value_and_event: tuple[int, int]) -> int:
    return value_and_event[0]


class Stats:
    """Current bytes, and the peaks of the current window; a window ends where the phase changes or peaks are reset.

    A phase starts at the level that it meets, as after `torch.cuda.reset_peak_memory_stats()`.
    """

    __slots__ = (
        "_by_phase",
        "_earlier",
        "_peak_allocated",
        "_peak_allocated_at",
        "_peak_requested",
        "_peak_requested_at",
        "_peak_reserved",
        "_peak_reserved_at",
        "_start",
        "allocated",
        "event",
        "phase",
        "requested",
        "reserved",
    )

    def __init__(self) -> None:
        self.allocated = self.requested = self.reserved = 0
        self.event = -1
        self.phase = ""
        self._by_phase: dict[str, Peaks] = {}
        self._earlier: Peaks | None = None
        self._start = -1
        self._peak_allocated = self._peak_requested = self._peak_reserved = 0
        self._peak_allocated_at = self._peak_requested_at = self._peak_reserved_at = -1

    def allocate(self, size: int, requested: int) -> None:
        """A block of `size` bytes went to a request of `requested` bytes."""
        self.allocated += size
        self.requested += requested
        if self.allocated > self._peak_allocated:
            self._peak_allocated, self._peak_allocated_at = self.allocated, self.event
        if self.requested > self._peak_requested:
            self._peak_requested, self._peak_requested_at = self.requested, self.event

    def release(self, size: int, requested: int) -> None:
        """A block came back."""
        self.allocated -= size
        self.requested -= requested

    def reserve(self, nbytes: int) -> None:
        """The device gave memory."""
        self.reserved += nbytes
        if self.reserved > self._peak_reserved:
            self._peak_reserved, self._peak_reserved_at = self.reserved, self.event

    def unreserve(self, nbytes: int) -> None:
        """Memory went back to the device."""
        self.reserved -= nbytes

    @property
    def peaks(self) -> Peaks:
        """Peaks since the start or the last reset."""
        return self._window() if self._earlier is None else self._earlier | self._window()

    @property
    def peaks_by_phase(self) -> dict[str, Peaks]:
        """Peaks of each phase that had an event, in order of first appearance; a reset does not touch them."""
        return dict(self._by_phase) if self.event == self._start else {**self._by_phase, self.phase: self._phase_peaks()}

    def begin_phase(self, phase: str) -> None:
        """What follows belongs to `phase`; the same name again continues it."""
        if phase != self.phase:
            self._earlier = self.peaks
            self._close_window()
            self.phase = phase

    def reset_peaks(self) -> None:
        """The overall peaks start again at the current level."""
        self._earlier = None
        self._close_window()

    def _phase_peaks(self) -> Peaks:
        before = self._by_phase.get(self.phase)
        return self._window() if before is None else before | self._window()

    def _window(self) -> Peaks:
        return Peaks(
            allocated=self._peak_allocated,
            requested=self._peak_requested,
            reserved=self._peak_reserved,
            allocated_at=self._peak_allocated_at,
            requested_at=self._peak_requested_at,
            reserved_at=self._peak_reserved_at,
        )

    def _close_window(self) -> None:
        if self.event != self._start:
            self._by_phase[self.phase] = self._phase_peaks()
        self._start = self.event
        self._peak_allocated, self._peak_requested, self._peak_reserved = self.allocated, self.requested, self.reserved
        self._peak_allocated_at = self._peak_requested_at = self._peak_reserved_at = self.event

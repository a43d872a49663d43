"""The result of a request that does not fit."""

from __future__ import annotations

from dataclasses import dataclass

from peftplan.units import format_bytes


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A request that failed after everything that could be released had been; all sizes in bytes, taken at that moment.

    `size` is the rounded request, `wanted` what was asked of the device for it, `missing` how much more memory the device
    would have had to have. `fragmented` is free memory inside segments, useless to this request, and `largest_free` its
    largest block.
    """

    event: int
    id: int
    stream: int
    requested: int
    size: int
    wanted: int
    missing: int
    allocated: int
    reserved: int
    fragmented: int
    largest_free: int

    @property
    def for_fragmentation(self) -> bool:
        """Whether the free memory inside segments, were it in one piece, would have held the request."""
        return self.size <= self.fragmented

    def __str__(self) -> str:
        return (
            f"out of memory at event {self.event}: {format_bytes(self.requested)} requested, "
            f"{format_bytes(self.missing)} missing; {format_bytes(self.allocated)} allocated, "
            f"{format_bytes(self.reserved)} reserved, {format_bytes(self.fragmented)} free in pieces of at most "
            f"{format_bytes(self.largest_free)}"
        )

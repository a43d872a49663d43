"""The rows of `peftplan sweep --format jsonl`."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from peftplan.results.documents import VerdictName


class SweepRowDocument(TypedDict):
    """One point on one card. Every other option of the grid has a field of its name."""

    model: str
    method: str
    batch_size: int | None
    seq_len: int | None
    r: int | None
    trainable_parameters: int | None
    requested_bytes: int | None
    """What tensors request at the peak, without what the allocator adds."""
    peak_allocated: int | None
    """Of a point that was replayed."""
    peak_reserved: int | None
    gpu: str | None
    usable_bytes: int | None
    context_bytes: int | None
    needed_bytes: int | None
    headroom_bytes: int | None
    verdict: VerdictName | None
    """`null` where more points would have to be replayed."""
    decided_by: Literal["requested", "bound", "replay"] | None
    """How the verdict came about."""
    error: str | None
    """Why this combination is refused."""

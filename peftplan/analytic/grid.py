"""A job over a grid of sizes: requested bytes at each point, and the verdict of each card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftplan.errors import MissingExtraError

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("a grid of sizes (numpy)", "sweep") from None


@dataclass(frozen=True, eq=False)
class Grid:
    """A job at many sizes. All arrays have the broadcast shape of `sizes`; bytes are int64.

    Requested bytes are those of the first card's kernels. An `Estimate` adds the tails of blocks, which torch's allocator hands
    out whole.

    `allocated_bytes`, `reserved_bytes`: masked arrays; only replayed points have a value.
    `verdicts`: card → an array of verdicts, None if no rule decides.
    `decided_by`: card → an array of the rule that decides: `requested` (the requested bytes), `bound` (an upper bound on what the
    allocator adds, `planning.decided`), `replay`, or None.
    """

    sizes: Mapping[str, Any]
    requested_by_phase: dict[str, Any]
    allocated_bytes: object = None
    reserved_bytes: object = None
    verdicts: Mapping[str, object] = field(default_factory=dict)
    decided_by: Mapping[str, object] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and all(
            mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
            for mine, theirs in ((self.sizes, other.sizes), (self.requested_by_phase, other.requested_by_phase))
        )

    @property
    def batch_size(self) -> object:
        """Sequences per device and step at each point."""
        return self.sizes["batch_size"]

    @property
    def seq_len(self) -> object:
        """Tokens per sequence at each point."""
        return self.sizes["seq_len"]

    @property
    def peak_requested_bytes(self) -> object:
        """The highest peak of all phases at each point, in requested bytes."""
        return np.maximum.reduce(list(self.requested_by_phase.values()))

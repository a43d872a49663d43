"""A job over a grid of sizes: requested bytes at each point, and the verdict of each card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftplan.arrays import Ints, Objects
from peftplan.errors import MissingExtraError
from peftplan.frames import as_html, dataframe
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("a grid of sizes (numpy)", "sweep") from None


@dataclass(frozen=True, eq=False, repr=False)
class Grid:
    """A job at many sizes. All arrays have the broadcast shape of `sizes`; bytes are int64.

    Requested bytes are those of the first card's kernels. An `Estimate` adds the tails of blocks, which torch's allocator hands
    out whole.

    `allocated_bytes`, `reserved_bytes`: masked arrays; only replayed points have a value.
    `verdicts`: card → an array of verdicts, None if no rule decides.
    `decided_by`: card → an array of the rule that decides: `requested` (the requested bytes), `bound` (an upper bound on what the
    allocator adds, `planning.decided`), `replay`, or None.
    """

    sizes: Mapping[str, Ints]
    requested_by_phase: dict[str, Ints]
    allocated_bytes: Ints | None = None
    reserved_bytes: Ints | None = None
    verdicts: Mapping[str, Objects] = field(default_factory=dict)
    decided_by: Mapping[str, Objects] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and all(
            mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
            for mine, theirs in ((self.sizes, other.sizes), (self.requested_by_phase, other.requested_by_phase))
        )

    @property
    def batch_size(self) -> Ints:
        """Sequences per device and step at each point."""
        return self.sizes["batch_size"]

    @property
    def seq_len(self) -> Ints:
        """Tokens per sequence at each point."""
        return self.sizes["seq_len"]

    @property
    def peak_requested_bytes(self) -> Ints:
        """The highest peak of all phases at each point, in requested bytes."""
        peak: Ints = np.maximum.reduce(list(self.requested_by_phase.values()))
        return peak

    def __repr__(self) -> str:
        peak = self.peak_requested_bytes
        on = f" on {', '.join(self.verdicts)}" if self.verdicts else ""
        least, most = format_bytes(int(peak.min())), format_bytes(int(peak.max()))
        return f"<Grid of {' × '.join(map(str, peak.shape)) or 1} points over {', '.join(self.sizes)}{on}: {least} to {most}>"

    def __iter__(self) -> Iterator[dict[str, object]]:
        """A row per point and card, named as those of `peftplan.sweep`.

        Bytes are those of the first card's kernels, None where nothing was replayed.
        """
        sizes = {name: np.asarray(values).ravel().tolist() for name, values in self.sizes.items()}
        replayed = {"peak_allocated": self.allocated_bytes, "peak_reserved": self.reserved_bytes}
        memory = {name: values.ravel().tolist() for name, values in replayed.items() if values is not None}
        words = {card: (self.verdicts[card], self.decided_by[card]) for card in self.verdicts}
        by_card = {card: [values.ravel().tolist() for values in both] for card, both in words.items()}
        for point, requested in enumerate(self.peak_requested_bytes.ravel().tolist()):
            row: dict[str, object] = {name: values[point] for name, values in sizes.items()}
            row["requested_bytes"] = requested
            row |= {name: values[point] for name, values in memory.items()}
            for card, (verdicts, by) in by_card.items():
                yield {**row, "gpu": card, "verdict": verdicts[point], "decided_by": by[point]}
            if not by_card:
                yield row

    @property
    def num_rows(self) -> int:
        """Rows: points × cards."""
        return self.peak_requested_bytes.size * max(len(self.verdicts), 1)

    def records(self) -> list[dict[str, object]]:
        """All rows, which pandas and polars accept."""
        return list(self)

    def to_dataframe(self) -> DataFrame:
        """`records()` as a pandas DataFrame."""
        return dataframe(self.records())

    def _repr_html_(self) -> str:
        return as_html(self)

"""An estimate at other sizes: one, or a grid of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peftplan.analytic.compiled import Compiled
from peftplan.analytic.moments import Moments
from peftplan.errors import InputError, MissingExtraError
from peftplan.job.setup import MOST, check_length, check_logits_to_keep

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("a grid of sizes (numpy)", "sweep") from None


@dataclass(frozen=True, eq=False)
class Grid:
    """What tensors request at the peaks of one job at many sizes: arrays of the broadcast shape of `batch_size` and `seq_len`,
    bytes as int64. An `Estimate` also counts the tails of blocks that torch's allocator hands out whole.
    """

    batch_size: Any
    seq_len: Any
    requested_by_phase: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Grid)
            and np.array_equal(self.batch_size, other.batch_size)
            and np.array_equal(self.seq_len, other.seq_len)
            and self.requested_by_phase.keys() == other.requested_by_phase.keys()
            and all(np.array_equal(other.requested_by_phase[phase], at) for phase, at in self.requested_by_phase.items())
        )

    @property
    def peak_requested_bytes(self) -> Any:
        """The overall peak at each point."""
        return np.maximum.reduce(list(self.requested_by_phase.values()))


def evaluate(
    compile_at: Callable[[int, int], Compiled],
    *,
    batch_size: Any,
    seq_len: Any,
    max_positions: int | None,
    logits_to_keep: int | None = None,
) -> Grid:
    """The peaks at every pair of `batch_size` and `seq_len` (whole numbers or arrays of them, broadcast against each other).

    `compile_at` compiles the job at one size; points that run the same operations share what it returns. Raises InputError for
    sizes below 1, and for sequences longer than `max_positions` or shorter than `logits_to_keep`.
    """
    b, s = np.broadcast_arrays(np.asarray(batch_size), np.asarray(seq_len))
    for name, values in (("batch_size", b), ("seq_len", s)):
        if values.dtype.kind not in "iu" or values.size == 0 or values.min() < 1 or values.max() > MOST:
            raise InputError(name, values.tolist(), f"accepted: whole numbers from 1 to {MOST}")
    check_length(int(s.max()), max_positions)
    check_logits_to_keep(logits_to_keep, int(s.min()))
    flat = {"b": b.astype(np.int64).ravel(), "s": s.astype(np.int64).ravel()}
    first = compile_at(int(flat["b"][0]), int(flat["s"][0]))
    facts = first.facts(flat["b"], flat["s"])
    codes: Any = sum(np.asarray(fact).astype(np.int64) << bit for bit, fact in enumerate(facts))
    by_phase: dict[str, Any] = {}
    for code in np.unique(codes):
        points = np.flatnonzero(codes == code)
        part = {name: values[points] for name, values in flat.items()}
        compiled = compile_at(int(part["b"][0]), int(part["s"][0]))
        for phase, values in _peaks(compiled, part).items():
            by_phase.setdefault(phase, np.empty(len(codes), dtype=np.int64))[points] = values
    return Grid(b, s, {phase: values.reshape(b.shape) for phase, values in by_phase.items()})


def _peaks(compiled: Compiled, at: dict[str, Any]) -> dict[str, Any]:
    named = compiled.sizes(at["b"], at["s"])
    loading = np.full(len(at["b"]), compiled.loading_bytes)
    return {"load": loading, **Moments(compiled.timeline).peaks(named, compiled.standing_bytes)}

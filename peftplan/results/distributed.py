"""What a result says of several GPUs: the strategy, the groups of ranks with their bytes, and what is not counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from peftplan.distributed.names import ALWAYS

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed


class Peaks(Protocol):
    """What is read of a rank's peaks (`results.estimate.Peaks`), when it is asked for: they may be replayed then."""

    @property
    def by_phase(self) -> Mapping[str, int]:
        """Phase → allocated bytes."""

    @property
    def allocated(self) -> int:
        """The overall peak."""

    @property
    def reserved(self) -> int | None:
        """What the allocator holds at most."""


class RankGroup(NamedTuple):
    """Ranks that hold the same."""

    ranks: tuple[int, ...]
    """The first and the last of them."""
    persistent: int
    """Device bytes that last from step to step, and the gradients."""
    peaks: Peaks | None

    def to_dict(self) -> dict[str, object]:
        """The group in the JSON."""
        first, last = self.ranks[0], self.ranks[-1]
        peaks = self.peaks
        return {
            "ranks": {"first": first, "last": last, "count": last - first + 1},
            "persistent": self.persistent,
            "peak_by_phase": peaks and dict(peaks.by_phase),
            "peak_allocated": peaks and peaks.allocated,
            "peak_reserved": peaks and peaks.reserved,
        }


class OverGpus(NamedTuple):
    """How a job is divided, and what its ranks need."""

    strategy: Distributed
    batch_size: int
    """Sequences of a rank per micro batch."""
    accumulation: int
    ranks: tuple[RankGroup, ...]
    host_bytes: int
    """Host memory of a rank that outlasts a step: what is offloaded."""
    not_counted: tuple[str, ...]

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.strategy.replicas

    @property
    def words(self) -> str:
        """What the numbers are of, as a person reads it."""
        if self.strategy.strategy == "device-map":
            return f"{self.strategy.called}: bytes of the GPU that needs most; batch size {self.batch_size}"
        return (
            f"{self.strategy.called}: bytes of the largest rank; batch size {self.batch_size} per rank, "
            f"{self.global_batch_size} per step"
        )

    def to_dict(self) -> dict[str, object]:
        """The block `distributed` of the JSON."""
        strategy = self.strategy
        fields = strategy.model_dump(mode="json", exclude_none=True, exclude=set(ALWAYS))
        return {
            "strategy": strategy.strategy,
            "world_size": strategy.world_size,
            "gpus_per_node": strategy.gpus or 1,
            "nodes": strategy.nodes,
            "groups": {"shard": strategy.shards if strategy.facts.splits_weights else 1, "replicas": strategy.replicas},
            "parameters": fields,
            "batch_size_per_rank": self.batch_size,
            "global_batch_size": self.global_batch_size,
            "ranks": [group.to_dict() for group in self.ranks],
            "host": {"per_rank": self.host_bytes, "per_node": self.host_bytes * (strategy.gpus or 1)},
            "not_counted": list(self.not_counted),
        }

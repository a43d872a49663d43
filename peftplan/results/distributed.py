"""What a result says of several GPUs: the strategy, the groups of ranks with their bytes, and what is not counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from peftplan.distributed.names import ALWAYS
from peftplan.ledger import Ledger
from peftplan.results.lines import line_documents
from peftplan.units import format_bytes, in_ranges

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed


class Peaks(Protocol):
    """What is read of a rank's peaks (`results.peaks.Peaks`), when it is asked for: they may be replayed then."""

    @property
    def ledgers(self) -> Mapping[str, Ledger]:
        """Phase → the tensors alive at its peak."""

    @property
    def by_phase(self) -> Mapping[str, int]:
        """Phase → allocated bytes."""

    @property
    def phase(self) -> str:
        """The phase of the overall peak."""

    @property
    def allocated(self) -> int:
        """The overall peak."""

    @property
    def reserved(self) -> int | None:
        """What the allocator holds at most."""


class RankGroup(NamedTuple):
    """Ranks that need the same."""

    ranks: tuple[int, ...]
    """All of them, in order."""
    static: Ledger
    """What lasts from step to step, and the gradients; of the first of them, where tensors of equal bytes have other names."""
    peaks: Peaks | None

    @property
    def persistent(self) -> int:
        """Device bytes that last from step to step, and the gradients."""
        return self.static.bytes()

    @property
    def words(self) -> str:
        """The ranks as a person reads them: `0, 2-7`."""
        return in_ranges(self.ranks, between=", ")

    def to_dict(self) -> dict[str, object]:
        """The group in the JSON."""
        peaks = self.peaks
        shown = peaks.ledgers[peaks.phase] if peaks else self.static
        return {
            "ranks": {"first": self.ranks[0], "last": self.ranks[-1], "count": len(self.ranks), "words": self.words},
            "persistent": self.persistent,
            "peak_by_phase": peaks and dict(peaks.by_phase),
            "peak_allocated": peaks and peaks.allocated,
            "peak_reserved": peaks and peaks.reserved,
            "lines": line_documents(shown, peaks.ledgers if peaks else {}),
        }


class Shares(Protocol):
    """What the groups of ranks are made from (`planning.over_gpus.Shares`), as data."""

    def groups(self) -> tuple[RankGroup, ...]: ...

    def at_worst(self) -> Peaks | None: ...


@dataclass(frozen=True)
class OverGpus:
    """How a job is divided, and what its ranks need."""

    strategy: Distributed
    batch_size: int
    """Sequences of a rank per micro batch."""
    accumulation: int
    host_bytes: int
    """Host memory of a rank that outlasts a step: what is offloaded."""
    not_counted: tuple[str, ...]
    shares: Shares = field(repr=False, compare=False)

    @cached_property
    def ranks(self) -> tuple[RankGroup, ...]:
        """The ranks, equal ones in a group, counted when they are first read."""
        return self.shares.groups()

    @cached_property
    def worst_routing(self) -> Peaks | None:
        """The peaks of the rank to whose experts all ranks send every token; None without such experts, or a formula for it."""
        return self.shares.at_worst()

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step over all ranks."""
        return self.batch_size * self.strategy.chunks * self.accumulation * self.strategy.replicas

    @property
    def words(self) -> str:
        """What the numbers are of, as a person reads it."""
        if self.strategy.strategy == "device-map":
            return f"{self.strategy.called}: bytes of the GPU that needs most; batch size {self.batch_size}"
        ranks = "rank" if self.strategy.sharing == 1 else f"{self.strategy.sharing} ranks, which share each row"
        return (
            f"{self.strategy.called}: bytes of the largest rank; batch size {self.batch_size} per {ranks}, "
            f"{self.global_batch_size} per step{self._at_worst}"
        )

    @property
    def _at_worst(self) -> str:
        """What routing decides, where tokens are counted in balance."""
        if self.strategy.routing == "worst" or self.worst_routing is None:
            return ""
        return f"; {format_bytes(self.worst_routing.allocated)} where all tokens go to one rank"

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
            "worst_routing": (worst := self.worst_routing)
            and {"peak_allocated": worst.allocated, "peak_reserved": worst.reserved, "peak_by_phase": dict(worst.by_phase)},
            "not_counted": list(self.not_counted),
        }

"""The peaks of a job: what is alive at each phase, and what the allocator reserves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from peftplan.ledger import Ledger

if TYPE_CHECKING:
    from peftplan.results.documents import Phase
    from peftplan.results.series import Recording

PHASES: tuple[Phase, ...] = ("load", "forward", "backward", "step")
ALL_PHASES = ("load", "generate", "forward", "backward", "step", "evaluate")
"""`generate`: the policy of an RL trainer writes completions. `evaluate`: a batch without gradients, between steps."""


@dataclass(frozen=True)
class Peaks:
    """The peaks of a steady training step as torch's allocator counts them: what is alive at each phase's own peak moment, the
    tails of blocks that it hands out whole included, and what it reserves.

    `incomplete` lists what the engine met and could not follow; the peaks are then lower bounds. `recording` is the whole run,
    where it was asked for and the engine has one.
    """

    ledgers: Mapping[str, Ledger]
    reserved: int | None = None
    """What the allocator holds at most, comparable with `torch.cuda.max_memory_reserved()`; None where it is not known."""
    reserved_source: str | None = None
    incomplete: tuple[str, ...] = ()
    recording: Recording | None = field(default=None, repr=False, compare=False)
    assumed: Mapping[str, object] = field(default_factory=dict)
    """What the engine took for granted besides the setup: what else a sample holds, which kernels ran."""
    devices: tuple[Peaks, ...] = field(default=(), repr=False)
    """The peaks of each GPU of a `device_map`, if a trace has them; the other fields are those of the GPU that needs most."""
    of_ranks: tuple[tuple[int, Peaks], ...] = field(default=(), repr=False)
    """Each rank that was traced, with its peaks, where several were."""
    unreserved: str | None = None
    """Why reserved bytes are not known, where allocated ones are."""
    reserved_with_care: int | None = None
    """More than what is likely to be reserved, where reserved bytes are not known and a replay comes near."""
    late: Peaks | None = field(default=None, repr=False, compare=False)
    """Of a trace under FSDP1, the peaks by formula where they reserve the same if the GPU is never late: they say what a late one
    reserves."""

    @property
    def scope(self) -> str | None:
        """`text` where images are not counted; None where all of a sample is."""
        return "text" if self.assumed.get("images_per_sample") == 0 else None

    @cached_property
    def by_phase(self) -> dict[str, int]:
        """Phase → allocated bytes at its peak, in the order of `ALL_PHASES`."""
        return {phase: self.ledgers[phase].bytes() for phase in ALL_PHASES if phase in self.ledgers}

    @property
    def phase(self) -> str:
        """The phase of the overall peak; ties go to the earlier one."""
        return max(self.by_phase, key=self.by_phase.__getitem__)

    @property
    def allocated(self) -> int:
        """The overall peak, comparable with `torch.cuda.max_memory_allocated()`."""
        return self.by_phase[self.phase]

    @property
    def static(self) -> Ledger | None:
        """What lasts on the rank whose peaks these are, and its gradients, where that depends on the rank; None elsewhere."""
        return None

    @property
    def reserved_at_most(self) -> int | None:
        """Reserved bytes of the GPU that reserves most, under FSDP1 if it is as late as it may be with blocks that are freed."""
        each = (self, *self.devices, *(of_rank for _, of_rank in self.of_ranks))
        late = None if self.late is None else self.late.reserved_at_most
        return max((own for own in (late, *(of_one.reserved for of_one in each)) if own is not None), default=None)

    @property
    def by_pace(self) -> bool:
        """Whether reserved bytes depend on how late the GPU is, and `reserved_at_most` is that of the latest one: under FSDP1,
        where the allocator keeps a block until the GPU has passed it (`record_stream`).
        """
        return self.late is not None

    def may_run_within(self, capacity_bytes: int) -> bool:
        """Whether it depends on the GPU's timing if the job runs with this many bytes for the allocator."""
        return self.late is not None and self.late.may_run_within(capacity_bytes)

    @property
    def at_least(self) -> int:
        """A lower bound of the overall peak, known without a replay."""
        return self.allocated

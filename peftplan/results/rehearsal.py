"""What a rehearsal showed: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from peftplan.results.estimate import SCHEMA_VERSION
from peftplan.results.series import Recording
from peftplan.results.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: phase → allocated bytes at its peak."""

    step: int
    peak_by_phase: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Alive:
    """Blocks that one line of the program, or of a library if there is none, allocated."""

    file: str
    line: int
    function: str
    bytes: int
    blocks: int
    category: str | None = None


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """The allocation that failed. `file` and `line`: the innermost frame outside installed packages and the standard library.

    `reserved_bytes`: what torch's allocator still held then, after it had given back all that it could.
    """

    rank: int
    device: int
    phase: str
    step: int
    requested_bytes: int
    reserved_bytes: int
    file: str | None
    line: int | None
    code: str | None
    alive: tuple[Alive, ...]


@dataclass(frozen=True, slots=True)
class Rank:
    """One device of one rank, in bytes as torch's own allocator counted them.

    `peak_by_phase` leaves the first step out where there are more. `device_total`: reserved bytes, and the card's context.
    """

    rank: int
    device: int
    peak_allocated: int
    peak_reserved: int
    device_total: int
    peak_by_phase: Mapping[str, int]
    reserved_by_phase: Mapping[str, int]
    steps: tuple[Step, ...]
    by_category: Mapping[str, int]
    largest: tuple[Alive, ...]
    cache_released: int
    """How often the allocator gave cached memory back because the card had no more."""
    host: Mapping[str, int]
    """Host memory of the rank's tensors: `pinned` at most, `pageable` after the last step."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A program's run on an emulated card.

    `ended`: `steps` where it was ended after the steps that were wanted, `program` where it ended itself, `out_of_memory`,
    `timeout`, `host_memory` where it took more of the host than it was allowed to. `program_exit` is its exit code, negative for
    a signal as in `subprocess`. `recording`: every allocation, where it was to be kept; not part of the JSON.
    """

    command: tuple[str, ...]
    ended: str
    program_exit: int
    steps: int
    ranks: tuple[Rank, ...]
    oom: OutOfMemory | None
    gpus: tuple[Verdict, ...]
    replaced: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    world_size: int = 1
    host_bytes: int = 0
    """Host memory that its processes and what they wrote took at most."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package → version, of what the program imported."""
    recording: Recording | None = field(default=None, compare=False, repr=False)

    @property
    def largest_rank(self) -> Rank | None:
        """The rank and device whose peak decides."""
        return max(self.ranks, key=lambda rank: (rank.peak_reserved, rank.peak_allocated), default=None)

    @property
    def needed_bytes(self) -> int:
        """What the card has to hold at most: reserved bytes and context."""
        return max((rank.device_total for rank in self.ranks), default=0)

    @property
    def exit_code(self) -> int:
        """0 after the wanted steps, 1 out of memory or out of time, else the program's own (128 + a signal)."""
        if self.ended == "steps":
            return 0
        if self.ended in ("out_of_memory", "timeout", "host_memory"):
            return 1
        return self.program_exit if self.program_exit >= 0 else 128 - self.program_exit

    def to_dict(self) -> dict[str, object]:
        """As JSON states it."""
        fields = asdict(replace(self, recording=None))
        del fields["recording"]
        verdicts = [verdict.to_dict() for verdict in self.gpus]
        largest = self.largest_rank
        peak = {"peak_allocated": largest.peak_allocated, "peak_reserved": largest.peak_reserved} if largest else {}
        return {"schema_version": SCHEMA_VERSION, "engine": "rehearsed", **peak, **fields, "gpus": verdicts}

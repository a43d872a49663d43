"""What a trace finds: the log of a step, its peaks, and its events for the allocator's replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from peftplan.allocator.events import Event
from peftplan.allocator.replay import Replay, replay
from peftplan.depth.log import Moment, category_of
from peftplan.ledger import Category
from peftplan.trace.events.peaks import Alive, Peak, Window
from peftplan.trace.load import EMPTIED, PASSES


@dataclass(frozen=True)
class Traced:
    """The result of a trace. Bytes are allocated bytes, each storage rounded up to 512."""

    peaks: Mapping[str, Peak]
    num_trainable: int
    num_total: int
    log: tuple[Moment, ...]
    windows: tuple[Window, ...]
    began: tuple[tuple[int, str], ...]
    started: int
    managed_bytes: int
    unknown_ops: Mapping[str, int]
    """Module → how often it read a value, which fake tensors do not have."""
    depths: tuple[int, ...] = ()
    """Depths at which the repeated layers were traced; empty if the whole model was."""
    facts: Mapping[str, int | str] = field(default_factory=dict)
    """The contents of the batch besides batch × seq tokens."""
    replaced: tuple[str, ...] = ()
    """Packages whose kernels the model would use if they were installed; its torch code was traced instead."""
    host_bytes: int = 0
    """The most pinned host memory that holds what is offloaded until backward."""
    device_of: Mapping[int, int] = field(default_factory=dict)
    """Number of a storage → its GPU, in the log of several."""
    devices: tuple[Traced, ...] = ()
    """Each GPU of a `device_map`, whose own trace is that of the GPU that needs most."""
    prepared: bool = False
    """Whether peft prepared a quantized base, after which it empties the cache (0.20 on, `prepare_model_for_kbit_training`)."""

    @cached_property
    def peak_by_phase(self) -> dict[str, int]:
        """Phase → peak of allocated bytes in it; forward, backward and step are those from the second step on."""
        return {phase: peak.bytes for phase, peak in self.peaks.items()}

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """The log for the allocator's replay. Events outside the reported phases have the phase `warmup`."""
        phases = ["warmup"] * len(self.log)
        for window in self.windows:
            phases[window.start : window.end] = [window.phase] * (window.end - window.start)
        return tuple(map(_event, self.log, phases))

    @cached_property
    def replayed(self) -> Replay:
        """The log, replayed through torch's allocator with default options: peaks with tails of blocks, and reserved bytes."""
        return replay(self.emptied(self.events))

    def emptied(self, events: Sequence[Event]) -> Sequence[Event]:
        """The events, with the cache emptied once the base is prepared, before adapters are created."""
        if not self.prepared:
            return events
        loaded = [i for i, event in enumerate(events) if event.phase == "load"]
        of_adapters = (i for i in loaded if events[i].category == "adapter_weights" or events[i].op == PASSES)
        at = next(of_adapters, loaded[-1] + 1)
        return [*events[:at], Event("empty_cache", phase="load"), *events[at:]]

    @property
    def peak_phase(self) -> str:
        """The phase of the overall peak; ties go to the earlier one."""
        return max(self.peaks, key=lambda phase: self.peaks[phase].bytes)

    @property
    def alive(self) -> tuple[Alive, ...]:
        """The tensors alive at the overall peak, in groups, the largest first."""
        return self.peaks[self.peak_phase].alive

    def by_category(self, phase: str | None = None) -> dict[Category, int]:
        """Bytes per category at a phase's peak, or at the overall one."""
        totals: dict[Category, int] = {}
        for group in self.peaks[phase or self.peak_phase].alive:
            totals[group.category] = totals.get(group.category, 0) + group.bytes
        return totals


def _event(moment: Moment, phase: str) -> Event:
    """A line of the log as an event of the allocator. The event that allocates a storage names it."""
    kind, storage, _, module = moment
    if storage.op == EMPTIED:
        return Event("empty_cache", phase=phase)
    if kind == "free":
        return Event("free", storage.id, phase=phase, module=module)
    return Event(
        "alloc", storage.id, storage.nbytes, storage.stream, phase, storage.op, module, category_of(storage), storage.name or ""
    )

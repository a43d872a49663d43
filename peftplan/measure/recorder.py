"""Peaks by phase: the counters are read and reset wherever a step program says that a phase begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from peftplan.ledger import Category
from peftplan.measure.cuda import Device, Reading

LOAD, BETWEEN = "load", "between"
"""Before the first step; and between steps, where a trainer logs, evaluates and saves."""
STEP_GOES_ON = ("forward", "backward")
"""Phases after which a forward belongs to the same step: accumulation."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What one phase showed. `step` counts optimizer steps from 1; 0 is loading. `allocated_after` is what it left alive."""

    step: int
    phase: str
    allocated: int
    reserved: int
    allocated_after: int
    reserved_after: int
    process: int | None
    used: int | None

    def to_dict(self) -> dict[str, int | str]:
        """The figure as a record states it; what the driver does not say is left out."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


@dataclass
class Recorder:
    """A step program's watcher on a real device: one figure per phase, in order.

    The driver's figures are read at the end of each phase: reserved memory only grows within one, so that is its peak unless the
    allocator gave segments back. Reading waits for the device, which changes no byte.
    """

    device: Device
    phase: str = LOAD
    began: list[tuple[int, str]] = field(default_factory=lambda: [(0, LOAD)])
    figures: list[Figure] = field(default_factory=list)
    step: int = 0

    def begin(self, phase: str) -> None:
        """Close the phase that runs and begin another; a forward after a step begins the next step."""
        self.close()
        if phase == "forward" and self.phase not in STEP_GOES_ON:
            self.step += 1
        self.phase = phase
        self.began.append((len(self.figures), phase))

    def close(self) -> None:
        """Read the phase that runs and reset the peaks."""
        self.device.synchronize()
        self.figures.append(_figure(self.step, self.phase, self.device.read(), self.device))
        self.device.reset_peaks()

    def register(self, tensor: torch.Tensor, category: Category, name: str, *, op: str = "load") -> None:
        """Only the trace engine names tensors."""


def _figure(step: int, phase: str, now: Reading, device: Device) -> Figure:
    return Figure(
        step=step,
        phase=phase,
        allocated=now.peak_allocated,
        reserved=now.peak_reserved,
        allocated_after=now.allocated,
        reserved_after=now.reserved,
        process=device.process_bytes(),
        used=device.used_bytes(),
    )


def steady(figures: Iterable[Figure], *, warmup: int) -> Iterator[Figure]:
    """The figures that count by phase: loading, and every step after the warm-up."""
    return (figure for figure in figures if figure.phase == LOAD or figure.step > warmup)

"""Peaks by phase: reads and resets the counters whenever a step program begins a phase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from peftplan.ledger import Category
from peftplan.measure.cuda import Device, Reading

LOAD, BETWEEN = "load", "between"
"""Phases before the first step, and between steps, when a trainer logs, evaluates and saves."""
STEP_GOES_ON = ("forward", "backward")
"""Phases after which a forward belongs to the same step (gradient accumulation)."""


@dataclass(frozen=True, slots=True)
class Figure:
    """The peaks of one phase. `step` counts optimizer steps from 1; 0 is loading. `allocated_after`: bytes alive at its end."""

    step: int
    phase: str
    allocated: int
    reserved: int
    allocated_after: int
    reserved_after: int
    process: int | None
    used: int | None

    def to_dict(self) -> dict[str, object]:
        """The figure as in a record, without values that the driver does not report."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


@dataclass
class Recorder:
    """Records a step program on a real device: one figure per phase, in order.

    The driver's figures are read at the end of each phase. Reserved memory only grows within a phase, so this is the peak unless
    the allocator released segments. Reading synchronizes with the device, which changes no byte.
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
        """Does nothing: only the trace engine names tensors."""


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
    """The figures that enter the peaks by phase: loading, and every step after the warm-up."""
    return (figure for figure in figures if figure.phase == LOAD or figure.step > warmup)

"""The analytic engine's entry point: a job's peaks per phase, from the model's forward run on a tape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftplan.analytic.compiled import Compiled, last_step
from peftplan.analytic.generation import generation_of
from peftplan.analytic.instant import InstantPeaks
from peftplan.job.inventory import Inventory, of_any_device, on_each_device

Moments = tuple[Mapping[str, tuple[int, int]], Mapping[str, int]]
"""Phase → (bytes at its peak, how many events lead to it); and what is assumed besides the setup."""
Known = dict[int, tuple[Compiled, Moments]]
"""The moments of compiled steps at one job's sizes, by the step's id."""


def analytic_peaks(inventory: Inventory, *, compute_capability: str) -> InstantPeaks:
    """The peaks of a steady step, in bytes. `compute_capability` such as `8.0` decides which kernels run.

    Of a `device_map`, and of unlike ranks, those of the GPU that needs most. Raises NeedsTraceError if only the trace engine
    knows the job, NoEngineError if neither does.
    """
    if of_any_device(inventory):
        return fullest(peaks_of_each(inventory, compute_capability=compute_capability))
    return peaks_of_one(inventory, compute_capability, {})


def peaks_of_one(inventory: Inventory, compute_capability: str, known: Known) -> InstantPeaks:
    """The peaks of one GPU. `known`: those of steps that need as much."""
    compiled_job, dims = last_step(inventory, compute_capability)
    of = compiled_job.like or compiled_job
    if id(of) not in known:
        peaks = compiled_job.timeline.peaks(dims, compiled_job.standing_bytes)
        known[id(of)] = of, (peaks, compiled_job.assumed(dims))
    moments, assumed = known[id(of)][1]
    requested = {"load": compiled_job.loading_bytes, **{phase: nbytes for phase, (nbytes, _) in moments.items()}}
    generation = generation_of(inventory, compiled_job, compute_capability=compute_capability)
    if generation is not None:
        requested["generate"] = compiled_job.standing_bytes + generation.peak[0]
    ends = {phase: at for phase, (_, at) in moments.items()}
    return InstantPeaks(inventory, compute_capability, requested, ends, assumed)


def peaks_of_each(of_any: Inventory, *, compute_capability: str) -> tuple[InstantPeaks, ...]:
    """Those of each GPU of a `device_map`, and under ZeRO-1 and ZeRO-2 of each rank that may need most."""
    known: Known = {}
    return tuple(peaks_of_one(of_one, compute_capability, known) for of_one in on_each_device(of_any))


def fullest(each: Iterable[InstantPeaks]) -> InstantPeaks:
    """Those of the GPU that needs most."""
    return max(each, key=lambda peaks: max(peaks.requested.values()))

"""The analytic engine's entry point: a job's peaks per phase, from the model's forward run on a tape."""

from __future__ import annotations

from peftplan.analytic.compiled import last_step
from peftplan.analytic.generation import generation_of
from peftplan.analytic.instant import InstantPeaks
from peftplan.job.inventory import Inventory, of_any_device, on_each_device


def analytic_peaks(inventory: Inventory, *, compute_capability: str) -> InstantPeaks:
    """The peaks of a steady step, in bytes. `compute_capability` such as `8.0` decides which kernels run.

    Of a `device_map`, and of unlike ranks, those of the GPU that needs most. Raises NeedsTraceError if only the trace engine
    knows the job, NoEngineError if neither does.
    """
    if of_any_device(inventory):
        each = [analytic_peaks(of_device, compute_capability=compute_capability) for of_device in on_each_device(inventory)]
        return max(each, key=lambda peaks: max(peaks.requested.values()))
    compiled_job, dims = last_step(inventory, compute_capability)
    moments = compiled_job.timeline.peaks(dims, compiled_job.standing_bytes)
    requested = {"load": compiled_job.loading_bytes, **{phase: nbytes for phase, (nbytes, _) in moments.items()}}
    generation = generation_of(inventory, compiled_job, compute_capability=compute_capability)
    if generation is not None:
        requested["generate"] = compiled_job.standing_bytes + generation.peak[0]
    ends = {phase: at for phase, (_, at) in moments.items()}
    return InstantPeaks(inventory, compute_capability, requested, ends, compiled_job.assumed(dims))

"""The analytic engine as an `Estimate` sees it: peaks per phase as ledgers, from the model's forward written on a tape."""

from __future__ import annotations

from peftplan.analytic.compiled import last_step
from peftplan.analytic.instant import InstantPeaks
from peftplan.job.inventory import Inventory


def analytic_peaks(inventory: Inventory, *, compute_capability: str) -> InstantPeaks:
    """The peaks of a steady step. Raises NeedsTraceError where only the trace engine can tell."""
    compiled_job, named = last_step(inventory, compute_capability)
    moments = compiled_job.timeline.peaks(named, compiled_job.standing_bytes)
    requested = {"load": compiled_job.loading_bytes, **{phase: nbytes for phase, (nbytes, _) in moments.items()}}
    ends = {phase: at for phase, (_, at) in moments.items()}
    return InstantPeaks(inventory, compute_capability, requested, ends, compiled_job.assumed(named))

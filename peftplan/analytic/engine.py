"""The analytic engine's entry point: a job's peaks per phase, from the model's forward run on a tape."""

from __future__ import annotations

from peftplan.analytic.instant import InstantPeaks, Known, peaks_of_one
from peftplan.analytic.of_ranks import OfRanks
from peftplan.analytic.rank_facts import devices, rank_facts
from peftplan.job.inventory import Inventory, first_ranks, in_stages, of_any_device, on_rank


def analytic_peaks(inventory: Inventory, *, compute_capability: str) -> InstantPeaks:
    """The peaks of a steady step, in bytes. `compute_capability` such as `8.0` decides which kernels run.

    Over several GPUs those of the one where they are largest, but of a job that is seen by one of its GPUs its own. Raises
    NeedsTraceError if only the trace engine knows the job, NoEngineError if neither does.
    """
    holding, known = inventory.holding, Known()
    if of_any_device(inventory):
        each = peaks_of_each(inventory, compute_capability, known)
        of_devices = inventory.job.distributed is not None and inventory.job.distributed.strategy == "device-map"
        return OfRanks(max(each, key=lambda peaks: max(peaks.requested.values())), each, known=known, of_devices=of_devices)
    own = peaks_of_one(inventory, compute_capability, known)
    alone = holding is None or holding.device is not None or holding.rank is not None
    return own if alone else OfRanks(own, known=known)


def peaks_of_each(of_any: Inventory, compute_capability: str, known: Known) -> tuple[InstantPeaks, ...]:
    """Those of each GPU of a `device_map`, of the first rank of each row of a pipeline, and under ZeRO-1 and ZeRO-2 of each rank
    of which one requests most."""
    if of_any.job.distributed is not None and of_any.job.distributed.strategy == "device-map":
        return tuple(peaks_of_one(of_device, compute_capability, known) for of_device in devices(of_any))
    if in_stages(of_any.job):
        ranks = first_ranks(of_any.job)
        return tuple(peaks_of_one(on_rank(of_any, rank), compute_capability, known) for rank in ranks)
    facts = rank_facts(of_any, compute_capability)
    assert facts.unlike is not None
    of_ranks = (facts.on_rank(rank)._replace(job=of_any.job) for rank in facts.unlike.largest)
    return tuple(peaks_of_one(of_rank, compute_capability, known) for of_rank in of_ranks)

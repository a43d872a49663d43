"""A job over several GPUs: what DeepSpeed refuses of it, and what its ranks hold."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from peftplan.job.inventory import inventory, on_each_device
from peftplan.job.job import Job
from peftplan.ledger import Ledger
from peftplan.parameters import Parameters
from peftplan.planning.assumed import of_ranks
from peftplan.results.estimate import Peaks

if TYPE_CHECKING:
    from peftplan.analytic.instant import InstantPeaks
    from peftplan.results.distributed import OverGpus, RankGroup


def refused_dtypes(job: Job, built: Parameters) -> str | None:
    """Why DeepSpeed refuses the dtypes of what trains; None where it does not."""
    if job.distributed is None:
        return None
    from peftplan.distributed import zero

    return zero.refused_dtypes(built, job.distributed, quantized=job.quant is not None)


def over_gpus(
    job: Job, static: Ledger, peaks: Peaks | None, compute_capability: str, each: "Sequence[InstantPeaks]"
) -> "OverGpus | None":
    """What the ranks hold. All are counted as the largest: rank 0 with its full shards, under ZeRO where most gradients are.

    `each`: the peaks of each GPU of a `device_map`, where they are known already.
    """
    if job.distributed is None:
        return None
    from peftplan.results.distributed import OverGpus, RankGroup

    if job.distributed.strategy == "device-map":
        ledgers = {id(own.inventory.static): own.inventory.static for own in each}  # GPUs that hold as much have one
        persistent = {ledger: lines.bytes() for ledger, lines in ledgers.items()}
        known = (RankGroup((number,), persistent[id(own.inventory.static)], own) for number, own in enumerate(each))
        groups = tuple(known if each else _groups(job, peaks, compute_capability))
    else:
        groups = (RankGroup((0, job.distributed.world_size - 1), static.bytes(), peaks),)
    return OverGpus(
        job.distributed,
        job.setup.batch_size,
        job.setup.gradient_accumulation_steps,
        groups,
        static.bytes(place="host"),
        of_ranks(job.distributed),
    )


def _groups(job: Job, peaks: Peaks | None, compute_capability: str) -> "Iterator[RankGroup]":
    """The GPUs of a `device_map`, with their peaks where there are any."""
    from peftplan.analytic.engine import analytic_peaks
    from peftplan.results.distributed import RankGroup

    for number, of_device in enumerate(on_each_device(inventory(job))):
        if peaks is None or peaks.devices:
            own = peaks and peaks.devices[number]
        else:
            own = analytic_peaks(of_device, compute_capability=compute_capability)
        yield RankGroup((number,), of_device.static.bytes(), own)

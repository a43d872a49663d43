"""A job over several GPUs: what DeepSpeed refuses of it, and what its ranks hold."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from peftplan.job.inventory import Inventory, inventory, on_each_device, on_rank
from peftplan.job.job import Job
from peftplan.parameters import Parameters
from peftplan.planning.assumed import of_ranks
from peftplan.results.estimate import Peaks

if TYPE_CHECKING:
    from peftplan.analytic.instant import InstantPeaks
    from peftplan.results.distributed import OverGpus, RankGroup

MOST_UNLIKE = 16
"""Up to so many unlike ranks each is counted on its own: less than 0.2 s of each of ZeRO-2 for 8B parameters."""


def refused_dtypes(job: Job, built: Parameters) -> str | None:
    """Why DeepSpeed refuses the dtypes of what trains; None where it does not."""
    if job.distributed is None:
        return None
    from peftplan.distributed import zero

    return zero.refused_dtypes(built, job.distributed, quantized=job.quant is not None)


def over_gpus(
    of_largest: Inventory, peaks: Peaks | None, compute_capability: str, each: "Sequence[InstantPeaks]"
) -> "OverGpus | None":
    """What the ranks hold. `of_largest`: the job as the largest rank sees it, with its `peaks`. `each`: the peaks of unlike
    GPUs, where they are known already.
    """
    job = of_largest.job
    if job.distributed is None:
        return None
    from peftplan.results.distributed import OverGpus

    return OverGpus(
        job.distributed,
        job.setup.batch_size,
        job.setup.gradient_accumulation_steps,
        of_largest.static.bytes(place="host"),
        of_ranks(job.distributed),
        Shares(of_largest, peaks, compute_capability, tuple(each)),
    )


class Shares(NamedTuple):
    """What `results.distributed.OverGpus` makes its groups of ranks from."""

    of_largest: Inventory
    peaks: Peaks | None
    compute_capability: str
    each: "tuple[InstantPeaks, ...]"

    def groups(self) -> "tuple[RankGroup, ...]":
        """The groups of ranks with equal bytes. Of more than `MOST_UNLIKE` unlike ranks those that can be the largest have
        peaks, and of a trace the ranks that were traced."""
        distributed = self.of_largest.job.distributed
        assert distributed is not None
        if distributed.strategy == "device-map":
            return tuple(self._of_devices())
        groups: dict[object, RankGroup] = {}
        for group in self._of_shapes():
            peaks = group.peaks
            needs = group.persistent, peaks and (*peaks.by_phase.items(), peaks.reserved)
            same = groups.get(needs)
            groups[needs] = group if same is None else same._replace(ranks=tuple(sorted((*same.ranks, *group.ranks))))
        return tuple(groups.values())

    def _of_devices(self) -> "Iterator[RankGroup]":
        """The GPUs of a `device_map`."""
        from peftplan.analytic.engine import analytic_peaks
        from peftplan.results.distributed import RankGroup

        known = (self.peaks and self.peaks.devices) or self.each
        for number, of_device in enumerate(on_each_device(inventory(self.of_largest.job))):
            own: Peaks | None = known[number] if known else None
            if own is None and self.peaks is not None:
                own = analytic_peaks(of_device, compute_capability=self.compute_capability)
            yield RankGroup((number,), of_device.static, own)

    def _of_shapes(self) -> "Iterator[RankGroup]":
        """The ranks whose tensors have equal shapes."""
        from peftplan.analytic.instant import InstantPeaks
        from peftplan.distributed.alike import alike
        from peftplan.results.distributed import RankGroup

        job, built, _, holding = self.of_largest
        assert job.distributed is not None
        assert holding is not None
        shapes = alike(built, job.distributed, job.architecture, autocast=str(job.setup.autocast))
        known = dict(self.peaks.of_ranks) if self.peaks else {}
        if self.peaks is not None and not known:
            known[holding.rank or 0] = self.peaks
        counted = [ranks[0] for ranks in shapes] if len(shapes) <= MOST_UNLIKE else [*holding.ranks, shapes[-1][0]]
        if job.distributed.divided > 1 or job.distributed.cpu_ram_efficient_loading:
            counted = []  # short parts of a matrix, and ranks that receive what the first one reads, were not rehearsed
        for first, *others in shapes:
            of_rank = self.of_largest if first == (holding.rank or 0) else on_rank(self.of_largest, first)
            peaks = next((known[rank] for rank in (first, *others) if rank in known), None)
            if peaks is None and isinstance(self.peaks, InstantPeaks) and first in counted:
                peaks = self._counted(self.peaks, first)
            yield RankGroup((first, *others), of_rank.static, peaks)

    def _counted(self, of_largest: "InstantPeaks", rank: int) -> Peaks:
        from peftplan.analytic.engine import analytic_peaks

        of_rank = on_rank(of_largest.inventory, rank)
        return analytic_peaks(of_rank, compute_capability=of_largest.compute_capability)

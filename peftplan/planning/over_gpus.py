"""A job over several GPUs: what DeepSpeed refuses of it, and what its ranks hold."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from peftplan.job.inventory import Inventory, in_stages, inventory, on_each_device, on_rank
from peftplan.job.job import Job
from peftplan.parameters import Parameters
from peftplan.planning.assumed import of_ranks
from peftplan.results.peaks import Peaks
from peftplan.versions import LEFTOVERS_RELEASED, QUANTIZED_ON_CARD

if TYPE_CHECKING:
    from peftplan.results.distributed import OverGpus, RankGroup


def release_notes(job: Job, peaks: Peaks) -> Iterator[str]:
    """What another release of a library holds, where that decides the peak: how FSDP1 loads a quantized base, and how long ZeRO-3
    keeps weights gathered that do not train."""
    distributed = job.distributed
    if distributed is None:
        return
    efficient = distributed.strategy == "fsdp1" and distributed.cpu_ram_efficient_loading
    if efficient and job.quant is not None and not job.script.quantizes_to_host and peaks.phase == "load":  # read last: a replay
        yield (
            f"since {QUANTIZED_ON_CARD.named}, each GPU holds the whole quantized base until FSDP divides it, even with "
            "cpu_ram_efficient_loading; earlier releases move each weight to the host (--transformers 4.57)"
        )
    recomputed = distributed.strategy == "zero3" and job.setup.gradient_checkpointing and job.setup.use_reentrant
    if not recomputed:
        return
    if distributed.keeps_leftovers:
        if job.method_name != "full" and distributed.deepspeed_version != job.setup.by.deepspeed:  # which its package pins
            yield (
                f"counted with deepspeed {distributed.deepspeed_version}; since {LEFTOVERS_RELEASED.named}, ZeRO-3 keeps more "
                "weights gathered while reentrant checkpoints are recomputed, and may hold far more (--deepspeed-version 0.19.8)"
            )
        return
    if 2 * peaks.ledgers[peaks.phase].bytes(("gathered_weights",)) > peaks.allocated:
        yield (
            f"since {LEFTOVERS_RELEASED.named}, ZeRO-3 keeps more weights gathered while reentrant checkpoints are recomputed; "
            "earlier releases may hold far less (--deepspeed-version 0.18.9)"
        )


def refused_dtypes(job: Job, built: Parameters) -> str | None:
    """Why DeepSpeed refuses the dtypes of what trains; None where it does not."""
    if job.distributed is None:
        return None
    from peftplan.distributed import zero

    return zero.refused_dtypes(built, job.distributed, quantized=job.quant is not None)


def over_gpus(of_any: Inventory, peaks: Peaks | None) -> "OverGpus | None":
    """What the ranks hold. `peaks`: those of the largest."""
    job = of_any.job
    if job.distributed is None:
        return None
    from peftplan.results.distributed import OverGpus

    return OverGpus(
        job.distributed,
        job.setup.batch_size,
        job.setup.gradient_accumulation_steps,
        of_any.static.bytes(place="host"),
        of_ranks(job.distributed, peaks),
        Shares(of_any, peaks),
    )


class Shares(NamedTuple):
    """What `results.distributed.OverGpus` makes its groups of ranks from."""

    of_any: Inventory
    peaks: Peaks | None

    def groups(self) -> "tuple[RankGroup, ...]":
        """The groups of ranks with equal bytes. Ranks that the analytic engine does not count (`analytic.of_ranks`), and those
        that were not traced, have no peaks.
        """
        distributed = self.of_any.job.distributed
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

    def at_worst(self) -> "Peaks | None":
        """The peaks of the rank whose experts get every token of all ranks; None where that has no formula."""
        from peftplan.analytic.engine import analytic_peaks
        from peftplan.analytic.of_ranks import OfRanks
        from peftplan.errors import NeedsTraceError

        job, peaks = self.of_any.job, self.peaks
        if job.distributed is None or job.distributed.ep_size in (None, 1) or not isinstance(peaks, OfRanks):
            return None
        worst = job._replace(distributed=job.distributed.model_copy(update={"routing": "worst"}))
        try:
            return analytic_peaks(self.of_any._replace(job=worst), compute_capability=peaks.compute_capability)
        except NeedsTraceError:
            return None

    def _of_devices(self) -> "Iterator[RankGroup]":
        """The GPUs of a `device_map`."""
        from peftplan.analytic.of_ranks import OfRanks
        from peftplan.results.distributed import RankGroup

        known = self.peaks and (self.peaks.each if isinstance(self.peaks, OfRanks) else self.peaks.devices)
        for number, of_device in enumerate(on_each_device(inventory(self.of_any.job))):
            yield RankGroup((number,), of_device.static, known[number] if known else None)

    def _of_shapes(self) -> "Iterator[RankGroup]":
        """The ranks whose tensors have equal shapes."""
        from peftplan.analytic.of_ranks import OfRanks
        from peftplan.distributed.alike import alike
        from peftplan.results.distributed import RankGroup

        job, built, _, holding = self.of_any
        assert job.distributed is not None
        assert holding is not None
        shapes = alike(built, job.distributed, job.architecture, autocast=str(job.setup.autocast))
        peaks = self.peaks
        traced = dict(peaks.of_ranks or [(holding.rank or 0, peaks)]) if peaks else {}
        for ranks in shapes:
            is_own = (holding.rank or 0) in ranks and not in_stages(job)
            of_rank = self.of_any if is_own else on_rank(self.of_any, ranks[0])
            if isinstance(peaks, OfRanks):
                yield RankGroup(ranks, of_rank.static, peaks.of(ranks[0]))
            else:
                yield RankGroup(ranks, of_rank.static, next((traced[rank] for rank in ranks if rank in traced), None))

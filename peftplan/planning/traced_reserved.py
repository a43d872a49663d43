"""Reserved bytes of a traced rank: what a trace cannot say of them, since it runs in step with the host."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peftplan.errors import NeedsTraceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from peftplan.analytic.of_ranks import OfRanks
    from peftplan.job.inventory import Inventory
    from peftplan.results.peaks import Peaks


def with_care(
    of_any: Inventory, compute_capability: str, peaks: Peaks, runs_within: Callable[[int], bool]
) -> tuple[Peaks, Callable[[int], bool]]:
    """The peaks of a trace, and whether the job runs where the allocator can take so many bytes.

    Under FSDP1, which frees with `record_stream`, formulas replay a late GPU too. Where they reserve what the trace does if the
    GPU is never late, they say the most that it reserves. Elsewhere a verdict has a margin.
    """
    from peftplan.analytic.unreserved import MARGIN, untraced

    assert peaks.reserved is not None
    careful = int(MARGIN * peaks.reserved)
    job = of_any.job
    if (why := untraced(job)) is not None:
        return replace(peaks, reserved=None, reserved_source=None, unreserved=why, reserved_with_care=careful), runs_within
    if job.distributed is None or job.distributed.strategy != "fsdp1":
        return peaks, runs_within
    late = _by_formula(of_any, compute_capability)
    in_time = None if late is None else late.of(0)
    if late is None or in_time is None or in_time.reserved != peaks.reserved:
        return replace(peaks, reserved_with_care=careful), runs_within
    return replace(peaks, late=late), late.runs_within


def _by_formula(of_any: Inventory, compute_capability: str) -> OfRanks | None:
    from peftplan.analytic.engine import analytic_peaks
    from peftplan.analytic.of_ranks import OfRanks

    try:
        peaks = analytic_peaks(of_any, compute_capability=compute_capability)
    except NeedsTraceError:
        return None
    assert isinstance(peaks, OfRanks)
    return peaks

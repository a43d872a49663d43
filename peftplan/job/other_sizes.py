"""Whether two jobs are one at different sizes."""

from operator import attrgetter

from peftplan.job.job import Job
from peftplan.job.setup import Setup

BESIDE_SIZES = attrgetter(*(name for name in Setup.model_fields if name not in ("batch_size", "seq_len")))
"""Reads all of a setup but its batch and sequence."""


def differ_in_sizes(job: Job, other: Job) -> bool:
    """Whether jobs differ in their batch and sequence alone, beside what names no tensor."""
    if job.architecture is not other.architecture or job.request.loaded is not None or job.request.as_loaded is not None:
        return False
    of_both = [(BESIDE_SIZES(of.setup), of.method, of.config, of.adapter, of.quant, of.distributed) for of in (job, other)]
    of_request = [(of.request.script, of.adaptation, of.model, of.second_config, of.multiprocessors) for of in (job, other)]
    return of_both[0] == of_both[1] and of_request[0] == of_request[1]

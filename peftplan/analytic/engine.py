"""The analytic engine as an `Estimate` sees it: peaks per phase as ledgers, from the model's forward written on a tape."""

from __future__ import annotations

from typing import Any

from peftplan.analytic.compiled import Compiled, compiled
from peftplan.analytic.instant import InstantPeaks
from peftplan.analytic.reserved import Run
from peftplan.job.job import Job
from peftplan.ledger import Ledger
from peftplan.parameters import Parameters


def analytic_peaks(job: Job, parameters: Parameters, static: Ledger, *, compute_capability: str) -> InstantPeaks:
    """The peaks of a steady step. Raises NeedsTraceError where only the trace engine can tell."""
    compiled_job = compiled(job, parameters, static, compute_capability=compute_capability)
    named = compiled_job.sizes(job.setup.batch_size, job.setup.seq_len)
    moments = compiled_job.timeline.peaks(named, compiled_job.standing_bytes)

    before: list[tuple[Compiled, dict[str, Any]]] = []
    for tokens in job.script.earlier_seq_lens or ((job.setup.seq_len,) if job.setup.keep_gradients else ()):
        there = job.setup.keep_gradients and bool(before)  # before the first step there are none
        earlier = job._replace(setup=job.setup.model_copy(update={"seq_len": tokens, "keep_gradients": there}))
        of_step = compiled(earlier, parameters, static, compute_capability=compute_capability)
        before.append((of_step, of_step.sizes(job.setup.batch_size, tokens)))
    last = (compiled_job, named)
    return InstantPeaks(compiled_job, moments, named, Run((*before, last) if before else (last, last), job.script))

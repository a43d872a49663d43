"""`measure_and_record`: one configuration, measured on this process's device, appended to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftplan.accuracy.jsonl import append
from peftplan.accuracy.records import Record
from peftplan.job.prepare import prepare
from peftplan.measure import cuda
from peftplan.measure.identity import STEPS, WARMUP, world_size
from peftplan.measure.record import record_of
from peftplan.measure.run import measure

OUTPUT = Path("runs.jsonl")


def measure_and_record(
    model: Any,
    *,
    output: Path | None = OUTPUT,
    warmup: int = WARMUP,
    steps: int = STEPS,
    snapshot: Path | None = None,
    **options: Any,
) -> Record:
    """Measure `model` with the options of `peftplan.estimate`, append the record to `output` (None: nowhere), and return it.

    Of several processes, each measures its own replica under torch's DistributedDataParallel.
    An out-of-memory error and any other failure of the run are records. Raises InputError, RefusedError, UnknownNameError or
    MissingExtraError for what cannot be run, NoCudaError without a GPU.
    """
    ranks = {"strategy": "ddp", "gpus": world_size()} if world_size() > 1 else {}
    job = prepare(model, **{**ranks, **options})
    device = cuda.open_device()
    record = record_of(job, measure(job, device, warmup=warmup, steps=steps, snapshot=snapshot), device)
    if output is not None:
        append(output, [record])
    return record

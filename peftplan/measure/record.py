"""Convert a measured run to the record that is kept of it."""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.accuracy.records import PHASES, Counts, Measured, Peak, Record
from peftplan.job.job import Job
from peftplan.measure.cuda import Device
from peftplan.measure.identity import allocator_settings, circumstances, gpu_id, kept_alive, new_id, run_of
from peftplan.measure.recorder import Figure, steady
from peftplan.measure.run import Outcome


def record_of(job: Job, outcome: Outcome, device: Device) -> Record:
    """The record of a run on this device."""
    run, facts = run_of(job), device.facts()
    notes = [f"{name}={value}" for name, value in allocator_settings().items()]
    return Record(
        id=new_id(run),
        run=run,
        circumstances=circumstances(
            gpu=facts.gpu,
            gpu_id=gpu_id(facts.gpu),
            compute_capability=facts.compute_capability,
            driver=facts.driver,
            cuda=facts.cuda,
        ),
        outcome=outcome.outcome,
        error=outcome.error,
        covers="whole-run",
        peaks=_peaks(outcome),
        counts=Counts(trainable=outcome.num_trainable, total=outcome.num_total),
        kept_alive=kept_alive(job),
        steps=tuple(figure.to_dict() for figure in outcome.figures),
        note=" ".join(notes) or None,
    )


def _peaks(outcome: Outcome) -> Measured:
    """Peaks of a run. Those by phase are of steady steps; the overall ones cover every phase, warm-up included.

    The overall peaks are what the counters would show without resets.
    """
    figures, measured = outcome.figures, tuple(steady(outcome.figures, warmup=outcome.warmup))
    if not figures:
        return Measured(context_bytes=outcome.context_bytes)
    return Measured(
        by_phase={phase: _highest(of_phase) for phase in PHASES if (of_phase := [f for f in measured if f.phase == phase])},
        overall=_highest(figures),
        device_bytes=_device_bytes(figures, before=outcome.before_bytes),
        context_bytes=outcome.context_bytes,
    )


def _highest(figures: Iterable[Figure]) -> Peak:
    listed = list(figures)
    return Peak(allocated=max(f.allocated for f in listed), reserved=max(f.reserved for f in listed))


def _device_bytes(figures: Iterable[Figure], *, before: int | None) -> int | None:
    """Peak bytes of the process by the driver. If it reports none: by how much the whole device's use has grown."""
    listed = list(figures)
    of_process = [f.process for f in listed if f.process is not None]
    if of_process:
        return max(of_process)
    used = [f.used for f in listed if f.used is not None]
    return max(used) - before if used and before is not None else None

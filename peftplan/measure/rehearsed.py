"""The record of a rehearsed program, whose job its user states."""

from __future__ import annotations

from typing import Any, Literal

from peftplan.accuracy.records import PHASES, Circumstances, Measured, Peak, Record
from peftplan.hardware.gpus import find_gpu
from peftplan.job.prepare import prepare
from peftplan.measure.identity import circumstances, kept_alive, new_id, run_of
from peftplan.results.rehearsal import Rehearsal

SOURCE = "peftplan rehearse"
NO_CARD = "emulated card"


def record_of(model: Any, result: Rehearsal, **options: Any) -> Record:
    """The record of a rehearsal of the job that `model` and the options of `peftplan.estimate` say.

    Raises what `peftplan.estimate` raises for them.
    """
    job = prepare(model, **options)
    run = run_of(job)
    rank = result.largest_rank
    outcome: Literal["ok", "oom", "failed"] = "failed"
    if result.ended == "out_of_memory":
        outcome = "oom"
    elif result.steps and not result.exit_code:
        outcome = "ok"
    return Record(
        id=new_id(run),
        run=run,
        circumstances=_circumstances(result),
        outcome=outcome,
        error=None if outcome == "ok" else f"{result.ended} after {result.steps} steps",
        covers="whole-run",
        peaks=Measured()
        if rank is None
        else Measured(
            by_phase={
                phase: Peak(allocated=rank.peak_by_phase[phase], reserved=rank.reserved_by_phase[phase])
                for phase in PHASES
                if phase in rank.peak_by_phase
            },
            overall=Peak(allocated=rank.peak_allocated, reserved=rank.peak_reserved),
        ),
        kept_alive=kept_alive(job),
    )


def _circumstances(result: Rehearsal) -> Circumstances:
    """The card that was emulated, and the libraries that the program imported."""
    card = find_gpu(result.gpus[0].gpu) if result.gpus else None
    rank = result.largest_rank
    facts = {} if card is None else {"gpu_id": card.id, "compute_capability": card.compute_capability}
    facts_of_run = circumstances(gpu=card.name if card else NO_CARD, **facts)
    several = {"num_gpus": result.world_size, "rank": rank.rank if rank else 0}
    libraries = {"versions": {**facts_of_run.versions, **result.versions}, "source": SOURCE, "framework": SOURCE}
    return facts_of_run.model_copy(update={**libraries, **several})

"""From a measured run to the record that is kept of it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peftplan.accuracy.records import PHASES, Circumstances, Counts, Measured, Peak, Record, Run, full_options
from peftplan.errors import PeftplanError
from peftplan.hardware.gpus import find_gpu
from peftplan.measure.cuda import Device, allocator_settings
from peftplan.measure.recorder import Figure, steady
from peftplan.measure.run import Outcome, rank, world_size
from peftplan.planning.job import Job

PACKAGES = ("peftplan", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "triton", "numpy")
SOURCE = "peftplan measure"
LICENCE = "Apache-2.0"
"""Of what is measured with and added to this project."""


def run_of(job: Job) -> Run:
    """The job in a record's words: the method's own fields, and every option that says something."""
    named = job.method is not None and job.config is not None and not job.adapter
    return Run(
        model=job.model if isinstance(job.model, str) else job.architecture.name,
        method=job.method.name if named and job.method else None,
        peft_config=None if named else _plain(job.adapter),
        method_config=_plain(job.config.model_dump(mode="json", exclude_unset=True)) if named and job.config else {},
        options=_plain(full_options(job.setup.model_dump(mode="json"))),
    )


def key(run: Run) -> str:
    """What tells one configuration from another: ten hexadecimal digits of its sha256."""
    text = json.dumps(run.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def record_of(job: Job, outcome: Outcome, device: Device) -> Record:
    """The record of a run on this device."""
    run, facts = run_of(job), device.facts()
    notes = [f"{name}={value}" for name, value in allocator_settings().items()]
    return Record(
        id=_id(run),
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
        kept_alive=_kept_alive(job),
        steps=tuple(figure.to_dict() for figure in outcome.figures),
        note=" ".join(notes) or None,
    )


def lost(run: Run, *, gpu: str, error: str) -> Record:
    """The record of a run whose process left none: it crashed, was killed, or took too long."""
    return Record(id=_id(run), run=run, circumstances=circumstances(gpu=gpu), outcome="failed", error=error, covers="whole-run")


def circumstances(*, gpu: str, **facts: Any) -> Circumstances:
    """Where, when and with what this process runs."""
    return Circumstances(
        gpu=gpu,
        num_gpus=world_size(),
        rank=rank(),
        versions=_versions(PACKAGES),
        allocator=allocator_settings().get("PYTORCH_ALLOC_CONF", allocator_settings().get("PYTORCH_CUDA_ALLOC_CONF")),
        framework=SOURCE,
        commit=_commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=SOURCE,
        licence=LICENCE,
        **facts,
    )


def _peaks(outcome: Outcome) -> Measured:
    """By phase the steady steps' peaks; overall those of every phase, warm-up included, which is what the counters would show
    without resets."""
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
    """The driver's figure for the process; where it does not know it, what the device uses more than before the process came."""
    listed = list(figures)
    of_process = [f.process for f in listed if f.process is not None]
    if of_process:
        return max(of_process)
    used = [f.used for f in listed if f.used is not None]
    return max(used) - before if used and before is not None else None


def _kept_alive(job: Job) -> tuple[str, ...]:
    setup = job.setup
    kept = {
        "outputs": setup.keep_outputs,
        "kv cache": setup.keep_outputs and setup.use_cache and not setup.gradient_checkpointing,
        "gradients": setup.keep_gradients,
    }
    return tuple(name for name, is_kept in kept.items() if is_kept)


def _id(run: Run) -> str:
    """`llama-3.2-1b-qlora-1f3a5c7e9b-20260131T101112Z`, with the rank where there are several."""
    words = re.sub(r"[^a-z0-9.+]+", "-", f"{run.model} {run.method_name}".lower()).strip("-.")
    moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return "-".join([words[-80:], key(run), moment, *([f"rank{rank()}"] if world_size() > 1 else [])])


def gpu_id(name: str) -> str | None:
    """The id that the catalogue has for a driver's name of a card, or None."""
    try:
        return find_gpu(name).id
    except PeftplanError:
        return None


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the checkout that runs, None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(("git", "-C", str(here), "rev-parse", "HEAD"), capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples and sets."""
    return json.loads(json.dumps(value, default=list))

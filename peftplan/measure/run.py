"""One measured run: builds the model, runs a step program on it, and reads each phase's peaks from the device.

The program is that of the trace engine (`trace.steps`). An out-of-memory error is an outcome, as is any other failure; readings
until then are kept. Left out: data loader, logging, evaluation, saving.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from peftplan.errors import InputError, PeftplanError
from peftplan.job.job import Job
from peftplan.libraries.quantized import TORCH_DTYPES
from peftplan.measure import losses
from peftplan.measure.cuda import Device
from peftplan.measure.identity import STEPS, WARMUP, world_size
from peftplan.measure.model import make
from peftplan.measure.optimizers import make_optimizer
from peftplan.measure.recorder import Figure, Recorder
from peftplan.trace.inputs import inputs
from peftplan.trace.steps import Run, take_steps

PADDED = 1
"""Padded tokens per sequence. One is enough for the mask to be used."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    `context_bytes`: bytes of the process before the first tensor, by the driver. `before_bytes`: bytes in use on the whole device
    before this process touched it.
    """

    outcome: Literal["ok", "oom", "failed"]
    error: str | None
    figures: tuple[Figure, ...]
    warmup: int
    num_trainable: int | None
    num_total: int | None
    context_bytes: int | None
    before_bytes: int | None


@dataclass
class DeviceRun(Run):
    """A step program's run on a real device."""

    device: Device = field(kw_only=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's autocast, on the device."""
        name = str(self.setup.autocast)
        return nullcontext() if name == "none" else self.device.autocast(TORCH_DTYPES[name])

    def name_gradients(self) -> None:
        """Does nothing: only the trace engine names gradients."""


def measure(job: Job, device: Device, *, warmup: int = WARMUP, steps: int = STEPS, snapshot: Path | None = None) -> Outcome:
    """Run `warmup` + `steps` optimizer steps of a job on the device and read every phase.

    `snapshot`: where torch's memory snapshot is written. Raises RefusedError for a job that cannot be run, InputError for counts
    that make no sense.
    """
    if warmup < 0 or steps < 1:
        raise InputError("steps", (warmup, steps), "accepted: at least one step and zero or more warm-up steps")
    device.synchronize()
    device.empty_cache()
    device.reset_peaks()
    context = device.context_bytes()
    if snapshot is not None:
        device.start_history()
    recorder = Recorder(device)
    counted: tuple[int | None, int | None] = (None, None)
    outcome, message = "ok", None
    try:
        built = make(job, device.torch_device)
        counted = built.num_trainable, built.num_total
        model = _distributed(built.model, device)
        batch = filled(inputs(built.base, job.setup).batch, built.base) | losses.arguments(job.setup)
        optimizer = make_optimizer(job, built.model, recorder)
        run = DeviceRun(model, batch, optimizer, recorder, job.setup, steps=warmup + steps, device=device)
        run.fetched = partial(_moved, device=device.torch_device)
        take_steps(run)
        recorder.close()
    except PeftplanError:
        raise
    except Exception as error:  # any operation of any model
        outcome, message = ("oom" if device.is_out_of_memory(error) else "failed"), _first_line(error, recorder.phase)
        if outcome == "oom":
            recorder.close()
    if snapshot is not None:
        device.save_history(snapshot)
    return Outcome(outcome, message, tuple(recorder.figures), warmup, *counted, context, device.before_bytes)  # type: ignore[arg-type]


def _moved(batch: dict[str, Any], *, device: torch.device) -> dict[str, Any]:
    """The batch, on the device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def filled(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """The batch, on the host, with random tokens and a mask that hides some of them.

    Tokens are random because the memory of a mixture of experts depends on how they are routed.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            if name == "input_ids" and vocabulary and not value.any():
                value = torch.randint(vocabulary, value.shape, generator=generator)
            elif name == "attention_mask":
                value = value.clone()
                value[:, -PADDED:] = 0
        tensors[name] = value
    return tensors


def _distributed(model: nn.Module, device: Device) -> nn.Module:
    """The model; with several processes wrapped in torch's DistributedDataParallel with defaults, as accelerate does."""
    if world_size() == 1:
        return model
    from torch.distributed import init_process_group, is_initialized

    if not is_initialized():
        init_process_group(device.backend)
    of_gpu = device.torch_device.type == "cuda"
    return nn.parallel.DistributedDataParallel(model, device_ids=[device.torch_device.index] if of_gpu else None)


def _first_line(error: Exception, phase: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{phase}: {type(error).__name__}: {' '.join(lines[:1])[:300]}"

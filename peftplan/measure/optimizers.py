"""The real optimizer of a run: from Trainer's `create_optimizer`, or for a plain loop the class that Trainer would use."""

from __future__ import annotations

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch

from peftplan.errors import RefusedError
from peftplan.job.job import Job
from peftplan.job.setup import Setup
from peftplan.libraries.count import LORAFA_LR
from peftplan.measure.recorder import Recorder
from peftplan.optim import parse_optim
from peftplan.trace.optimizers import Steps
from peftplan.trace.peft_steps import WithAllocator, allocator_of, lorafa_optimizer, uses_lorafa


@dataclass
class Real:
    """An optimizer with the interface that step programs need."""

    optimizer: Any

    def step(self) -> None:
        """The optimizer's own step."""
        self.optimizer.step()

    def zero_grad(self, *, set_to_none: bool) -> None:
        """The optimizer's own `zero_grad`."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def after_step(self) -> None:
        """Does nothing: only the trace engine names states."""


def make_optimizer(job: Job, model: Any, recorder: Recorder) -> Steps:
    """The job's optimizer over the trainable parameters of a model on the device, with what a method of peft adds to its steps.

    Trainer groups them by weight decay, and tells 8-bit optimizers to leave embeddings in 32 bits; a plain loop does neither.
    Raises RefusedError for an optimizer that steps inside backward, which the step programs do not run.
    """
    optimizer = Real(_of_setup(job.setup, model, recorder.device.torch_device))
    allocates = job.script.updates_ranks(job.setup) and allocator_of(model) is not None
    return optimizer if not allocates else WithAllocator(optimizer, model, recorder)  # type: ignore[arg-type]


def _of_setup(setup: Setup, model: Any, device: torch.device) -> Any:
    known = parse_optim(str(setup.optim))
    if known.step_implementation == "in-backward":
        raise RefusedError(f"optim: {known.name} steps inside backward and cannot be measured; the others can")
    if uses_lorafa(model, known.name):
        return lorafa_optimizer(model, learning_rate=LORAFA_LR)
    with TemporaryDirectory() as folder:
        arguments = _arguments(setup, folder, device)
        if not setup.by.makes_optimizer:
            return _plain(arguments, model)
        from transformers import Trainer

        return Trainer(model=model, args=arguments).create_optimizer()


def _arguments(setup: Setup, folder: str, device: torch.device) -> Any:
    """TrainingArguments that set only the optimizer."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        optim=str(setup.optim),
        optim_args=setup.optim_args,
        optim_target_modules=list(setup.optim_target_modules) if setup.optim_target_modules else None,
        use_cpu=device.type == "cpu",
        report_to=[],
        disable_tqdm=True,
    )


def _plain(arguments: Any, model: Any) -> Any:
    from transformers import Trainer

    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    parameters = options.pop("params", None) or [p for p in model.parameters() if p.requires_grad]
    return optimizer_class(parameters, **options)

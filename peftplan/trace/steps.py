"""Training steps: the loop around the model decides how long tensors live.

Source: transformers, trainer.py (`Trainer.training_step`); accelerate; trl, `SFTTrainer.compute_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from peftplan.job.script import NO_SCRIPT, Script
from peftplan.job.setup import Setup
from peftplan.ledger import Category
from peftplan.libraries.quantized import TORCH_DTYPES
from peftplan.trace.cuda.differences import cuda_autocast
from peftplan.trace.meshes import clip_gradients
from peftplan.trace.optimizers import Steps
from peftplan.trace.scaler import Scaler

STEPS = 2
"""Optimizer steps of a trace: the first allocates the states, the second is steady."""

MAX_GRAD_NORM = 1.0
"""Trainer's default clipping."""


class Watcher(Protocol):
    """Told which phase begins and what a tensor is: the `Tracker` of a trace, or the recorder of a measurement."""

    phase: str
    began: list[tuple[int, str]]

    def begin(self, phase: str) -> None: ...
    def register(self, tensor: torch.Tensor, category: Category, name: str, *, op: str = ...) -> None: ...


@runtime_checkable
class OwnBackward(Protocol):
    """An optimizer that runs backward itself, clips, and says when its step begins: DeepSpeed's engine."""

    def backward(self, loss: torch.Tensor) -> None: ...


@dataclass
class Run:
    """The state of the loop. `reported`: the last steps that are. `started`: how many phases had begun before those."""

    model: nn.Module
    batch: dict[str, torch.Tensor]
    optimizer: Steps
    tracker: Watcher
    setup: Setup
    script: Script = NO_SCRIPT
    started: int = 0
    steps: int = STEPS
    reported: int = 1
    earlier: Sequence[dict[str, torch.Tensor]] = ()
    """Batches of the first steps if they differ; `batch` is that of all others."""
    fetched: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """A copy of a batch, on the device."""
    on_device: list[dict[str, Any]] = field(default_factory=list)
    """The batch that runs, and those that follow it where the trainer has fetched them too."""
    done: int = 0
    """Optimizer steps so far."""
    begin_batch: Callable[[bool], None] = lambda last: None
    """Called before each micro batch, and told whether it is the last one of its step."""
    called: Callable[..., Any] | None = None
    """What is called as the model, if a strategy wraps it."""
    prepared: bool = False
    """Whether a strategy has wrapped the model as `prepared` runs it."""
    unscales_fp16: bool = False
    """Whether the scaler takes gradients in fp16."""

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def name_gradients(self) -> None:
        """Tell the tracker which storages are gradients of parameters."""
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                self.tracker.register(p.grad, "gradients", f"{name}.grad", op="backward")

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast as the run sets it, on fake tensors."""
        some = next((p for p in self.model.parameters() if p.requires_grad), None)
        return autocast(self.setup, next(self.model.parameters()) if some is None else some)

    def fetch(self, micro_batch: int) -> dict[str, Any]:
        """The micro batch, on the device: the next one of a loader, or one of those that Trainer has collected for the step."""
        collects = self.script.collects_batches(self.setup)
        if collects and micro_batch:
            return self.on_device[micro_batch]
        if not collects:
            self.on_device.clear()
        batch = self.earlier[self.done] if self.done < len(self.earlier) else self.batch
        fetched = []
        for _ in range(self.setup.gradient_accumulation_steps if collects else 1):
            fetched.append(self.fetched(batch))
            for name, value in fetched[-1].items():
                if torch.is_tensor(value):
                    self.tracker.register(value, "activations", name, op="batch")
        self.on_device[:] = fetched
        return self.on_device[0]

    def forward(self, micro_batch: int) -> Any:
        """One forward under autocast. What comes before it belongs to the phase before, but the first batch is not loading."""
        if self.tracker.phase == "load":
            self.tracker.begin("forward")
            batch = self.fetch(micro_batch)
        else:
            batch = self.fetch(micro_batch)
            self.tracker.begin("forward")
        with nullcontext() if self.prepared else self.autocast():
            return (self.called or self.model)(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        """One backward; the gradients are named when it ends."""
        self.tracker.begin("backward")
        if isinstance(self.optimizer, OwnBackward):
            self.optimizer.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        self.name_gradients()

    def update(self) -> None:
        """The optimizer's step and `zero_grad`."""
        if self.tracker.phase != "step" and not isinstance(self.optimizer, OwnBackward):
            self.tracker.begin("step")
        self.optimizer.step()
        self.optimizer.after_step()
        self.done += 1
        self.optimizer.zero_grad(set_to_none=not self.setup.keep_gradients)


def take_steps(run: Run) -> None:
    """`outputs = model(**batch); outputs.loss.backward(); optimizer.step(); optimizer.zero_grad()`, with what the trainer adds.

    With `keep_outputs` the name `outputs` holds the logits through backward and step: the step is a function of its own. In a
    loop without one (`outputs_outlive_step`) they stay until the next forward has returned; `del` may come before the step.
    """
    by, outputs = run.setup.by, None
    _complete_batches(run)
    scaler = Scaler(run.trainable[0].device) if by.prepares_model and run.setup.autocast == "fp16" else None
    for step in range(run.steps):
        if step <= run.steps - run.reported:
            run.started = len(run.tracker.began)
        for number in range(run.setup.gradient_accumulation_steps):
            run.begin_batch(number + 1 == run.setup.gradient_accumulation_steps)
            if by.drops_outputs:
                loss = _compute_loss(run, number)
            else:
                outputs = run.forward(number)
                loss = _loss(outputs)
            if not run.setup.keep_outputs:
                outputs = None
            run.backward(loss if scaler is None else scaler.scaled(loss))
            del loss
            if run.script.outputs_end_with_backward:
                outputs = None
        if by.clips_gradients and not isinstance(run.optimizer, OwnBackward):
            run.tracker.begin("step")
            if scaler is not None:
                scaler.unscale(run.trainable, takes_fp16=run.unscales_fp16)
            clip_gradients(run.trainable, MAX_GRAD_NORM)
        run.update()
        if scaler is not None:
            scaler.update()
        if not run.script.outputs_outlive_step:
            outputs = None
    if not run.script.collects_batches(run.setup):
        run.on_device.clear()


def _complete_batches(run: Run) -> None:
    """Add what a trainer puts into its batches, still on the host: a mask of ones if nothing is padded, and `use_cache=False`."""
    for batch in (run.batch, *run.earlier):
        if run.setup.by.always_masks and "attention_mask" not in batch:
            with _disable_current_modes():
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if run.setup.by.packs:
            with _disable_current_modes():
                batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        if run.setup.by.turns_cache_off:
            batch["use_cache"] = False  # type: ignore[assignment]


def _compute_loss(run: Run, micro_batch: int) -> torch.Tensor:
    """`Trainer.compute_loss`: the model's own loss. `SFTTrainer.compute_loss`: the loss from per-token log-probabilities; entropy
    and accuracy are summed while they live. Left out: `.item()` and the sums over processes; `num_items_in_batch`, a scalar.
    A model that is `played` returns the loss: its log holds all of that.
    """
    outputs = _prepared_forward(run, micro_batch)
    if not run.setup.by.sums_tokens or run.setup.loss != "trl-chunked" or "log_probs" not in outputs:
        return _loss(outputs)
    per_token_loss = -outputs["log_probs"]
    num_tokens = outputs["label_mask"].sum()
    loss: torch.Tensor = per_token_loss.sum() / num_tokens.clamp(min=1)
    outputs["entropy"].detach().sum() / num_tokens
    outputs["is_top1"].sum() / num_tokens
    return loss + outputs["aux_loss"] if "aux_loss" in outputs else loss


def _prepared_forward(run: Run, micro_batch: int) -> Any:
    """The forward of a model that accelerate prepared."""
    return _in_fp32(run.forward(micro_batch), run.setup)


def _in_fp32(outputs: Any, setup: Setup) -> Any:
    """What a model returns that accelerate prepared: under autocast fp32 copies of all 16-bit outputs.

    Source: accelerate `ConvertOutputsToFp32` (utils/operations.py): the 16-bit outputs live until the copies are made.
    """
    if setup.autocast == "none" or not setup.by.prepares_model:
        return outputs
    from accelerate.utils import convert_to_fp32  # type: ignore[import-untyped]

    return convert_to_fp32(outputs)


def autocast(setup: Setup, parameter: nn.Parameter) -> AbstractContextManager[None]:
    """Autocast as a setup has it, where a parameter is."""
    return cuda_autocast(None if setup.autocast == "none" else TORCH_DTYPES[str(setup.autocast)], parameter.device.type)


def prepared(model: nn.Module, setup: Setup) -> Callable[..., Any]:
    """The forward of a model as accelerate prepares it before DDP wraps the model (`Accelerator.prepare_model`): DDP gets what is
    returned behind autocast, in fp32."""
    forward, parameter = model.forward, next(model.parameters())

    def of_accelerate(*args: Any, **kwargs: Any) -> Any:
        with autocast(setup, parameter):
            outputs = forward(*args, **kwargs)
        return _in_fp32(outputs, setup)

    return of_accelerate


def _loss(outputs: Any) -> torch.Tensor:
    loss: torch.Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    return loss


def phases_begun(setup: Setup, steps: int) -> int:
    """How many phases a whole run of so many steps has: load, and those of each step."""
    return 1 + steps * (2 * setup.gradient_accumulation_steps + 1)

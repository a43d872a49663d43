"""`MemoryCallback`: compares estimated and measured peaks in a transformers or TRL training, and warns before too long a batch.

Phases are told apart by events: forward begins and ends, the optimizer's step begins, the step ends.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from peftplan.accuracy.drift import Answer
from peftplan.accuracy.engines import Case, stated
from peftplan.accuracy.jsonl import append
from peftplan.accuracy.records import Record
from peftplan.errors import PeftplanError
from peftplan.job.prepare import prepare
from peftplan.job.script import NO_SCRIPT
from peftplan.job.setup import Engine
from peftplan.measure import cuda, lines
from peftplan.measure.identity import gpu_id, rank
from peftplan.measure.model import counts
from peftplan.measure.record import record_of
from peftplan.measure.recorder import BETWEEN, Recorder
from peftplan.measure.run import Outcome
from peftplan.measure.training import Seen, described, seen
from peftplan.planning.estimate import estimate
from peftplan.results.estimate import Estimate
from peftplan.units import format_bytes

PREFIX = "peftplan: "


class MemoryCallback(TrainerCallback):
    """Add it to a Trainer's `callbacks`.

    `after`: optimizer steps after which measured and estimated peaks are printed. `engine`: `analytic` (no time) or `trace`
    (seconds). `output`: a file that a record of the run is appended to. `options`: arguments of `peftplan.estimate`
    that override what is read from the training. `tell` prints a line. `device` replaces the CUDA device. Without CUDA only the
    estimate is printed. Until the report, each phase synchronizes with the GPU; afterwards only a new batch shape costs time.
    """

    def __init__(
        self,
        *,
        after: int = 2,
        engine: Engine = "analytic",
        output: str | Path | None = None,
        tell: Callable[[str], None] = print,
        device: cuda.Device | None = None,
        **options: Any,
    ) -> None:
        self.after, self.engine, self.output, self.options = after, engine, output, options
        self._say, self._device = tell, device
        self._hooks: list[Any] = []
        self._recorder: Recorder | None = None
        self._reported = False
        self._estimates: dict[Seen, Estimate | None] = {}
        self._largest: Seen | None = None
        self._more_than_estimated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the setup, and watch the model's forward."""
        model: nn.Module = kwargs["model"]
        self._model, self._described = model, {**described(model, args), **self.options}
        self._steps = 0
        if self._device is None:
            try:
                self._device = cuda.open_device()
            except PeftplanError as error:
                self.say(str(error))
        self._recorder = None if self._device is None else Recorder(self._device)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped; the optimizer's step begins."""
        self._begin("step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A whole optimizer step is over."""
        self._begin(BETWEEN)
        self._steps += 1
        if self._steps >= self.after:
            self._report()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report what was measured, and remove the hooks from the model."""
        self._report()
        for hook in self._hooks:
            hook.remove()

    def say(self, text: str) -> None:
        """Print one line, from the first process only."""
        if rank() == 0:
            self._say(PREFIX + text)

    def _begin(self, phase: str) -> None:
        if self._recorder is not None and not self._reported:
            self._recorder.begin(phase)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        batch = seen(kwargs if not args else {"input_ids": args[0], **kwargs})
        if batch is not None and batch not in self._estimates:
            self._estimates[batch] = self._estimate(batch)
            if self._largest is None or batch.tokens > self._largest.tokens:
                self._largest = batch
                self._warn(batch)
        self._begin("forward")

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module.training:
            self._begin("backward")

    def _arguments(self, batch: Seen) -> dict[str, Any]:
        return {
            **self._described,
            "batch_size": batch.batch_size,
            "seq_len": batch.seq_len,
            "padding": batch.padding,
            **self.options,
        }

    def _estimate(self, batch: Seen) -> Estimate | None:
        """The estimate of one batch shape; None if it is refused, which is reported once."""
        card = None if self._device is None else gpu_id(self._device.facts().gpu)
        options = self._arguments(batch)
        script = options.pop("script", NO_SCRIPT).ran_on({"torch": torch.__version__, "transformers": transformers.__version__})
        try:
            return estimate(engine=self.engine, gpu=card, script=script, **options)
        except PeftplanError as error:
            if not any(self._estimates.values()):
                self.say(f"no estimate: {error}")
            return None

    def _warn(self, batch: Seen) -> None:
        """Warn before the step if a batch needs more than torch can get: the driver's free memory plus torch's own segments."""
        expected = self._estimates[batch]
        if self._device is None or expected is None or expected.peaks is None:
            return
        needed = expected.peaks.allocated + self._more_than_estimated
        possible = self._device.free_bytes() + self._device.read().reserved
        if needed > possible:
            self.say(
                f"a batch of {batch} needs {format_bytes(needed)} ({self.engine}, peak in {expected.peaks.phase}), but torch can "
                f"get only {format_bytes(possible)}: this step is likely to run out of memory"
            )

    def _report(self) -> None:
        """Print measured and estimated peaks of the steps so far, and write the record. Runs once."""
        if self._reported or self._largest is None:
            return
        self._reported = True
        expected = self._estimates[self._largest]
        if self._recorder is None or self._device is None:
            if expected is not None:
                self.say(f"estimated for {self._largest}: {_in_short(expected)}")
            return
        try:
            record = self._record(self._largest)
        except PeftplanError as error:
            self.say(f"no record: {error}")
            return
        answer = Answer(Case(Path("training"), 1, record), stated(record, expected)) if expected else None
        self.say(f"after {self._steps} steps, the largest of {self._largest}")
        for line in lines.of_record(record, {self.engine: answer} if answer else {}):
            self.say(line)
        if expected is not None and expected.peaks is not None and record.peaks.overall.allocated is not None:
            self._more_than_estimated = record.peaks.overall.allocated - expected.peaks.allocated
        if self.output is not None:
            append(Path(self.output), [record])

    def _record(self, batch: Seen) -> Record:
        assert self._recorder is not None
        assert self._device is not None
        outcome = Outcome(
            outcome="ok",
            error=None,
            figures=tuple(self._recorder.figures),
            warmup=min(1, self._steps - 1),
            num_trainable=(counted := counts(self._model))[0],
            num_total=counted[1],
            context_bytes=None,
            before_bytes=self._device.before_bytes,
        )
        return record_of(prepare(**self._arguments(batch)), outcome, self._device)


def _in_short(expected: Estimate) -> str:
    """An estimate as part of a line of text."""
    if expected.peaks is None:
        return f"at least {format_bytes(expected.persistent_bytes)}"
    return f"{format_bytes(expected.peaks.allocated)} allocated at the peak, in {expected.peaks.phase}"

"""One GPU in a trace: the class that each strategy's rank changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from peftplan.depth.log import Moment
from peftplan.depth.shallow import Stack
from peftplan.job.setup import Setup
from peftplan.memory.recast import is_recast
from peftplan.storage import QuantConfig
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.load import load
from peftplan.trace.model import Built
from peftplan.trace.optimizers import Steps, make_optimizer

if TYPE_CHECKING:
    from peftplan.trace.result import Traced


class OneGpu:
    """What a trace of one GPU does where a rank of several does otherwise (`trace.ranks`)."""

    tracker: type[Tracker] = Tracker
    rank = 0
    alone = True
    """Whether there is no other rank."""
    whole = True
    """Whether it holds the weights in the dtypes of one GPU."""
    unscales_fp16 = False
    """Whether its scaler takes gradients in fp16."""
    prepares = False
    """Whether it has wrapped the forward as accelerate prepares it (`trace.steps.prepared`)."""
    stacks: tuple[Stack, ...] = ()
    """The stacks whose log is made from those of shallow models."""
    model: Traced | None = None
    """The trace of `model_alone`."""

    def extended(
        self, stacks: tuple[Stack, ...], config: Mapping[str, Any], setup: Setup, quant: QuantConfig | None
    ) -> tuple[Stack, ...]:
        """The stacks, of those whose layers are alike, whose log is made from those of shallow models."""
        return stacks

    def model_alone(self, setup: Setup) -> OneGpu | None:
        """What is traced first, whose log stands for the model on each rank; None where the model itself runs."""
        return None

    @property
    def more_steps(self) -> int:
        """Steps until one is steady, beyond those of one GPU."""
        return 0

    def world(self) -> AbstractContextManager[None]:
        """The process group, in which the model is made too."""
        return nullcontext()

    def divided(self, base: Any) -> None:
        """What is done to the base model, on the host, before it gets an adapter."""

    def device_of(self, built: Built, on: torch.device) -> Callable[[torch.nn.Module], torch.device]:
        """A module → where it is, of a model whose device is `on`."""
        return lambda module: on

    def started(self, tracker: Tracker) -> AbstractContextManager[None]:
        """The circumstances of the run."""
        return nullcontext()

    def load(self, built: Built, tracker: Tracker, setup: Setup, quant: QuantConfig | None) -> None:
        """Load the model."""
        load(built, tracker, setup, quant, recasts=is_recast(setup, quant, None, adapted=True))

    def called(self, built: Built) -> torch.nn.Module:
        """What the loop calls as its model."""
        model: torch.nn.Module = built.model
        return model

    def watched(self, built: Built) -> Iterator[tuple[str, torch.nn.Module]]:
        """The modules whose forwards name what runs, with their names."""
        yield from ((name, module) for module in built.model.modules() if (name := built.names.get(id(module))))

    def prepared(self, built: Built, setup: Setup) -> Setup:
        """The setup of the step: that of the job."""
        return setup

    def stepping(self, built: Built, tracker: Tracker, setup: Setup) -> Steps:
        """The optimizer of the loop."""
        return make_optimizer(setup, built.model, tracker)

    def batches(self, built: Built) -> Callable[[bool], None]:
        """What is called before each micro batch."""
        return lambda last: None

    def complete(
        self, log: Sequence[Moment], began: Sequence[tuple[int, str]]
    ) -> tuple[Sequence[Moment], Sequence[tuple[int, str]]]:
        """The log of the whole depth, and where its phases begin."""
        return log, began

    def apart(self, traced: Traced) -> Traced:
        """The trace, with those of each GPU where it is of several."""
        return traced

"""The loop around the model, as facts of the setup."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from peftplan.job.trainer import LOSS, Forward, Trainer
from peftplan.memory.looped_steps import Projected
from peftplan.optim import Optimizer
from peftplan.parameters import Parameter

if TYPE_CHECKING:
    from peftplan.memory.pipeline import OfRank


class Program(NamedTuple):
    """The fields of the setup that decide the loop."""

    trainer: Trainer
    keep_outputs: bool
    optimizer: Optimizer
    accumulation: int = 1
    collects: bool = False
    """Whether the batches of all micro batches are on the device before a step (`Script.collects_batches`)."""
    keep_gradients: bool = False
    holds_gradients: bool = False
    """Whether a variable of the loop keeps the gradients of the step before until backward has ended."""
    updates_ranks: bool = False
    """Whether AdaLoRA's rank allocator is called after the optimizer's step (`Script.updates_ranks`)."""
    left_alone: frozenset[str] = frozenset()
    """Parameters that get gradients but that the optimizer does not update."""
    frees_outputs: bool = False
    """Whether kept outputs are freed after each backward."""
    shards: tuple[Parameter, ...] | None = None
    """What the optimizer steps over, where it is not the whole parameters."""
    scales: bool = False
    """Whether the loss is scaled, as accelerate does for `mixed_precision="fp16"`."""
    unscales_fp16: bool = False
    """Whether the scaler takes gradients in fp16, as FSDP1's does (torch, distributed/fsdp/sharded_grad_scaler.py,
    `_unscale_grads_`)."""
    syncs_each_batch: bool = False
    """Whether gradients are reduced in every micro batch, not in the last alone."""
    forwards: tuple[Forward, ...] = LOSS
    """The forwards of a micro batch."""
    beta: float | None = None
    """The weight of the teacher in a mixture of student and teacher; at 0 and 1 there is none."""
    schedule: "OfRank | None" = None
    """The stages of a pipeline, and the order in which they run micro batches."""
    projected: Mapping[str, Projected] = MappingProxyType({})
    """Of what APOLLO projects, by name."""
    copies_outputs: bool = False
    """Whether DDP returns a copy of each of the model's outputs (torch, nn/parallel/distributed.py, `_DDPSink`)."""
    sent: tuple[int, ...] = ()
    """Bytes of the flat tensors that DDP sends before the first forward of a step (`synced.sent_in_forward`)."""
    steps_in_backward: bool = False
    """Whether accelerate's `backward` also clips and steps, as under DeepSpeed: the loss, and its graph, is still there then."""

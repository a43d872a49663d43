"""Tensor parallelism: transformers' own `tp_plan`, with DTensors over the fake process group.

The model is divided on the host, before peft adapts it, and each rank loads its part.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh

from peftplan.job.setup import Setup
from peftplan.storage import QuantConfig
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.load import load
from peftplan.trace.model import Built
from peftplan.trace.ranks.fsdp2 import RankTracker, shapes_unseen
from peftplan.trace.ranks.group import OneOfSeveral

DENSE, EXPERT = (("pp", "dp_replicate", replicas, parts) for replicas, parts in (("fsdp", "tp"), ("efsdp", "ep")))
"""Dims of transformers' meshes (distributed/utils.py, `initialize_distributed_mesh`); all but the last are 1 here."""


class PartTracker(RankTracker):  # type: ignore[no-untyped-call]
    """A tracker that records no tensor on `meta`."""

    def _see(self, tensor: torch.Tensor, func: Any, source: Any) -> None:
        """Pass over what transformers makes to ask for strides, and DeepSpeed for shapes."""
        device = getattr(tensor, "fake_device", None)
        if device is None or device.type != "meta":
            super()._see(tensor, func, source)


@dataclass
class Tp(OneOfSeveral):
    """Rank 0, whose parts are the largest."""

    tracker = PartTracker

    def divided(self, base: Any) -> None:
        """Divide the model as `from_pretrained` does before it loads. Weights are tied after that."""
        for name in base.all_tied_weights_keys:
            module, _, leaf = name.rpartition(".")
            parameters = base.get_submodule(module)._parameters
            parameters[leaf] = nn.Parameter(parameters[leaf].detach().clone(), parameters[leaf].requires_grad)
        size = self.distributed.world_size
        dense, expert = (init_device_mesh("cpu", (1, 1, 1, size), mesh_dim_names=names) for names in (DENSE, EXPERT))
        base.maybe_distribute_model(base, DistributedConfig(tp_size=size), TransformersDeviceMesh(dense, expert))
        base.tie_weights(recompute_mapping=False)

    def started(self, tracker: Tracker) -> AbstractContextManager[None]:
        """Record no tensor that only teaches DTensor a shape."""
        return shapes_unseen(tracker)

    def load(self, built: Built, tracker: Tracker, setup: Setup, quant: QuantConfig | None) -> None:
        """Load each part to the device by its name."""
        load(built, tracker, setup, quant, arrives=True)

"""FSDP2 on fake tensors, over torch's fake process group.

accelerate's own code makes the units (`fsdp2_prepare_model`); torch's own gathers, frees and reduces them. Fake tensors of the
host and of the device look alike, so what torch moves to the device before it shards a unit is allocated where it moves it
(`_move_states_to_device`). Streams are those that torch changes to, which on the CPU do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # type: ignore[import-untyped]
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from peftplan.dtypes import parse_dtype
from peftplan.errors import RefusedError
from peftplan.job.setup import Setup
from peftplan.libraries.quantized import TORCH_DTYPES
from peftplan.storage import QuantConfig
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.load import in_dicts, load
from peftplan.trace.model import Built
from peftplan.trace.ranks.group import OneOfSeveral
from peftplan.trace.reasons import reason
from peftplan.versions import FSDP2_KEEPS_LAST_LOADED

MOVES = "torch.distributed.fsdp._fully_shard._fsdp_init._move_states_to_device"
"""Where torch moves what a unit holds to the device, before it shards it."""
WAIT = torch.ops._c10d_functional.wait_tensor.default
POLICIES = {
    None: transformer_auto_wrap_policy,
    "transformer": transformer_auto_wrap_policy,
    "size": size_based_auto_wrap_policy,
    "none": None,
}
"""`Distributed.wrap_policy` → accelerate's policy, by which it makes the units."""


class RankTracker(Tracker):  # type: ignore[no-untyped-call]
    """A tracker of shards and streams."""

    offloads = False
    """Whether shards, their gradients and states lie on the host, where the optimizer steps."""

    @cached_property
    def _streams(self) -> dict[int, int]:
        """Identity of a stream → its number."""
        return {id(torch.cpu._default_cpu_stream): 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave an operation on DTensors to them: they run it on their shards. What is waited for is the same tensor."""
        if func is WAIT:
            return args[0]
        return NotImplemented if DTensor in types else super().__torch_dispatch__(func, types, args, kwargs)

    @cached_property
    def _stream_of_node(self) -> dict[int, int]:
        """Autograd node, by its number, whose forward ran on another stream than the default one → that stream."""
        return {}

    _newest = 0
    """Number of the autograd node that was made last."""

    def _enter_op(self) -> None:
        super()._enter_op()
        number = torch._C._autograd._get_sequence_nr()
        if number != self._newest:
            self._newest = number
            if stream := self._current():
                self._stream_of_node[number - 1] = stream

    def _current(self) -> int:
        return self._streams.setdefault(id(torch.cpu.current_stream()), len(self._streams))

    def stream(self) -> int:
        """The number of the current stream, in the order in which they allocate; 0 is the default one.

        The backward of a node runs on the stream on which its forward ran, as on CUDA (torch, autograd/engine.cpp).
        """
        node = torch._C._current_autograd_node()
        current = self._current()
        return current if current or node is None else self._stream_of_node.get(node._sequence_nr(), 0)

    def begin(self, phase: str) -> None:
        """Begin a phase. Nothing of a step on the host is recorded."""
        if self.offloads:
            self._paused += (phase == "step") - (self.phase == "step")
        super().begin(phase)


@contextmanager
def shapes_unseen(tracker: Tracker) -> Iterator[None]:
    """Record no tensor that only teaches DTensor a shape."""
    learn = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(propagator: ShardingPropagator, schema: Any) -> Any:
        with tracker.paused():
            return learn(propagator, schema)

    with patch.object(ShardingPropagator, learn.__name__, unseen):
        yield


@contextmanager
def offloading(tracker: Tracker) -> Iterator[None]:
    """Make the copies between device and host, which fake tensors do not tell apart, where torch's FSDP does: with `cpu()`, or
    with `to()` and `non_blocking`.
    """
    to = torch.Tensor.to

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if not tracker.sees(tensor):
            return tensor.clone()
        with tracker.paused():
            copy = tensor.clone()
        tracker.on_host(copy)
        return copy

    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return copied(tensor) if "non_blocking" in kwargs else to(tensor, *args, **kwargs)

    with patch.object(torch.Tensor, "cpu", copied), patch.object(torch.Tensor, "to", moved):
        yield


@dataclass
class Fsdp2(OneOfSeveral):
    """Rank 0 of a world that is not there: the largest, since its shards are all whole."""

    tracker = RankTracker
    _mesh: DeviceMesh = field(init=False)

    def prepared(self, built: Built, setup: Setup) -> Setup:
        """Cast what trains to fp32, on the host, as accelerate does before it shards (`fsdp2_prepare_model`).

        Returns the setup of the step: units compute in the dtype that their weights are gathered in, not under autocast.
        """
        if setup.autocast != "none" and setup.quant is None:
            for parameter in built.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.float32)
        return setup.model_copy(update={"autocast": "none"})

    @contextmanager
    def started(self, tracker: Tracker) -> Iterator[None]:
        """Let the tracker see storages that are resized and buffers of collectives, but no tensor that only teaches DTensor a
        shape.
        """
        allocate, resize = DefaultAllocMixin.allocate, torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
            resize(storage, nbytes)
            tracker.resized(storage)
            return storage

        def named(allocator: DefaultAllocMixin, size: Any, **options: Any) -> torch.Tensor:
            tensor = allocate(allocator, size, **options)
            tracker.register(tensor, "communication", "")
            return tensor

        offloads = self.distributed.offload_params == "cpu"
        if isinstance(tracker, RankTracker):
            tracker.offloads = offloads
        with (
            patch.object(torch.UntypedStorage, "resize_", resized),
            shapes_unseen(tracker),
            patch.object(DefaultAllocMixin, "allocate", named),
            offloading(tracker) if offloads else nullcontext(),
        ):
            self._mesh = init_device_mesh("cpu", self._dims(), mesh_dim_names=("replicate", "shard")[-len(self._dims()) :])
            yield

    def _dims(self) -> tuple[int, ...]:
        """Replicas and shards; shards alone where the model is not replicated."""
        shards = self.distributed.shards
        replicas = self.distributed.world_size // shards
        return (shards,) if replicas == 1 else (replicas, shards)

    def load(self, built: Built, tracker: Tracker, setup: Setup, quant: QuantConfig | None) -> None:
        """Shard the model as accelerate does, unit by unit: each is moved to the device whole, unless it was loaded there to be
        quantized. Packed weights in whole numbers are not sharded.

        `cpu_ram_efficient_loading` makes the units without tensors, and fills them one tensor after the other
        (`fsdp2_load_full_state_dict`).
        """
        if quant is not None:
            load(built, tracker, setup, quant)
        # accelerate's loop over the optimizer's parameters leaves its variable bound to the last of them (`_prepare_fsdp2`)
        _last = [p for p in built.model.parameters() if p.requires_grad][-1]
        one_by_one = quant is None and bool(self.distributed.cpu_ram_efficient_loading)
        whole = {p for p in built.model.parameters() if not p.is_floating_point()}
        with (
            patch(MOVES, self.mover(built, tracker) if quant is None and not one_by_one else lambda *there: None),
            tracker.paused() if one_by_one else nullcontext(),
            patch("torch.distributed.fsdp.fully_shard", partial(fully_shard, ignored_params=whole)),
        ):
            try:
                fsdp2_prepare_model(self._accelerator(setup), built.model)
            except ValueError as error:  # a class of layers that the model names and does not have
                refusal = f"accelerate {version('accelerate')} refuses it: {reason(error)}"
                accepted = "--transformer-cls-names-to-wrap with classes of the model"
                raise RefusedError(f"{refusal}; accepted: {accepted}") from None
        keeps, last = not FSDP2_KEEPS_LAST_LOADED.after(self.distributed.accelerate or version("accelerate")), None
        for name, parameter in built.model.named_parameters():
            sizes = {"nbytes": parameter.nbytes, "shape": tuple(parameter.shape), "dtype": parse_dtype(parameter.dtype)}
            if last is not None and not keeps:
                tracker.end(last)
            full = tracker.passing(**sizes, op="load") if one_by_one else None
            if last is not None and keeps:
                tracker.end(last)
            tracker.register(parameter, built.owners.get(name, "weights"), name)  # sharding parts some tied weights
            last = full
        if last is not None:
            tracker.end(last)
        for name, tensor in (*built.model.named_buffers(), *in_dicts(built)):
            tracker.register(tensor, "buffers", name)

    def mover(self, built: Built, tracker: Tracker) -> Callable[..., None]:
        """What moves tensors to the device, a tied table once: a function of parameters, buffers and the device."""
        names = {id(tensor): name for name, tensor in (*built.model.named_parameters(), *built.model.named_buffers())}

        def move(params: list[nn.Parameter], buffers: list[torch.Tensor], device: torch.device) -> None:
            for tensor in dict.fromkeys((*params, *buffers)):
                name = names[id(tensor)]
                tensor.data = torch.empty_like(tensor)
                tracker.register(tensor, built.owners.get(name, "buffers"), name)

        return move

    def batches(self, built: Built) -> Callable[[bool], None]:
        """What is called before each micro batch: only the last one of a step reduces gradients (`Accelerator.no_sync`)."""

        def begin(last: bool) -> None:
            built.model.set_requires_gradient_sync(last or bool(self.distributed.sync_each_batch))

        return begin

    def _accelerator(self, setup: Setup) -> SimpleNamespace:
        """What `fsdp2_prepare_model` reads of an Accelerator and its plugin."""
        distributed = self.distributed
        reshards, by_size = distributed.reshard_after_forward, distributed.wrap_policy == "size"
        plugin = SimpleNamespace(
            set_auto_wrap_policy=lambda model: None,
            auto_wrap_policy=None if by_size and not distributed.min_num_params else POLICIES[distributed.wrap_policy],
            transformer_cls_names_to_wrap=distributed.transformer_cls_names_to_wrap,
            min_num_params=distributed.min_num_params,
            reshard_after_forward=True if reshards is None else reshards,
            cpu_offload=CPUOffloadPolicy(pin_memory=False) if distributed.offload_params == "cpu" else None,
            mixed_precision_policy=self._policy(setup),
            ignored_modules=None,
            cpu_ram_efficient_loading=False,
        )
        return SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            torch_device_mesh={(): self._mesh},
            parallelism_config=SimpleNamespace(fsdp_dim_names=()),
            mixed_precision="no",  # cast already
            device=self._mesh.device_type,
            is_main_process=False,
        )

    def _policy(self, setup: Setup) -> MixedPrecisionPolicy:
        """accelerate's policy of `mixed_precision`, with the user's dtypes (utils/dataclasses.py, `set_mixed_precision`)."""
        autocast = None if setup.autocast == "none" else str(setup.autocast)
        dtypes = (self.distributed.param_dtype or autocast, self.distributed.reduce_dtype or autocast, autocast)
        param, reduced, output = (None if name is None else TORCH_DTYPES[name] for name in dtypes)
        return MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduced, output_dtype=output)

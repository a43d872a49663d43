"""FSDP1: torch's own `FullyShardedDataParallel` on fake tensors, over the fake process group, made as accelerate and Trainer do.

The GPU is never behind the host here: what `record_stream` marks is free at once. Rank 0 sends its weights to the others, as
Trainer lets it (`sync_module_states`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import BackwardPrefetch, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.fsdp._runtime_utils import _lazy_init
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from peftplan import versions
from peftplan.job.setup import Setup
from peftplan.storage import QuantConfig
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.model import Built
from peftplan.trace.ranks.fsdp2 import Fsdp2

FSDP = "torch.distributed.fsdp"
PREFETCHES = {"pre": BackwardPrefetch.BACKWARD_PRE, "post": BackwardPrefetch.BACKWARD_POST}
WRAPPED = "_fsdp_wrapped_module."
"""What a unit adds to the names of what it holds."""


def _address(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        address: int = tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.itemsize
    return address


def addressed() -> AbstractContextManager[Any]:
    """Give a fake tensor the address of its storage object: torch's FSDP and DeepSpeed ask whether tensors lie at one place."""
    return patch.object(torch.Tensor, "data_ptr", _address)


def _at_one_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _is_allocated(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().nbytes() > 0


class Fsdp1(Fsdp2):
    """A rank that holds a part of the flat parameter of each unit."""

    unscales_fp16 = True
    _wrapped: Any
    _names: dict[nn.Module, str]
    """Wrapped module → its name."""

    def prepared(self, built: Built, setup: Setup) -> Setup:
        """The setup of the step: accelerate leaves autocast on."""
        return setup

    @contextmanager
    def started(self, tracker: Tracker) -> Iterator[None]:
        """As FSDP2, and let torch ask where fake tensors lie. What units allocate before the first forward is theirs."""
        initialize = FlatParamHandle.init_flat_param_attributes

        def of_unit(handle: FlatParamHandle) -> None:
            name = self._names.get(handle._fully_sharded_module, "")
            tracker._stack.append(name)
            initialize(handle)
            tracker._stack.pop()
            if not name:
                tracker.register(handle.flat_param._full_param_padded, "gathered_weights", "flat_param")

        with (
            super().started(tracker),
            addressed(),
            patch(f"{FSDP}._flat_param._same_storage", _at_one_place),
            patch(f"{FSDP}._flat_param._data_ptr_allocated", _is_allocated),
            patch(f"{FSDP}._flat_param._get_dtype_size", lambda dtype: dtype.itemsize),  # it asks a tensor on the host, once
            patch.object(FlatParamHandle, initialize.__name__, of_unit),
        ):
            yield

    def load(self, built: Built, tracker: Tracker, setup: Setup, quant: QuantConfig | None) -> None:
        """Make the units: each is moved to the device, and leaves its part of a flat parameter there. accelerate then casts what
        trains to fp32 (`Accelerator.prepare_model`), since `versions.FSDP1_UPCASTS`.
        """
        policy, reshards = self._policy(setup), self.distributed.reshard_after_forward is not False
        with (
            patch(f"{FSDP}._init_utils._move_states_to_device", self.mover(built, tracker)),
            patch(f"{FSDP}._init_utils._check_module_states_for_sync_module_states", lambda module: None),  # it asks for CUDA
        ):
            self._wrapped = FullyShardedDataParallel(
                built.model,
                sharding_strategy=ShardingStrategy.FULL_SHARD if reshards else ShardingStrategy.SHARD_GRAD_OP,
                auto_wrap_policy=self._wrap_policy(built.model),
                mixed_precision=MixedPrecision(
                    param_dtype=policy.param_dtype, reduce_dtype=policy.reduce_dtype, buffer_dtype=policy.output_dtype
                ),
                backward_prefetch=PREFETCHES.get(str(self.distributed.backward_prefetch)),
                forward_prefetch=bool(self.distributed.forward_prefetch),
                use_orig_params=self.distributed.use_orig_params is not False,
                sync_module_states=True,
                device_id=torch.device("cpu"),
            )
        self._names = {unit.module: name for name, unit in self._units()}
        units = [(name, unit, unit._flat_param) for name, unit in self._units() if unit._has_params]
        upcasts = setup.autocast != "none" and not versions.FSDP1_UPCASTS.after(self.distributed.accelerate)
        for _, unit, flat in units:
            if upcasts and flat.requires_grad:
                flat.data = flat.data.to(torch.float32)
                unit._handle._orig_param_dtype = torch.float32
        for name, _, flat in units:
            first = f"{name}.{flat._fqns[0]}".replace(WRAPPED, "").lstrip(".")
            tracker.register(flat, built.owners.get(first, "weights"), f"{name}.flat_param")

    def _units(self) -> Iterator[tuple[str, Any]]:
        """Each unit with the name of what it wraps."""
        for name, module in self._wrapped.named_modules():
            if isinstance(module, FullyShardedDataParallel):
                yield name.replace(WRAPPED, "").removesuffix(WRAPPED.rstrip(".")).rstrip("."), module

    def watched(self, built: Built) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the model, and the units, which gather around them."""
        yield from super().watched(built)
        for _, unit in self._units():
            if name := built.names.get(id(unit.module)):
                yield name, unit

    def called(self, built: Built) -> Any:
        """The model as FSDP wraps it."""
        return self._wrapped

    def batches(self, built: Built) -> Callable[[bool], None]:
        """What is called before each micro batch: only the last one of a step reduces gradients (`no_sync`)."""

        def begin(last: bool) -> None:
            syncs = last or bool(self.distributed.sync_each_batch)
            if not syncs:
                _lazy_init(self._wrapped, self._wrapped)
            for _, unit in self._units():
                unit._sync_gradients = syncs

        return begin

    def _wrap_policy(self, model: Any) -> Callable[..., bool]:
        """accelerate's policy, or peft's, which Trainer takes for adapters (`update_fsdp_plugin_peft`): what trains is a unit."""
        if isinstance(model, PeftModel):
            policy: Callable[..., bool] = fsdp_auto_wrap_policy(model)  # type: ignore[no-untyped-call]
            return policy
        classes = {type(module) for module in model.modules() if type(module).__name__ in model._no_split_modules}
        return partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)

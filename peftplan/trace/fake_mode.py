"""A `FakeTensorMode` that knows most outputs by itself. To ask torch for each took more than half of a trace.

Of plain tensors (dense, of known size, no constant) on a fake CPU an output depends on shapes, strides and dtypes alone.
`meta_kernels` computes it once, and it is remembered. A view is remembered by its place within what it is a view of, and a slice
is computed: DeepSpeed takes thousands of a flat tensor, each at another place. `Tracker` asks for what is `known` before it calls
torch's dispatcher. All else is left to torch, whose cache gets a key with fewer fields than its own seventeen per tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from peftplan.trace.meta_kernels import META, NotComputedError, Output, again, computed, device_of, has_kernel, outputs

VALUES = frozenset({int, float, bool, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format})
"""Types of arguments that enter the key with their type: 1 equals 1.0, but their products have different dtypes."""
TAKES_OPERATION = "func" in signature(FakeTensorMode._output_from_cache_entry).parameters
"""Whether torch passes the operation to what makes a remembered output; later releases do not."""
VIEW = torch.ops.aten.view.default
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
SLICE = torch.ops.aten.slice.Tensor
VIEWS = frozenset((VIEW, SLICE, torch.ops.aten.detach.default, torch.ops.aten.t.default, torch.ops.prims.view_of.default))
"""Operations whose results lie within their first argument, wherever that begins."""
Placed = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides, and elements before the first one."""

_placed: dict[Any, Placed] = {}
"""Operation of `VIEWS`, shape, strides and arguments → where the result lies."""
_remembered: dict[Any, tuple[torch.device, type | None, tuple[Output | None, ...]]] = {}
"""Operation and arguments → device, kind of sequence, and outputs; None for one that was not asked for."""


def forget() -> None:
    """Forget every output."""
    _placed.clear()
    _remembered.clear()
    FakeTensorMode.cache_clear()


class DenseMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A `FakeTensorMode` for tensors of known sizes, with the same outputs (torch, `_subclasses/fake_tensor.py`)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._attributes: dict[torch.device, dict[str, Any]] = {}
        """Device → what torch's constructor sets on a fake tensor."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip dynamo: nothing here is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """The output that is known, or what torch makes of the operation."""
        kwargs = kwargs or {}
        out = self.known(func, args, kwargs)
        return self.by_torch(func, types, args, kwargs) if out is NotImplemented else out

    def by_torch(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What torch makes of the operation, or remembers. Below autograd an `_unsafe_view` is a view like any other."""
        func = VIEW if func is UNSAFE_VIEW else func
        key: Any = None if self.cache_crosscheck_enabled or not self.cache_enabled else self._dense_key(func, args, kwargs)
        entry: Any = key and FakeTensorMode.cache.get(key)
        if hasattr(entry, "output_infos"):
            FakeTensorMode.cache_hits += 1
            state: Any = None  # it is for symbolic sizes
            return self._output_from_cache_entry(state, entry, key, *((func, args) if TAKES_OPERATION else (args,)))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def known(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The output of an operation on plain tensors, or NotImplemented."""
        if self.shape_env is not None or torch.is_inference_mode_enabled():
            return NotImplemented
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            try:
                func = VIEW if func is UNSAFE_VIEW else func
                if func in VIEWS and not kwargs and type(args[0]) is FakeTensor and self._is_plain(args[0]):
                    return self._view(func, args)
                return self._known(func, args, kwargs)
            except NotComputedError:
                return NotImplemented

    def _known(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        tensors: list[Any] = []
        key = [func, torch.get_default_dtype(), *kwargs]
        if not (self._describe(key, tensors, args) and self._describe(key, tensors, kwargs.values())):
            return NotImplemented
        entry = _remembered.get(described := tuple(key))
        if entry is not None:
            on, kind, remembered = entry
            results = [None if output is None else again(output, tensors) for output in remembered]
        elif has_kernel(func) and any(type(x) is FakeTensor for x in tensors):  # torch computes on values if all are real
            on = device_of(tensors[0])
            out = computed(func, args, kwargs, on)
            kind = type(out) if isinstance(out, list | tuple) else None
            results = [out] if kind is None else out
            _remembered[described] = on, kind, outputs(results, tensors)
        else:
            return NotImplemented
        faked = [None if x is None else self._faked(x, on) for x in results]
        return faked[0] if kind is None else kind(faked)

    def _is_plain(self, x: Any) -> bool:
        """Whether a fake tensor has no more facts than dtype, device and where it lies."""
        if x.fake_mode is not self or x.constant is not None or x.layout is not torch.strided:
            return False
        return not (x.is_quantized or x.is_conj() or x.is_neg() or x.is_inference())

    def _describe(self, key: list[Any], tensors: list[Any], arguments: Iterable[Any]) -> bool:
        """Append these arguments to the key, and list their tensors. Returns False if one is not plain."""
        for argument in arguments:
            kind = type(argument)
            if kind is FakeTensor:
                if argument.fake_device.type != "cpu" or not self._is_plain(argument):
                    return False
                key += (argument.dtype, argument.shape, argument.stride(), argument.fake_device)
                tensors.append(argument)
            elif kind in VALUES:
                key += (kind, argument)
            elif kind is torch.Tensor and argument.dtype == torch.int64 and argument.layout is torch.strided:
                key += (kind, argument.shape, argument.stride(), argument.device)
                tensors.append(argument)
            elif kind is list or kind is tuple:
                key += (kind, len(argument))
                if not self._describe(key, tensors, argument):
                    return False
            else:
                return False
        return True

    def _view(self, func: Any, args: Sequence[Any]) -> Any:
        """A view of a plain tensor: a slice, or one that is remembered by its place within the tensor."""
        x: Any = args[0]
        if func is SLICE:
            return self._at(x, _slice(x, *args[1:]))
        key = (func, x.shape, x.stride(), *(tuple(a) if isinstance(a, list) else a for a in args[1:]))
        placed = _placed.get(key)
        if placed is None:
            out = computed(func, args, {}, x.fake_device)
            placed = _placed[key] = tuple(out.shape), out.stride(), out.storage_offset() - x.storage_offset()
        return self._at(x, placed)

    def _at(self, x: FakeTensor, placed: Placed) -> FakeTensor:
        shape, stride, skipped = placed
        tensor = torch.empty(0, dtype=x.dtype, device=META)
        tensor.set_(x.untyped_storage(), x.storage_offset() + skipped, shape, stride)
        return self._faked(tensor, x.fake_device)

    def _cache_key(self, state: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """`_dense_key`, or torch's own."""
        return self._dense_key(func, args, kwargs) or super()._cache_key(state, func, args, kwargs)

    def _dense_key(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The key of an output: the operation, its arguments, and the thread's settings. None if only torch's own key will do."""
        inference, device = torch.is_inference_mode_enabled(), torch._C._get_default_device()
        key = [func, torch.get_default_dtype(), device, inference, *kwargs]
        dense = self.shape_env is None and self._add(key, args) and self._add(key, kwargs.values())
        return tuple(key) if dense else None

    def _add(self, key: list[Any], arguments: Iterable[Any]) -> bool:
        """Append these arguments to the key. Returns False if one is of a kind that only torch's own key handles."""
        for argument in arguments:
            kind = type(argument)
            if kind in VALUES:
                key += (kind, argument)
            elif kind is FakeTensor:
                if argument.fake_mode is not self or argument.constant is not None or argument.layout is not torch.strided:
                    return False
                key += (argument.dtype, argument.shape, argument.stride(), argument.fake_device, argument.storage_offset())
                key += (argument.untyped_storage().nbytes(), argument.requires_grad, argument.is_inference())
                key += (argument.is_quantized, argument.is_conj(), argument.is_neg())
            elif kind is list or kind is tuple:
                key += (kind, len(argument))
                if not self._add(key, argument):
                    return False
            else:
                return False
        return True

    def _get_output_tensor_from_cache_entry(self, state: Any, entry: Any, key: Any, *call: Any) -> Any:
        """A new tensor with the metadata of the entry, over the storage of the argument that it is a view of.

        `call`: the operation where torch passes it, and its arguments.
        """
        metadata = entry.metadata
        if metadata is None or metadata.is_conj or metadata.is_neg or self.shape_env is not None:
            return super()._get_output_tensor_from_cache_entry(state, entry, key, *call)
        facts = {"dtype": metadata.dtype, "layout": metadata.layout, "requires_grad": metadata.requires_grad}
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            tensor = torch.empty_strided(metadata.shape, metadata.stride, device="meta", **facts)
            if entry.view_idx is not None:
                storage = call[-1][entry.view_idx].untyped_storage()
                tensor.set_(storage, metadata.storage_offset, metadata.shape, metadata.stride)
            return self._faked(tensor, metadata.device)

    def _faked(self, tensor: torch.Tensor, device: torch.device) -> FakeTensor:
        """The fake tensor on that device over a tensor on `meta`: torch's constructor once per device, then what it sets."""
        if device not in self._attributes:
            self._attributes[device] = dict(FakeTensor(self, torch.empty(0, device="meta"), device).__dict__)
        fake: Any = torch.Tensor._make_subclass(
            FakeTensor, tensor, tensor.requires_grad, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_throw_on_mutable_data_ptr(fake)
        fake.__dict__.update(self._attributes[device])
        return fake  # type: ignore[no-any-return]


def _slice(x: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Placed:
    """Where a slice lies within a tensor."""
    first, last, _ = slice(start, end).indices(x.shape[dim])
    shape, stride = list(x.shape), list(x.stride())
    shape[dim] = max(0, -(-(last - first) // step))
    skipped = first * stride[dim]
    stride[dim] *= step
    return tuple(shape), tuple(stride), skipped

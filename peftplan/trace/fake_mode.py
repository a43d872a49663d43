"""A `FakeTensorMode` with a cheaper cache key. Computing torch's own key took half the time of a trace.

`FakeTensorMode` caches the outputs of operations by their inputs, with a key of seventeen fields per tensor. Fewer fields
distinguish dense tensors without symbolic sizes. All other tensors are left to torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

VALUES = frozenset({int, float, bool, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format})
"""Types of arguments that enter the key with their type: 1 equals 1.0, but their products have different dtypes."""


class DenseMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A `FakeTensorMode` for tensors of known sizes, with the same outputs (torch, `_subclasses/fake_tensor.py`)."""

    def _cache_key(self, state: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The key of an output: the operation, its arguments, and the thread's settings."""
        inference, device = torch.is_inference_mode_enabled(), torch._C._get_default_device()
        key = [func, torch.get_default_dtype(), device, inference, *kwargs]
        if self.shape_env is None and self._add(key, args) and self._add(key, kwargs.values()):
            return tuple(key)
        return super()._cache_key(state, func, args, kwargs)

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

    def _get_output_tensor_from_cache_entry(self, state: Any, entry: Any, key: Any, func: Any, args: Sequence[Any]) -> Any:
        """A new tensor with the metadata of the entry, over the storage of the argument that it is a view of."""
        metadata = entry.metadata
        if metadata is None or metadata.is_conj or metadata.is_neg or self.shape_env is not None:
            return super()._get_output_tensor_from_cache_entry(state, entry, key, func, args)
        facts = {"dtype": metadata.dtype, "layout": metadata.layout, "requires_grad": metadata.requires_grad}
        with in_kernel_invocation_manager(self):
            tensor = torch.empty_strided(metadata.shape, metadata.stride, device="meta", **facts)
            if entry.view_idx is not None:
                storage = args[entry.view_idx].untyped_storage()
                tensor.set_(storage, metadata.storage_offset, metadata.shape, metadata.stride)
        return FakeTensor(self, tensor, metadata.device)

"""Outputs of operations on plain tensors, as torch's kernels for the meta device say: by shapes, strides and dtypes.

`FakeTensorMode` ends at the same kernels, after it has asked which of many kinds the operation is, or at a decomposition in
Python whose parts it asks in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

META = torch.device("meta")
_NAMES = """
    _foreach_norm.Scalar _log_softmax _log_softmax_backward_data _safe_softmax _softmax _softmax_backward_data _to_copy addmm
    bmm cat clone constant_pad_nd cumsum embedding embedding_dense_backward empty_like expand full_like linalg_vector_norm
    mean.dim mm native_dropout native_dropout_backward native_layer_norm native_layer_norm_backward new_empty new_full new_ones
    new_zeros nll_loss_backward nll_loss_forward ones_like permute select.int select_backward slice_backward split.Tensor
    split_with_sizes squeeze.dim stack sum sum.dim_IntList transpose.int tril triu unbind.int unsqueeze zeros_like"""
KERNELS = frozenset(_NAMES.split())
"""The operations of aten, next to those that torch tags `pointwise`."""


class Output(NamedTuple):
    """One output: a new tensor, or a view of the only tensor that the operation was given, so many elements behind its first."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    skipped: int | None


class NotComputedError(Exception):
    """torch has to be asked."""


@cache
def has_kernel(func: Any) -> bool:
    """Whether the operation is one of these."""
    if func.namespace != "aten" or func._schema.is_mutable:
        return False
    name = str(func).removeprefix("aten.").removesuffix(".default")
    return name in KERNELS or torch.Tag.pointwise in func.tags


def computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], on: torch.device) -> Any:
    """What the kernel makes of tensors on this device, on the meta device; views share the storage of the fake tensor."""
    try:
        return func(*_on_meta(args, on), **dict(zip(kwargs, _on_meta(kwargs.values(), on), strict=True)))
    except Exception as error:  # torch says better what is wrong
        raise NotComputedError from error


def outputs(results: Sequence[torch.Tensor | None], tensors: Sequence[torch.Tensor]) -> tuple[Output | None, ...]:
    """How to make these outputs again. Raises NotComputedError if they are neither new tensors nor views of an only one."""
    return tuple(None if x is None else _output(x, tensors) for x in results)


def _output(x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Output:
    if type(x) is not torch.Tensor:
        raise NotComputedError
    shape, stride, storage = tuple(x.shape), x.stride(), x.untyped_storage()
    if storage._cdata not in {tensor.untyped_storage()._cdata for tensor in tensors}:
        whole = torch.empty_strided(shape, stride, dtype=x.dtype, device=META)
        if x.storage_offset() or whole.untyped_storage().nbytes() != storage.nbytes():
            raise NotComputedError
        return Output(shape, stride, x.dtype, None)
    if len(tensors) > 1:
        raise NotComputedError
    return Output(shape, stride, x.dtype, int(x.storage_offset() - tensors[0].storage_offset()))


def again(output: Output, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The output on the meta device, for arguments like those that it was computed for."""
    shape, stride, dtype, skipped = output
    if skipped is None:
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)
    x = tensors[0]
    return torch.empty(0, dtype=dtype, device=META).set_(x.untyped_storage(), x.storage_offset() + skipped, shape, stride)


def device_of(x: Any) -> torch.device:
    """The device of a fake tensor or of a real one."""
    on: torch.device = x.fake_device if type(x) is FakeTensor else x.device
    return on


def _stand_in(x: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device in the storage of a fake one; for a real one a tensor of its kind."""
    if type(x) is not FakeTensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
    return torch.empty(0, dtype=x.dtype, device=META).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def _on_meta(arguments: Iterable[Any], on: torch.device) -> list[Any]:
    return [_argument(argument, on) for argument in arguments]


def _argument(argument: Any, on: torch.device) -> Any:
    kind = type(argument)
    if kind is FakeTensor or kind is torch.Tensor:
        if device_of(argument) != on:
            raise NotComputedError
        return _stand_in(argument)
    if kind is list or kind is tuple:
        return kind(_on_meta(argument, on))
    if kind is not torch.device:
        return argument
    if argument != on:
        raise NotComputedError
    return META

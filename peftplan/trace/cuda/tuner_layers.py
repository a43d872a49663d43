"""peft layers whose forward needs values or sparse tensors, on fake tensors: the same allocations, without them.

Source: peft, the file of each method's `layer.py`; torch `native/sparse/cuda/SparseCUDATensorMath.cu`
(`add_out_dense_sparse_cuda`) and `SparseCUDATensor.cu` (`_coalesce_sparse_cuda`). Left out: what a sort of the places of sparse
entries takes while it runs.

| method | what it asks for | here |
| --- | --- | --- |
| BOFT | its CUDA extension | its two kernels' results |
| FRoD | a sparse S, and copies of U and V from the host | a dense S beside the sparse one's places and entries; copies |
| LoHa, LoKr | `torch.rand(1) > module_dropout` | every adapter is applied, the most that a step can take |
| SHiRA | a sparse difference of the weight | one that is dense while it is added |
| WaveFT | the entries within bounds | all of them: `update_layer` draws them so |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from peftplan.job.setup import Setup
from peftplan.libraries.quantized import module_weight
from peftplan.libraries.replacing import replaced
from peftplan.storage import QuantConfig

HOST_BUFFERS = ("boft_P", "frod_U", "frod_V", "frod_s_indices", "frod_s_size")
"""Buffers that peft makes on the host. They stay there if the model was on its device before and is not moved again."""

LASTING = ("shira_indices",)
"""Attributes that hold tensors on the device in a plain dict, by the adapter's name."""


def adapter_from_host(setup: Setup, quant: QuantConfig | None) -> bool:
    """Whether `HOST_BUFFERS` stay there."""
    return setup.by.adapter_on_host(quantized=quant is not None)


def offloaded(module: Any) -> bool:
    """Whether this is a layer of FRoD whose base weight its first forward moves to the host for good."""
    flags = getattr(module, "runtime_offload_base_weight", None) or {}
    return any(flags.values()) and all(type(dropout) is nn.Identity for dropout in module.frod_dropout.values())


class FastBlockDiagonal:
    """BOFT's CUDA extension `fbd_cuda`: blocks (N, D, H, H) in a matrix (N, D·H, D·H), and back."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        n, d, h, _ = blocks.shape
        return [blocks.new_zeros(n, d * h, d * h)]

    @staticmethod
    def backward(grad: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.zeros_like(blocks)]


class _SparseAdded(torch.autograd.Function):
    """A sparse matrix about to be added to a dense one: keeps int64 places and the entries; dense in the sum and in its gradient.

    The sum converts both to the wider dtype, in two buffers.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        ctx.save_for_backward(places.to(torch.int64), values)
        out, buffer = (values.new_empty(rows, columns) for _ in ("sum", "dense_buffer"))
        del buffer
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        _, values = ctx.saved_tensors
        return torch.empty_like(values), None, None, None


class _SparseAsDense(torch.autograd.Function):
    """`sparse_coo_tensor(...).coalesce().to_dense()`: keeps the entries, and places and entries once coalesced."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        ctx.save_for_backward(values, places, torch.empty_like(places), torch.empty_like(values))
        return values.new_zeros(rows, columns)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        values, *_ = ctx.saved_tensors
        return torch.empty_like(values), None, None, None


class _EverythingSelected(TorchFunctionMode):
    """A boolean index selects all: it becomes the places that `nonzero` returns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            tensor, index = args
            index = index if isinstance(index, tuple) else (index,)
            args = (tensor, tuple(torch.arange(i.numel()) if _is_mask(i) else i for i in index))
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _frod_tensors(layer: Any, adapter: str, *, device: Any, dtype: Any, from_host: bool) -> Any:
    """`FrodLayer._get_frod_tensors`: from the host, U, V and the places of S are copied each time."""
    u = layer.frod_U[adapter].to(dtype=dtype, copy=from_host)
    v = layer.frod_V[adapter].to(dtype=dtype, copy=from_host)
    places = layer.frod_s_indices[adapter].to(dtype=torch.int64, copy=from_host)
    values = layer.frod_lambda_s_values[adapter].to(dtype)
    width = v.shape[0]
    s = _SparseAsDense.apply(values, places, width, width)  # type: ignore[no-untyped-call]
    return u, v, s, layer.frod_lambda_l[adapter].to(dtype)


def _frod_product(layer: Any, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """`FrodLayer._sparse_activation_mm` in 16 bits, where S is dense."""
    return z @ s.t()


def _lycoris_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`forward` of LoHa's and LoKr's layers with every adapter applied."""
    result = layer.base_layer(x, *args, **kwargs)
    for adapter in layer.active_adapters:
        if adapter in layer._available_adapters:
            result = result + layer._get_delta_activations(adapter, x, *args, **kwargs)
    out: torch.Tensor = result.to(x.dtype)
    return out


class _Places:
    """BOFT's permutation on the host: `.to(x)` copies it even where its dtype is that of x."""

    def __init__(self, places: torch.Tensor) -> None:
        self._places = places

    def to(self, like: torch.Tensor) -> torch.Tensor:
        return self._places.to(like, copy=True)


def _shira_delta(layer: Any, adapter: str) -> Any:
    """`ShiraLayer.get_delta_weight`."""
    values = layer.shira_weight[adapter] * layer.scaling[adapter]
    return _SparseAdded.apply(values, layer.shira_indices[adapter], layer.out_features, layer.in_features)  # type: ignore[no-untyped-call]


@contextmanager
def on_fake_tensors(*, from_host: bool) -> Iterator[None]:
    """Let these layers run without values. `from_host`: as `adapter_from_host` says."""
    from peft.tuners.boft.layer import Linear as BoftLinear
    from peft.tuners.waveft.layer import WaveFTLayer

    rotated = BoftLinear.forward

    def boft_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if from_host:
            layer.__dict__["boft_P"] = _Places(layer._buffers["boft_P"])  # found before the buffer
        try:
            out: torch.Tensor = rotated(layer, x, *args, **kwargs)
            return out
        finally:
            layer.__dict__.pop("boft_P", None)

    delta = WaveFTLayer.get_delta_weight

    def all_inside(layer: Any, adapter: str) -> Any:
        with _EverythingSelected():
            return delta(layer, adapter)

    def frod_tensors(layer: Any, adapter: str, **kwargs: Any) -> Any:
        return _frod_tensors(layer, adapter, **kwargs, from_host=from_host)

    stand_ins = {
        "peft.tuners.boft.layer.Linear.forward": boft_forward,
        "peft.tuners.boft.layer.get_fbd_cuda": lambda: FastBlockDiagonal,
        "peft.tuners.frod.layer.Linear._get_frod_tensors": frod_tensors,
        "peft.tuners.frod.layer.Linear._sparse_activation_mm": _frod_product,
        "peft.tuners.lora.dora.dequantize_module_weight": module_weight,
        "peft.tuners.loha.layer.LoHaLayer.forward": _lycoris_forward,
        "peft.tuners.lokr.layer.LoKrLayer.forward": _lycoris_forward,
        "peft.tuners.shira.layer.Linear.get_delta_weight": _shira_delta,
        "peft.tuners.waveft.layer.WaveFTLayer.get_delta_weight": all_inside,
    }
    with replaced(stand_ins):
        yield

"""Every known difference between a step on fake CPU tensors and the same step on CUDA, with its cause, and its correction.

| what | cause | corrected by |
| --- | --- | --- |
| attention | CPU has its own flash kernel, and math for masks and dropout | `dispatcher`, by `attention.sdpa`: CUDA's kernels |
| the math kernel | dropout as below, but inside C++; under a mode the mask is added out of place | `math_attention` |
| dropout | CPU multiplies by a mask of the input's dtype; CUDA's `native_dropout` keeps a boolean one | `dispatcher` |
| softmax(fp16, dtype=fp32) | CUDA's kernel reads fp16, writes fp32; CPU copies to fp32 first (ATen SoftMax.cpp) | `dispatcher` |
| softmax backward | CUDA's kernel makes `grad * output` first (SoftMax.cu: `softmax_backward_cuda_out`) | `KERNEL_TEMPORARIES` |
| `_safe_softmax` | on CUDA a composite, which compares the scores with minus infinity (SoftMax.cpp) | `KERNEL_TEMPORARIES` |
| sums and norms over rows | CUDA's blocks share columns through a buffer (Reduce.cuh) | `kernel_temporaries` |
| gradient of an embedding | CUDA sorts more than 3,072 indices, and sums rows in fp32 (Embedding.cu) | `KERNEL_TEMPORARIES` |
| pseudo-inverse | it makes U, Vh, and Vh over the singular values (LinearAlgebra.cpp: `linalg_pinv`) | `KERNEL_TEMPORARIES` |
| cumsum of a boolean mask | CUDA copies it to int64 first (ReduceOps.cpp) | `KERNEL_TEMPORARIES` |
| dropout's results | CUDA allocates the mask before the output (Dropout.cu) | `tracker.DROPOUT` |
| counters of an optimizer | they live on the host, whatever the device | `tracker.LIFT_FRESH` |
| autocast | other operations are cast, and to other dtypes, below composite ones as well (autocast_mode.h) | `dispatcher` |
| `torch.is_autocast_enabled()` | without an argument it asks about CUDA | `as_on_cuda` |
| masks | transformers builds a full mask for fake tensors (`is_tracing`), none for real unpadded ones | `as_on_cuda` |
| statistics of LayerNorm | fp32 for 16-bit inputs (layer_norm_kernel.cu: `acc_type`), on a CPU the inputs' dtype | `statistics` |
| backward of indexing and of clamp | under a mode a copy (FunctionsManual.cpp), else in place | `in_place` |
| `isinf` | a composite, of which a mode sees nothing | `COMPOSITE` |
| sums of gradients | never in place into a tensor subclass (autograd `input_buffer.cpp`) | `tracker`, where torch would |
| `tensor[mask]` | its size is data: fake tensors refuse | `scored.Rows`, `flash.Picked` |
| TRL's chunked loss | without Triton each tile is copied to fp32, and so are factors of products | `chunked.ChunkedLogProbs` |
| `save_on_cpu` | its copies on the host would count as the device's | `hosted.SavedOnHost` |
| flash-attn, Liger, Unsloth | kernels of packages that need CUDA | `flash`, `losses`, `unsloth` |

Left out: scalars that live on the host on CUDA count here as 512 bytes each where the tracker cannot tell; what CUB takes to
sort indices: temporaries of a few MB inside one kernel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from peftplan.hardware.processors import Processors
from peftplan.libraries.replacing import replaced
from peftplan.tape import column_sums, sorted_indices
from peftplan.tape.column_sums import BUFFERS
from peftplan.tape.sorted_indices import sorted_rows
from peftplan.trace.cuda.hosted import SavedOnHost

_ATEN = torch.ops.aten


def _of_sorting(grad: torch.Tensor, indices: torch.Tensor, table: int) -> list[torch.Tensor]:
    """What the gradient of a table of so many rows takes to sort the indices (`peftplan.tape.sorted_indices`)."""
    rows = {what: sorted_rows(what, n=indices.numel(), v=table) for what in set(sorted_indices.BUFFERS)}
    buffers = [indices.new_empty(rows[what]) for what in sorted_indices.BUFFERS]
    return [*buffers, grad.new_empty((rows["parts"], grad.shape[-1]), dtype=torch.float32)]


def _of_column_sum(x: torch.Tensor, dims: Sequence[int], card: Processors) -> list[torch.Tensor]:
    """The buffers of a sum over `dims` (`peftplan.tape.column_sums`)."""
    summed = {dim % x.dim() for dim in dims} if dims else set(range(x.dim()))
    fastest = min((dim for dim in range(x.dim()) if x.shape[dim] > 1), key=x.stride, default=None)
    if fastest is None or fastest in summed or not x.is_floating_point():
        return []
    columns = math.prod(x.shape[dim] for dim in range(x.dim()) if dim not in summed)
    rows = x.numel() // columns
    return [x.new_empty(column_sums.elements(what, rows=rows, columns=columns, card=card), dtype=torch.int32) for what in BUFFERS]


def kernel_temporaries(card: Processors) -> dict[Any, Callable[..., Sequence[torch.Tensor]]]:
    """`KERNEL_TEMPORARIES`, and those that depend on the card."""
    sums = dict.fromkeys((_ATEN.sum.dim_IntList, _ATEN.mean.dim), lambda x, dims, *_, **__: _of_column_sum(x, dims or (), card))
    norms = {_ATEN.linalg_vector_norm.default: lambda x, _ord=2, dims=None, *_, **__: _of_column_sum(x, dims or (), card)}
    return {**KERNEL_TEMPORARIES, **sums, **norms}


KERNEL_TEMPORARIES: dict[Any, Callable[..., Sequence[torch.Tensor]]] = {
    torch.ops.aten._softmax_backward_data.default: lambda grad, output, dim, input_dtype: [grad],
    torch.ops.aten._safe_softmax.default: lambda x, *_, **__: [x.new_empty(x.shape, dtype=torch.bool)],
    torch.ops.aten.cumsum.default: lambda x, *_, **__: [x.new_empty(x.shape if x.dtype == torch.bool else 0, dtype=torch.int64)],
    torch.ops.aten.embedding_dense_backward.default: lambda grad, indices, rows, *_, **__: _of_sorting(grad, indices, rows),
    torch.ops.aten.linalg_pinv.atol_rtol_tensor: lambda x, *_, **__: [x, x, x],
}
"""Operations whose CUDA kernel allocates further tensors while it runs → tensors of the same sizes."""


IN_PLACE: dict[tuple[str, Any], Any] = {
    ("IndexBackward0", _ATEN.index_put.default): _ATEN.index_put_.default,
    ("IndexSelectBackward0", _ATEN.index_add.default): _ATEN.index_add_.default,
    ("GatherBackward0", _ATEN.scatter_add.default): _ATEN.scatter_add_.default,
    **{(f"ClampBackward{number}", _ATEN.logical_and.default): _ATEN.logical_and_.default for number in (0, 1)},
    **{(f"{name}Backward0", _ATEN.scatter.src): _ATEN.scatter_.src for name in ("Max", "Min", "Topk", "Sort")},
}
"""(node of autograd, operation) → the operation that it does to the zeros it just made where no mode watches
(`areAnyTensorSubclassLike`, torch torch/csrc/autograd/FunctionsManual.cpp)."""
_COPYING = frozenset(op for _, op in IN_PLACE)


def in_place(func: Any) -> Any:
    """The operation that runs on CUDA where this one runs under a mode."""
    if func not in _COPYING:
        return func
    node = torch._C._current_autograd_node()
    return func if node is None else IN_PLACE.get((node.name(), func), func)


COMPOSITE: dict[Any, Callable[..., torch.Tensor]] = {_ATEN.isinf.default: lambda x: x.abs() == math.inf}
"""Operations made of others below where a mode watches (ATen TensorCompare.cpp: `isinf`)."""


def statistics(func: Any, out: Any) -> Any:
    """The outputs of LayerNorm with its mean and rstd as CUDA keeps them."""
    if func is not _ATEN.native_layer_norm.default:
        return out
    return out[0], *(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in out[1:])


@contextmanager
def cuda_autocast(dtype: torch.dtype | None, device: str) -> Iterator[None]:
    """Autocast for the tensors of the fake device, seen by code that asks whether CUDA's is on. None: no autocast."""
    if dtype is None:
        yield
        return
    with torch.autocast(device, dtype=dtype):
        yield


def _all_by_name(mask: torch.Tensor) -> torch.Tensor:
    """`fast_all`, which compares the sum of a mask with its size: runs as `all`, which the trace recognises."""
    mask.sum()
    return mask.all()


@contextmanager
def as_on_cuda(device: str) -> Iterator[None]:
    """Let torch answer for the fake device where it is asked about CUDA, and transformers take fake tensors for real ones."""
    enabled, low = torch.is_autocast_enabled, torch.get_autocast_dtype
    stand_ins = {
        "torch.is_autocast_enabled": lambda kind=None: enabled(kind or device),
        "torch.get_autocast_gpu_dtype": lambda: low(device),
        "transformers.utils.import_utils.is_fake_tensor": lambda tensor: False,
        "transformers.masking_utils.fast_all": _all_by_name,
        "transformers.modeling_utils.save_on_cpu": SavedOnHost,
    }
    with (
        replaced(stand_ins),
        patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True),  # it prints what is raised anyway
    ):
        yield

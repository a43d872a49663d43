"""Transformer Engine without its compiled part, for rehearsals: the package's Python over functions that allocate what its C++
source allocates, and compute nothing.

Needs the folder `transformer_engine` of the wheel transformer_engine_cu13 2.20.2 in `TRANSFORMER_ENGINE`. Where it holds the
compiled extension for torch too, all but attention is the package's own. Attention is cuDNN's, which the package takes on H100
before flash-attn 2 (pytorch/attention/dot_product_attention/utils.py, `get_attention_backend`).
Source: csrc/extensions/attention.cpp (`fused_attn_fwd`, `fused_attn_bwd`, `thd_read_half_tensor`, `thd_read_second_half_lse`);
csrc/extensions/normalization.cpp (`rmsnorm_fwd`, `rmsnorm_bwd`, without their workspaces: fp32 sums of the weight's gradient);
csrc/extensions/gemm.cpp (`gemm`, `te_general_grouped_gemm`);
common/fused_attn/fused_attn_f16_arbitrary_seqlen.cu (statistics of a row of documents, workspaces), utils.cu (`get_max_tokens`);
cudnn-frontend 1.23, node/scaled_dot_product_flash_attention.h (`get_fe_workspace_size_node`). Left out: workspaces that cuDNN's
own plan asks for beside.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from math import ceil, log2, prod
from pathlib import Path
from types import ModuleType
from typing import Any

TYPES = {
    "kByte": 0,
    "kInt32": 2,
    "kFloat32": 4,
    "kFloat16": 5,
    "kBFloat16": 6,
    "kFloat8E4M3": 7,
    "kFloat8E5M2": 8,
    "kFloat4E2M1": 10,
}
FORWARD = tuple(f"GEMM{number}_{part}" for number in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT"))
BACKWARD = tuple(f"GRAD_{part}{number}" for number in (1, 2, 3) for part in ("OUTPUT", "INPUT"))
ENUM = re.compile(r"enum (?:class )?(\w+)\s*(?::\s*\w+\s*)?\{(.*?)\}", re.DOTALL)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
FEWEST_TOKENS, DOUBLED_TOKENS = 2**10, 2**15


def install() -> None:
    """Make `transformer_engine` importable."""
    package = Path(os.environ["TRANSFORMER_ENGINE"])
    sys.path.insert(0, str(package.parent))
    exported = ModuleType("transformer_engine.pytorch.onnx_extensions")
    exported.__dict__["__getattr__"] = _missing
    sys.modules[exported.__name__] = exported
    if [*package.glob("wheel_lib/transformer_engine_torch*")]:
        _common(package).load_framework_extension("torch")
        sys.modules["transformer_engine_torch"].__dict__.update(FUNCTIONS)
        return
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no library is loaded
    compiled = ModuleType("transformer_engine_torch")
    compiled.__dict__.update(_enums(package / "common" / "include" / "transformer_engine"), **FUNCTIONS)
    compiled.__dict__["__getattr__"] = _missing
    sys.modules[compiled.__name__] = compiled
    _common(package).__dict__["load_framework_extension"] = lambda framework: None


def _common(package: Path) -> ModuleType:
    """`transformer_engine.common`, before the package itself."""
    spec = spec_from_file_location("transformer_engine.common", package / "common" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = common = module_from_spec(spec)
    spec.loader.exec_module(common)
    return common


def install_for_automodel() -> None:
    """The same, before nemo_automodel is imported; it counts documents where tensors hold values."""
    install()
    from nemo_automodel.components.distributed import thd_utils

    thd_utils.process_input_for_thd = partial(_on_host, thd_utils.process_input_for_thd)


def _on_host(process: Callable[..., dict[str, Any]], batch: dict[str, Any], *settings: Any) -> dict[str, Any]:
    """Where documents begin stays there."""
    device = batch["input_ids"].device
    result = process({name: value.cpu() if hasattr(value, "cpu") else value for name, value in batch.items()}, *settings)
    return {name: value.to(device) if hasattr(value, "to") and "len" not in name else value for name, value in result.items()}


def _enums(folder: Path) -> dict[str, type[IntEnum]]:
    """Those of the headers, and those that the bindings make."""
    enums = {name: IntEnum(name, dict(_members(body))) for file in folder.glob("*.h") for name, body in _bodies(file)}
    enums["DType"] = IntEnum("DType", TYPES)
    enums["FP8FwdTensors"] = IntEnum("FP8FwdTensors", FORWARD, start=0)
    enums["FP8BwdTensors"] = IntEnum("FP8BwdTensors", BACKWARD, start=0)
    return enums


def _bodies(file: Path) -> list[tuple[str, str]]:
    return ENUM.findall(COMMENT.sub("", file.read_text(encoding="utf-8")))


def _members(body: str) -> Iterator[tuple[str, int]]:
    value = 0
    for member in filter(None, map(str.strip, body.split(","))):
        name, _, number = (part.strip() for part in member.partition("="))
        value = int(number, 0) if number.lstrip("-").isalnum() and number.lstrip("-")[0].isdigit() else value
        yield name, value
        value += 1


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name.startswith("multi_tensor_adam"):
        return _in_place

    def function(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name}")

    return function


def _attention(*arguments: Any) -> list[Any]:
    """The result, the statistics of its softmax in fp32, a bias of the scores and the softmax's offsets where it has some."""
    import torch

    q, v, bias, offsets = arguments[16], arguments[18], *arguments[26:28]
    tokens_first = q.dim() == 3
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    rng_state = torch.empty(2, dtype=torch.int64, device=q.device)
    shape = (q.shape[0], q.shape[1], 1) if tokens_first else (q.shape[0], q.shape[2], q.shape[1], 1)
    statistics = torch.empty(shape, dtype=torch.float32, device=q.device)
    return [out, statistics, rng_state, *(each for each in (bias, offsets) if each is not None)]


def max_tokens(tokens: int) -> int:
    """Tokens of rows of documents for which the package makes a plan."""
    if tokens <= FEWEST_TOKENS:
        return FEWEST_TOKENS
    return 2 ** ceil(log2(tokens)) if tokens <= DOUBLED_TOKENS else ceil(tokens / DOUBLED_TOKENS) * DOUBLED_TOKENS


def _attention_backward(*arguments: Any) -> list[Any]:
    """The gradients, beside a workspace in fp32: dQ, a number for each query and head, and, of grouped heads, dK and dV of all
    query heads (of rows of documents alone). A bias gets one too, whether asked for or not."""
    import torch

    q, k, v = arguments[19:22]
    gradients = [torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v)]
    biases = arguments[25][2:3] if arguments[11].name == "NVTE_POST_SCALE_BIAS" else []
    of_bias = next((torch.empty_like(bias) for bias in biases), None)
    heads, grouped = q.shape[-2], q.shape[-2] != k.shape[-2]
    tokens, keys = (max_tokens(x.shape[0]) if x.dim() == 3 else x.shape[0] * x.shape[1] for x in (q, k))
    expanded = keys * (k.shape[-1] + v.shape[-1]) if grouped and q.dim() == 3 else 0
    workspace = torch.empty(4 * heads * (tokens * (q.shape[-1] + 1) + expanded), dtype=torch.uint8, device=q.device)
    del workspace
    has_offsets = len(arguments[25]) > 2 + len(biases)
    of_offsets = torch.empty((1, heads, 1, 1), dtype=torch.float32, device=q.device) if has_offsets else None
    return [*gradients, of_bias, of_offsets]


def _product(a: Any, turns_a: bool, b: Any, turns_b: bool, out: Any, *settings: Any, **_: Any) -> list[Any]:
    """The product of matrices whose columns cuBLAS takes for rows, and the gradient of a bias."""
    import torch

    bias, grad = settings[2], settings[6]
    dtype, of_a, of_b = getattr(a, "_dtype", None) or a.dtype, _logical(a), _logical(b)
    columns, rows = of_a[0] if turns_a else of_a[-1], (of_b[-1],) if turns_b else of_b[:-1]
    result = torch.empty((*rows, columns), dtype=dtype, device="cuda") if out is None else out
    return [
        result,
        torch.empty(of_b[-1], dtype=bias.dtype, device="cuda") if grad and bias is not None else None,
        None,
        None,
    ]


def _logical(tensor: Any) -> Any:
    """The shape for which a quantized tensor stands, however its numbers lie, or that of a tensor."""
    return tensor.size()


def _quantized(tensor: Any, quantizer: Any, out: Any = None, *_: Any) -> Any:
    """Numbers of 8 bits and their scales, by row and by column as the quantizer says (csrc/quantizer.cpp, `create_tensor` of
    `MXFP8Quantizer`, `Float8CurrentScalingQuantizer` and `Float8BlockQuantizer`)."""
    return out if out is not None else _stored(quantizer, tensor, quantizer.alloc_tensors(tensor.shape, device=tensor.device))


BY_TENSOR = {"_data": "data", "_transpose": "data_transpose", "_scale_inv": "fp8_scale_inv"}
"""Attributes of a tensor with one scale → arguments of its class, of which others are named like the attributes."""


def _stored(quantizer: Any, tensor: Any, parts: dict[str, Any]) -> Any:
    known = quantizer.storage_metadata(tensor.dtype)
    settings = dict(known["nontensor_kwargs"])
    if not quantizer.internal:
        settings |= {"shape": tensor.shape, "dtype": settings.pop("fake_dtype"), "device": tensor.device}
    sides = [f"_{side}wise_{part}" for side in ("row", "column") for part in ("data", "scale_inv")]
    names = BY_TENSOR if "_scale_inv" in parts else {name: name[1:] for name in sides}
    return known["cls"](**{argument: parts.get(name) for name, argument in names.items()}, **settings)


def _split(tensor: Any, rows: list[int], quantizers: list[Any], **_: Any) -> list[Any]:
    """The same of each expert's rows, of which all numbers by row, and all by column, share a buffer with their scales, but those
    with one scale each (csrc/extensions/cast.cpp, `split_quantize`, `bulk_allocate_mxfp8_tensors`,
    `bulk_allocate_fp8_blockwise_tensors`; allocate.cpp)."""
    import torch

    pieces = tensor.split(rows)
    shapes = [quantizer.inner_tensor_specs((count, tensor.shape[-1])) for count, quantizer in zip(rows, quantizers, strict=True)]
    if "_scale_inv" in shapes[0]:
        return [_quantized(piece, quantizer) for piece, quantizer in zip(pieces, quantizers, strict=True)]
    parts: list[dict[str, Any]] = [{} for _ in rows]
    for side in ("row", "column"):
        kinds = ((f"_{side}wise_data", 256), (f"_{side}wise_scale_inv", 16))
        wanted = [(of, name, align, *each[name]) for name, align in kinds for of, each in enumerate(shapes) if name in each]
        end, places = 0, []
        for *_known, align, shape, dtype in wanted:
            places.append(ceil(end / align) * align)
            end = places[-1] + prod(shape) * dtype.itemsize
        buffer = torch.empty(end + 256, dtype=torch.uint8, device=tensor.device) if wanted else None
        for place, (of, name, _align, shape, dtype) in zip(places, wanted, strict=True):
            assert buffer is not None
            parts[of][name] = buffer[place : place + prod(shape) * dtype.itemsize].view(dtype).view(shape)
    return [_stored(*triple) for triple in zip(quantizers, pieces, parts, strict=True)]


def _with_bias(gradient: Any, quantizer: Any) -> tuple[Any, Any]:
    """The gradient of a bias, and a gradient in 8 bits (csrc/extensions/bias.cpp, `bgrad_quantize`)."""
    return gradient.new_empty(gradient.shape[-1]), _quantized(gradient, quantizer)


def _normed(x: Any, weight: Any, *_: Any) -> list[Any]:
    """The result, no mean, and the reciprocal deviation of each row in fp32."""
    import torch

    return [torch.empty_like(x), None, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)]


def _normed_backward(gradient: Any, x: Any, deviations: Any, weight: Any, *_: Any) -> list[Any]:
    """The gradients of x and of the weight."""
    import torch

    return [torch.empty_like(x), torch.empty_like(weight)]


def _products(*arguments: Any) -> Any:
    """Those of experts, whose results have a place: their biases."""
    assert arguments[4] is not None
    return arguments[7]


def _half(tensor: Any, cu_seqlens: Any, half: int) -> Any:
    """Half of the tokens: (tokens, heads, size), or (2, tokens, heads, size)."""
    shape = list(tensor.shape)
    shape[tensor.dim() - 3] //= 2
    return tensor.new_empty(shape)


def _statistics_half(lse: Any, cu_seqlens: Any, packed: bool, queries: int) -> Any:
    """The fp32 numbers of half of the queries: (heads, queries), or (rows, heads, queries)."""
    return lse.new_empty((*lse.shape[:-1], queries))


def _indices(cu_seqlens: Any, tokens: int, ranks: int, rank: int) -> Any:
    return cu_seqlens.new_empty(tokens // ranks, device="cuda")


def _in_place(*_: Any, **__: Any) -> None:
    """Kernels that write over what they get."""


def _backend(config: Any) -> tuple[Any, str]:
    return sys.modules["transformer_engine_torch"].NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


FUNCTIONS: dict[str, Any] = {
    "get_cudnn_version": lambda: 92000,
    "get_cublasLt_version": lambda: 130101,
    "get_num_cublas_streams": lambda: 4,
    "get_fused_attn_backend": _backend,
    "fused_attn_fwd": _attention,
    "fused_attn_bwd": _attention_backward,
    "generic_gemm": _product,
    "te_general_grouped_gemm": _products,
    "quantize": _quantized,
    "split_quantize": _split,
    "bgrad_quantize": _with_bias,
    "rmsnorm_fwd": _normed,
    "rmsnorm_bwd": _normed_backward,
    "thd_read_half_tensor": _half,
    "thd_read_second_half_lse": _statistics_half,
    "thd_get_partitioned_indices": _indices,
    **dict.fromkeys(
        (
            *("thd_second_half_lse_correction", "thd_out_correction", "thd_grad_correction"),
            *("fused_multi_row_padding", "fused_multi_row_unpadding"),
        ),
        _in_place,
    ),
}

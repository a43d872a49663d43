"""What torch's dispatcher does for tensors on CUDA, where it decides otherwise for those on the CPU, as a trace's are.

Autocast is a key of the dispatcher. A composite operation (`square`) has no rule there; what it is made of (`pow`) passes the key
again, so a list of Python functions cannot stand for it. While a trace runs, the rules of `AutocastCPU` are CUDA's:

| policy | what CUDA does | here |
| --- | --- | --- |
| lower precision | casts to the dtype of autocast, keeps the cast of a trainable leaf | the CPU's own rule, or `_lowered` |
| fp32 | casts 16-bit inputs to fp32 | `_widened` |
| fp32 result | asks for an fp32 result unless the call names a dtype | `_with_dtype` |
| promote | casts the inputs to the widest of them | `_promoted` |
| none (`cat`, `cross_entropy_loss`, `quantile` …) | nothing | the CPU's rule is skipped |

`softmax` and `log_softmax` of fp16 with an fp32 result are one kernel on CUDA, a copy and a kernel on the CPU (SoftMax.cpp).
`dropout` is one kernel, which keeps a boolean mask; on the CPU it multiplies by a mask of the input's dtype (Dropout.cpp).

Source: torch, aten/src/ATen/autocast_mode.h (`AT_FORALL_*`, `cached_cast`, `set_opt_dtype`, `promote_type`).
Left out: the kept cast of a trainable leaf that goes into an operation for which the CPU has no rule (`einsum`, `mv` …).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from peftplan.hardware.processors import A100, Processors
from peftplan.trace.cuda.attention import Capability, sdpa

Rule = Callable[..., Any]
COMPOSITE = "CompositeImplicitAutograd"
"""The dispatch key of an operation that is made of others, below autocast."""
FLOATING = (torch.float16, torch.bfloat16, torch.float32)
"""What autocast looks at."""

CASTS = {
    "lower precision": """
        _convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
        conv_transpose3d.input convolution cudnn_convolution cudnn_convolution_transpose prelu addmm addmv addr matmul einsum mm
        mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell
        lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention""",
    "fp32": """
        acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
        pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim
        cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss
        smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
        multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
        _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d
        upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
        _upsample_bicubic2d_aa""",
    "fp32 result": """
        prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
        linalg_matrix_norm.str_ord sum sum.dim_IntList norm.Scalar norm.ScalarOpt_dim""",
    "promote": "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add",
    "refused": "binary_cross_entropy",
}
WITH_DTYPE = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
"""Operations whose form with a dtype is another overload."""


@contextmanager
def dispatched_as_on_cuda() -> Iterator[None]:
    """Let autocast of CPU tensors do what CUDA's does, and softmax of fp16 and dropout be one kernel each."""
    with _registered({name: (rule, "AutocastCPU") for name, rule in _rules()}), _registered(OTHER_KERNELS):
        yield


@contextmanager
def attention_on(capability: Capability, card: Processors = A100) -> Iterator[None]:
    """Let `scaled_dot_product_attention` be the kernels of a card, below autocast, which keeps the cast of a leaf."""
    with _registered({"scaled_dot_product_attention": (partial(sdpa, capability=capability, card=card), COMPOSITE)}):
        yield


@contextmanager
def _registered(kernels: Mapping[str, tuple[Rule, str]]) -> Iterator[None]:
    """Let operations be other kernels: name → kernel, dispatch key."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced
            for name, (kernel, key) in kernels.items():
                library.impl(name, kernel, key)
        yield
    finally:
        library._destroy()


@cache
def _rules() -> tuple[tuple[str, Rule], ...]:
    """What stands in for the CPU's rules, of the operations for which this torch has one of CUDA's."""
    return tuple(_each_rule())


def _each_rule() -> Iterator[tuple[str, Rule]]:
    of_cuda, of_cpu = _with_rule("CUDA"), _with_rule("CPU")
    for policy, names in CASTS.items():
        for name in names.split():
            by_cpu = policy == "lower precision" and name in of_cpu
            if name in of_cuda and not by_cpu:
                yield name, POLICIES[policy](name)
    for name in of_cpu - of_cuda:
        yield name, torch.library.fallthrough_kernel


def _with_rule(device: str) -> set[str]:
    """The operations for which this torch registers a rule of a device's autocast."""
    known, key = torch._C._dispatch_has_kernel_for_dispatch_key, f"Autocast{device}"
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("aten::") for name in names if name.startswith("aten::") and known(name, key)}


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`cached_cast`: of floating tensors but fp64; of several the last one first, as GCC orders a call's arguments."""
    if isinstance(value, list | tuple):
        return type(value)(reversed([_cast(each, dtype) for each in reversed(value)]))
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOATING:
        return value
    return value.to(dtype)


def _widened(name: str) -> Rule:
    return _casting(_operation(name), lambda args: torch.float32)


def _lowered(name: str) -> Rule:
    return _casting(_operation(name), lambda args: torch.get_autocast_dtype("cpu"))


def _promoted(name: str) -> Rule:
    return _casting(_operation(name), _widest)


def _widest(args: Any) -> torch.dtype:
    """`promote_type`: fp32 if one of the inputs is, else autocast's dtype. Raises RuntimeError for the other 16-bit dtype."""
    low = widest = torch.get_autocast_dtype("cpu")
    for each in (part for arg in args for part in (arg if isinstance(arg, list | tuple) else (arg,))):
        if isinstance(each, torch.Tensor) and each.dtype in FLOATING:
            if torch.float32 in (widest, each.dtype):
                widest = torch.float32
            elif each.dtype != low:
                raise RuntimeError("Unexpected floating ScalarType in at::autocast::prioritize")
    return widest


def _casting(operation: Any, to: Callable[[Any], torch.dtype]) -> Rule:
    def rule(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            dtype = to(args)
            kwargs = {key: _cast(value, dtype) for key, value in kwargs.items()}
            return operation(*_cast(args, dtype), **kwargs)

    return rule


def _with_dtype(name: str) -> Rule:
    plain, typed = _operation(name), _operation(WITH_DTYPE.get(name, name))
    arguments = plain._schema.arguments
    names = [argument.name for argument in arguments]

    def rule(*args: Any, **kwargs: Any) -> Any:
        by_name = dict(zip(names, args, strict=False)) | kwargs
        with _without_autocast():
            if by_name.get("dtype") is not None or args[0].dtype not in FLOATING:
                return plain(*args, **kwargs)
            if typed is not plain:  # it has no defaults
                args = (*args, *(argument.default_value for argument in arguments[len(args) :]))
            return typed(*args[: names.index("dtype") if "dtype" in names else None], **{**kwargs, "dtype": torch.float32})

    return rule


def _softmax(kernel: Callable[..., torch.Tensor], x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`softmax(Tensor input, int dim, ScalarType? dtype)` as `is_cuda` lets it run."""
    if x.dtype == torch.float16 and dtype == torch.float32:
        return kernel(x, dim, True)
    return kernel(x if dtype is None else x.to(dtype), dim, False)


def _dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """`dropout(Tensor input, float p, bool train)`, for training `native_dropout` (Dropout.cpp: `is_fused_kernel_acceptable`)."""
    if p == 0 or not train:
        return x
    kept: torch.Tensor = torch.ops.aten.native_dropout(x, p, True)[0] if p < 1 else x * torch.zeros((), dtype=x.dtype)
    return kept


OTHER_KERNELS: dict[str, tuple[Rule, str]] = {
    "dropout": (_dropout, COMPOSITE),
    "softmax.int": (partial(_softmax, torch.ops.aten._softmax.default), COMPOSITE),
    "log_softmax.int": (partial(_softmax, torch.ops.aten._log_softmax.default), COMPOSITE),
}


def _refused(name: str) -> Rule:
    def rule(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{name} is unsafe to autocast; torch raises on CUDA (binary_cross_entropy_with_logits is safe)")

    return rule


POLICIES: dict[str, Callable[[str], Rule]] = {
    "lower precision": _lowered,
    "fp32": _widened,
    "fp32 result": _with_dtype,
    "promote": _promoted,
    "refused": _refused,
}

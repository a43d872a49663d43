"""Stand-ins for bitsandbytes' quantized linear layers: no values, but the real ones' tensors, temporaries and saved inputs.

They subclass the real classes, which peft tests for, and run on fake tensors, which `Params4bit` and `Int8Params` cannot hold.
Source: bitsandbytes: `autograd/_functions.py` (`MatMul4Bit`, `MatMul8bitLt`), `backends/cuda/ops.py` (`gemm_4bit`,
`int8_*`), `functional.py` (`dequantize_4bit`), `nn/modules.py`. Left out: int8's outlier columns, which depend on the data.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from peftplan.dtypes import parse_dtype
from peftplan.libraries.quantized import QUANT_TENSORS, TORCH_DTYPES, Card, prepare
from peftplan.storage import QuantConfig

INT8_THRESHOLD = 6.0
"""`llm_int8_threshold`'s default: above 0, the quantization of an input first compares every element with it."""


class FourBitLinear(bnb.nn.Linear4bit):  # type: ignore[misc,name-defined]
    """`Linear4bit` with an ordinary uint8 parameter that carries the attributes which peft reads."""

    def __init__(self, source: Any, quant: QuantConfig, *, dtype: str) -> None:
        prepare(self, source, quant, dtype=dtype)
        self.compute_dtype = TORCH_DTYPES[quant.compute_dtype or "fp32"]
        self.compute_type_is_set = True
        self.quant_storage = TORCH_DTYPES[quant.quant_storage]
        self.stored_dtype, self.stored_blocksize = TORCH_DTYPES[dtype], quant.blocksize
        self.quant_state = None
        self.weight.compress_statistics = quant.double_quant
        self.weight.quant_type = quant.name
        self.weight.quant_storage = self.quant_storage
        self.weight.quant_state = SimpleNamespace(shape=(self.out_features, self.in_features), dtype=self.stored_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `Linear4bit.forward`: the input in the compute dtype, the output back in the input's."""
        dtype = x.dtype
        x = x.to(self.compute_dtype)
        if self.bias is not None:
            self.bias.data = self.bias.data.to(x.dtype)
        out: torch.Tensor = _Matmul4Bit.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return out.to(dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)  # the quant state is no `QuantState`

    def dequantized(self) -> torch.Tensor:
        """`dequantize_4bit` of the weight."""
        return _dequantized(self, self.weight)

    def fuses(self, x: torch.Tensor) -> bool:
        """Whether the product with x needs no dequantized weight."""
        if (chip := Card.chip) is None:
            return False
        n, k = self.out_features, self.in_features
        most = chip.most_tokens(n=n, k=k, dtype=parse_dtype(x.dtype), blocksize=self.stored_blocksize)
        return bool(0 < x.numel() // k <= most)

    def absmax(self, like: torch.Tensor, *, keep_both: bool) -> list[torch.Tensor]:
        """The fp32 absmax of a double quantized weight: one copy, or two where `absmax_dq + offset` makes another."""
        nested = self.__dict__[QUANT_TENSORS]
        if "offset" not in nested:
            return [nested["absmax"]]
        first = like.new_empty(nested["absmax"].shape, dtype=torch.float32)
        return [first, first + nested["offset"]] if keep_both else [first.add_(nested["offset"])]


class _Matmul4Bit(torch.autograd.Function):
    """`MatMul4Bit`: dequantizes the whole weight in forward, unless the product is fused, and in backward; saves neither it nor
    the input, which older releases kept. It keeps the packed weight as `ctx.tensors`, which no checkpoint sees: under ZeRO-3 as
    it was gathered.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, module: FourBitLinear) -> torch.Tensor:
        ctx.module = module
        ctx.dtype_bias = None if bias is None else bias.dtype
        if any(ctx.needs_input_grad[:2]):
            ctx.tensors = (a if Card.keeps_inputs else None, b.view(-1, 1))
        if module.fuses(a):
            return a.new_empty(*a.shape[:-1], module.out_features)
        absmax = module.absmax(a, keep_both=True)
        weight = a.new_empty(module.out_features, module.in_features)
        out = nn.functional.linear(a, weight, bias)
        del absmax
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        module = ctx.module
        grad_a = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=ctx.dtype_bias)
        if ctx.needs_input_grad[0]:
            grad_a = torch.matmul(grad, _dequantized(module, grad).to(grad.dtype))
        return grad_a, None, grad_bias, None


def _dequantized(module: FourBitLinear, like: torch.Tensor) -> torch.Tensor:
    """`dequantize_4bit`: in the dtype that the weight was loaded in."""
    absmax = module.absmax(like, keep_both=False)
    out = like.new_empty(module.out_features, module.in_features, dtype=module.stored_dtype)
    del absmax
    return out


class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc,name-defined]
    """`Linear8bitLt` with an ordinary int8 parameter, after the first forward has moved CB and SCB into its state."""

    def __init__(self, source: Any, quant: QuantConfig) -> None:
        prepare(self, source, quant, dtype="fp16")
        self.state = SimpleNamespace(has_fp16_weights=False, threshold=INT8_THRESHOLD)
        self.index = None

    def dequantized(self) -> torch.Tensor:
        """`int8_vectorwise_dequant`: in fp32."""
        out: torch.Tensor = self.weight * self.__dict__[QUANT_TENSORS]["SCB"].view(-1, 1) * 7.874015718698502e-3
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `Linear8bitLt.forward`."""
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        out: torch.Tensor = _Matmul8bit.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return out


class _Matmul8bit(torch.autograd.Function):
    """`MatMul8bitLt`: an int8 copy of the input, int32 and fp16 outputs.

    It keeps its input on the node instead of saving it, where non-reentrant checkpointing does not reach it.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, module: Int8Linear) -> torch.Tensor:
        shape = a.shape
        a = a.reshape(-1, shape[-1])
        ca, sca = _vectorwise_quant(a.to(torch.float16))
        product = a.new_empty(a.shape[0], module.out_features, dtype=torch.int32)
        out = torch.empty_like(product, dtype=torch.float16)
        if bias is not None and bias.dtype != torch.float16:
            out.add_(bias)
        out = out.to(a.dtype)
        ctx.module, ctx.shape, ctx.dtype_a, ctx.dtype_bias = module, shape, a.dtype, None if bias is None else bias.dtype
        ctx.kept = (a.new_empty(0), a) if any(ctx.needs_input_grad[:2]) else None
        del ca, sca, product
        return out.reshape(*shape[:-1], module.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        grad_a = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=ctx.dtype_bias)
        if grad.dim() == len(("batch", "sequence", "features")):
            grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        if ctx.needs_input_grad[0]:
            scale = ctx.module.__dict__[QUANT_TENSORS]["SCB"].unsqueeze(1).mul(1.0)
            weight = ctx.module.weight.to(ctx.dtype_a, copy=True).mul_(scale)
            grad_a = torch.matmul(grad.to(ctx.dtype_a), weight).view(ctx.shape)
        return grad_a, None, grad_bias, None


def _vectorwise_quant(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`int8_vectorwise_quant` on CUDA: row scales, the int8 copy, and a mask of outliers while it runs."""
    scales = a.new_empty(a.shape[0], dtype=torch.float32)
    out = torch.empty_like(a, dtype=torch.int8)
    outliers = a.abs() >= INT8_THRESHOLD
    del outliers
    return out, scales

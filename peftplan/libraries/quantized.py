"""The parts that all stand-ins for quantized layers share. The layers themselves are in `bnb_layers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from peftplan.ledger import Allocation
from peftplan.storage import QuantConfig, stored
from peftplan.storage.fused_products import Chip

QUANT_TENSORS = "quant_tensors"
"""Attribute of a stand-in: its tensors besides the weight (absmax, code tables, scales), by their name in `storage`."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


class Card:
    """The card that stand-ins run on: `chip` decides which 4-bit products are fused, None fuses none. `keeps_inputs`: whether
    products with 4-bit weights keep their inputs (`versions.INPUTS_DROPPED`)."""

    chip: ClassVar[Chip | None] = None
    keeps_inputs: ClassVar[bool] = False


@contextmanager
def fused_on(chip: Chip | None, *, keeps_inputs: bool = False) -> Iterator[None]:
    """Let 4-bit layers multiply as on this card. (Not a context variable: autograd's threads would not see it.)"""
    before = Card.chip, Card.keeps_inputs
    Card.chip, Card.keeps_inputs = chip, keeps_inputs
    try:
        yield
    finally:
        Card.chip, Card.keeps_inputs = before


def prepare(stand_in: Any, source: Any, quant: QuantConfig, *, dtype: str) -> None:
    """What stand-ins share: sizes, the packed weight as an ordinary parameter, the bias, and the tensors beside the weight."""
    nn.Module.__init__(stand_in)
    stand_in.in_features, stand_in.out_features = _features(source)
    first, *beside = stored(quant, shape=(stand_in.out_features, stand_in.in_features), dtype=dtype)
    stand_in.weight = nn.Parameter(_meta(first), requires_grad=False)
    stand_in.bias = source.bias
    stand_in.training = source.training
    stand_in.__dict__[QUANT_TENSORS] = {allocation.name: _meta(allocation) for allocation in beside}


def module_weight(module: Any) -> torch.Tensor:
    """`dequantize_module_weight` of peft, which knows stand-ins too."""
    from peft.utils.integrations import dequantize_module_weight

    return module.dequantized() if QUANT_TENSORS in module.__dict__ else dequantize_module_weight(module)


def _features(source: Any) -> tuple[int, int]:
    """(in, out); transformers' Conv1D stores its weight that way round."""
    if isinstance(source, nn.Linear):
        return source.in_features, source.out_features
    return source.weight.shape[0], source.weight.shape[1]


def _meta(allocation: Allocation) -> torch.Tensor:
    return torch.empty(allocation.dims, dtype=TORCH_DTYPES[allocation.dtype], device="meta")

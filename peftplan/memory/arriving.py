"""What a quantized base is loaded as: the block before its weights, and the tensors of each that a checkpoint names."""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.dtypes import ITEMSIZE
from peftplan.parameters import Parameter
from peftplan.storage import QuantConfig

WARMUP_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0, "fp8": 1.0}
"""Bytes per element that the warm-up counts for a quantized weight (transformers, `quantized_element_size`)."""
MADE_LATER = ("wf_unsqueeze_zero",)
"""What gptqmodel makes of each layer once all are loaded (`post_init`)."""


def warm_up(base: Iterable[Parameter], quant: QuantConfig | None, *, dtype: str) -> int:
    """Bytes of the block that is reserved first: all weights as they will be stored, in whole elements of fp16."""
    packed = 0.0 if quant is None else WARMUP_BYTES.get(quant.name)
    total = sum(p.copies * (_warmed(p, packed) if p.quantized else p.numel * ITEMSIZE[dtype]) for p in base)
    return int(total // ITEMSIZE["fp16"]) * ITEMSIZE["fp16"]


def _warmed(p: Parameter, packed: float | None) -> float:
    """Bytes that the warm-up counts for a quantized weight: of gptqmodel's formats those of its tensors in the checkpoint."""
    return sum(a.nbytes for a in p.allocations if a.name not in MADE_LATER) if packed is None else p.numel * packed


def sizes_on_device(p: Parameter, *, by_name: bool) -> tuple[int, ...]:
    """Bytes of the tensors that hold a parameter, as they arrive: `by_name`, where a checkpoint names each."""
    on_device = [a for a in p.allocations if a.place == "device"]
    if by_name and p.quantized:
        on_device = sorted((a for a in on_device if a.name not in MADE_LATER), key=lambda a: a.name)
    return tuple(a.nbytes for a in on_device)

"""Merging LoRA into a weight that bitsandbytes stores: dequantize, add, move to the host, quantize again on the GPU.

n elements of W (o, i). Source: peft, `tuners/lora/bnb.py` (`Linear4bit.merge`, `Linear8bitLt.merge`) and
`lora/variants.py` (`DoraLinearVariant.merge_safe`); bitsandbytes, `nn/modules.py` (`Params4bit._quantize`,
`Int8Params._quantize`), `functional.py`. Every intermediate of a module lives until its new weight is made, and the host holds
the sum meanwhile. Left out: what bitsandbytes' kernels use inside.
"""

from __future__ import annotations

from math import prod

from peftplan.deployment.deltas import Parts, dora_tail, lora_delta
from peftplan.deployment.scratch import Array, Scratch
from peftplan.storage import QuantConfig, stored
from peftplan.storage.config import FOUR_BIT
from peftplan.units import ceil_div

SUPPORTED = (*FOUR_BIT, "int8")
"""Formats with a merge of their own in peft's LoRA layers that is modelled here."""


def merge(s: Scratch, w: Array, parts: Parts, quant: QuantConfig) -> int:
    """The merge of one module, W in the dtype that the model was loaded in; returns the bytes of the sum on the host."""
    output = _dequantized(s, w, quant)
    if "lora_magnitude_vector" in parts:
        total, temporaries = _dora(s, w, parts, quant, output)
    else:
        delta = lora_delta(s, parts)
        total, temporaries = s.combine(output, delta), [delta]
    _quantized(s, total, quant)
    s.drop(output, total, *temporaries)
    return s.bytes(total)


def _dora(s: Scratch, w: Array, parts: Parts, quant: QuantConfig, output: Array) -> tuple[Array, list[Array]]:
    """The weight is dequantized for the norm (and copied), and once more for the sum."""
    magnitude = parts["lora_magnitude_vector"]
    delta = lora_delta(s, parts)
    first = _dequantized(s, w, quant)
    copy = s.cast(first, first.dtype)
    s.drop(first)
    again = _dequantized(s, w, quant)
    dora_tail(s, output, delta, magnitude)
    return s.new(output.dtype, *w.dims), [delta, copy, again]


def _dequantized(s: Scratch, w: Array, quant: QuantConfig) -> Array:
    """4 bits: in the dtype that was quantized, with the absmax in fp32 for a moment if it is quantized itself. int8: in fp32."""
    if quant.name not in FOUR_BIT:
        return s.new("fp32", *w.dims)
    absmax = s.new("fp32", _blocks(w, quant)) if quant.double_quant else None
    output = s.new(w.dtype, *w.dims)
    if absmax is not None:
        s.drop(absmax)
    return output


def _quantized(s: Scratch, total: Array, quant: QuantConfig) -> None:
    """The sum comes back from the host; the new weight is made beside the old one."""
    weight = s.new("fp16" if quant.name == "int8" else total.dtype, *total.dims)
    absmax = [s.new("fp32", _blocks(total, quant)) for _ in range(2 if quant.double_quant else 0)]
    o, i = total.dims
    new = [s.new(a.dtype, *a.dims) for a in stored(quant, shape=(o, i), dtype=total.dtype)]
    s.drop(weight, *absmax, *new)


def _blocks(w: Array, quant: QuantConfig) -> int:
    return ceil_div(prod(w.dims), quant.blocksize)

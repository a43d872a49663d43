"""Weights packed by gptqmodel (gptq, awq) and by hqq (version 0.2.8): integers, scales, zeros.

o output features, i input features, b bits, g group size.
"""

from __future__ import annotations

from peftplan.errors import RefusedError
from peftplan.ledger import Allocation
from peftplan.storage.config import QuantConfig
from peftplan.units import ceil_div

WORD = 32
"""Bits of the int32 words that gptq and awq pack into (`pack_dtype`)."""

GPTQ_MULTIPLE = 32
"""Both widths of a gptq layer (`SUPPORTS_*_FEATURES_DIVISIBLE_BY` of `TritonV2Linear`; 3-bit zeros unpack in 32s)."""

AWQ_IN_MULTIPLE, AWQ_OUT_MULTIPLE = 32, 8
"""Widths of an awq layer (`SUPPORTS_*_FEATURES_DIVISIBLE_BY` of `AwqGEMMTritonLinear`)."""

GPTQ_SHIFTS = {2: (1, 1, 16), 3: (1, 1, 3, 12), 4: (1, 1, 8), 8: (1, 1, 4)}
"""Shape of the int32 table of shifts that unpacks a gptq layer: one table behind both `wf_unsqueeze_*` buffers."""

HQQ_3BIT_PER_WORD = 10
"""3-bit values in one int32 word of hqq (`BitPack.pack_3bit_32`); the rows are padded to a multiple of it."""


def gptq(quant: QuantConfig, *, shape: tuple[int, int], dtype: str) -> tuple[Allocation, ...]:
    """The buffers of a trainable gptq layer; group size -1 is one group of the whole row.

        qweight  int32 (⌈i·b/32⌉, o)         scales  fp16 (⌈i/g⌉, o)       wf_unsqueeze_zero  int32, 32/b shifts
        qzeros   int32 (⌈i/g⌉, ⌈o·b/32⌉)     g_idx   int32 (i,)

    Source: `GPTQQuantLinear._register_gptq_buffers` and `PackableQuantLinear`,
    gptqmodel/nn_modules/qlinear/__init__.py, as `TritonV2Linear` (2, 4, 8 bits) and `TorchLinear` (3 bits) keep them:
    the kernels of `GPTQConfig(backend="auto_trainable")`. Kernels that cannot train (Marlin, ExLlama: what `auto`
    picks) repack and are not modelled. Left out: the bias (fp16, dense).
    """
    o, i = shape
    _check_multiple("gptq", shape, out=GPTQ_MULTIPLE, into=GPTQ_MULTIPLE)
    b, groups = quant.bits, ceil_div(i, _group_size(quant, i))
    return (
        Allocation("qweight", "int32", (ceil_div(i * b, WORD), o)),
        Allocation("qzeros", "int32", (groups, ceil_div(o * b, WORD))),
        Allocation("scales", "fp16", (groups, o)),
        Allocation("g_idx", "int32", (i,)),
        Allocation("wf_unsqueeze_zero", "int32", GPTQ_SHIFTS[b]),
    )


def awq(quant: QuantConfig, *, shape: tuple[int, int], dtype: str) -> tuple[Allocation, ...]:
    """The buffers of a trainable awq layer, packed along the outputs and with no g_idx.

        qweight  int32 (i, ⌈o·b/32⌉)      qzeros  int32 (i/g, ⌈o·b/32⌉)      scales  fp16 (i/g, o)

    Source: `AWQuantLinear`, gptqmodel/nn_modules/qlinear/__init__.py, as `AwqGEMMTritonLinear` keeps it: the kernel
    of `AwqConfig(backend="auto_trainable")` with the GEMM format; the GEMV formats and kernels that cannot train are
    not modelled. transformers loads awq models in fp16 where bf16 is asked for (`AwqQuantizer.update_dtype`). Left
    out: the bias (fp16, dense), and one fp32 vector of intermediate_size per layer of gpt_neox, gptj, falcon, bloom,
    mpt, starcoder2 and gpt_bigcode.
    """
    o, i = shape
    _check_multiple("awq", shape, out=AWQ_OUT_MULTIPLE, into=AWQ_IN_MULTIPLE)
    g = _group_size(quant, i)
    if i % g:
        raise RefusedError(f"quant: awq cannot store {i} input features, which are not a multiple of the group size {g}")
    words = ceil_div(o * quant.bits, WORD)
    return (
        Allocation("qweight", "int32", (i, words)),
        Allocation("qzeros", "int32", (i // g, words)),
        Allocation("scales", "fp16", (i // g, o)),
    )


def hqq(quant: QuantConfig, *, shape: tuple[int, int], dtype: str) -> tuple[Allocation, ...]:
    """The tensors of an `HQQLinear` with axis 1: the weight as n/g rows of g, packed along the rows.

        W_q    uint8 (⌊rows·b/8⌋, g), or for 3 bits int32 (⌈rows/10⌉, g)      scale, zero  compute dtype (rows, 1)

    Source: `Quantizer.quantize` in hqq/core/quantize.py and hqq/core/bitpack.py. Quantized by hqq itself:
    transformers no longer does (its `HqqHfQuantizer` has no `get_quantize_ops`). Left out: axis 0, quantized
    scales (deprecated), the bias (dense).
    """
    o, i = shape
    g = quant.group_size
    if (o * i) % g:
        raise RefusedError(f"quant: hqq cannot store a {o} × {i} weight: {o * i} is not a multiple of the group size {g}")
    rows = o * i // g
    if quant.bits == 3:
        weight = Allocation("W_q", "int32", (ceil_div(rows, HQQ_3BIT_PER_WORD), g))
    else:
        per_byte = 8 // quant.bits
        if rows % per_byte:
            raise RefusedError(f"quant: hqq cannot store a {o} × {i} weight: its {rows} groups do not pack {per_byte} to a byte")
        weight = Allocation("W_q", "uint8", (rows // per_byte, g))
    meta = quant.compute_dtype or dtype
    return weight, Allocation("scale", meta, (rows, 1)), Allocation("zero", meta, (rows, 1))


def _group_size(quant: QuantConfig, i: int) -> int:
    return i if quant.group_size == -1 else quant.group_size


def _check_multiple(name: str, shape: tuple[int, int], *, out: int, into: int) -> None:
    o, i = shape
    if o % out or i % into:
        raise RefusedError(
            f"quant: {name} cannot store a {o} × {i} weight: it takes outputs in multiples of {out}, inputs of {into}"
        )

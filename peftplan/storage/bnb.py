"""Weights that bitsandbytes stores: nf4 and fp4 with and without double quantization, LLM.int8. Version 0.50.2.

n elements, o rows (output features), i columns (input features).
"""

from __future__ import annotations

from peftplan.dtypes import ITEMSIZE
from peftplan.errors import RefusedError
from peftplan.ledger import Allocation
from peftplan.storage.config import QuantConfig
from peftplan.units import ceil_div

CODE_4BIT = 16
"""Entries of the nf4 and fp4 tables, fp32, one table per weight (`get_4bit_type`)."""

CODE_DYNAMIC = 256
"""Entries of the dynamic 8-bit map that codes the absmax, fp32, one copy per weight (`code.to(device, copy=True)`)."""

NESTED_BLOCKSIZE = 256
"""absmax values per second-level absmax (`quantize_blockwise(absmax - offset, blocksize=256)`)."""


def four_bit(quant: QuantConfig, *, shape: tuple[int, int], dtype: str) -> tuple[Allocation, ...]:
    """The tensors of a `Params4bit` and its `QuantState`: two elements per byte, one fp32 absmax per block.

        weight        (⌈n/2⌉ bytes as quant_storage, 1)
        absmax        fp32 (⌈n/blocksize⌉,)                     or, double quantized, uint8 of the same length and
        code          fp32 (16,)                                nested_absmax fp32 (⌈blocks/256⌉,),
                                                                nested_code fp32 (256,), offset fp32 ()

    Source: `quantize_4bit`, bitsandbytes/functional.py, and its CUDA kernel, backends/cuda/ops.py. `dtype` and the
    compute dtype play no part. The names `code` and `nested_code` are `quant_map` and `nested_quant_map` in a state
    dict. Left out: the map that all double quantized weights are coded with (`shared`), the bias (dense), the
    temporaries of quantizing.
    """
    o, i = shape
    n = o * i
    itemsize = ITEMSIZE[quant.quant_storage]
    packed_bytes = ceil_div(n, 2)
    if packed_bytes % itemsize:
        raise RefusedError(
            f"quant_storage: {packed_bytes} bytes of a {o} × {i} weight are not a whole number of {quant.quant_storage}"
        )
    blocks = ceil_div(n, quant.blocksize)
    weight = Allocation("weight", quant.quant_storage, (packed_bytes // itemsize, 1))
    code = Allocation("code", "fp32", (CODE_4BIT,))
    if not quant.double_quant:
        return weight, Allocation("absmax", "fp32", (blocks,)), code
    return (
        weight,
        Allocation("absmax", "uint8", (blocks,)),
        code,
        Allocation("nested_absmax", "fp32", (ceil_div(blocks, NESTED_BLOCKSIZE),)),
        Allocation("nested_code", "fp32", (CODE_DYNAMIC,)),
        Allocation("offset", "fp32", ()),
    )


def int8(quant: QuantConfig, *, shape: tuple[int, int], dtype: str) -> tuple[Allocation, ...]:
    """The tensors of an `Int8Params`: n bytes and one fp32 scale per output row.

    Source: `Int8Params._quantize` and `Linear8bitLt`, bitsandbytes/nn/modules.py; `CB` is the weight's own storage
    and moves to the layer's state with `SCB` in the first forward, nothing is copied. Left out: `state.idx`, the
    indices of outlier columns of the last input that each layer keeps, int64: depends on the data, nothing where no
    activation reaches the threshold of 6, else one block of 512 bytes for up to 64 columns.
    """
    o, i = shape
    return Allocation("weight", "int8", (o, i)), Allocation("SCB", "fp32", (o,))


def dynamic_map() -> Allocation:
    """The 8-bit map that bitsandbytes makes once per process, on the first double quantized weight (`name2qmap`)."""
    return Allocation("dynamic_map", "fp32", (CODE_DYNAMIC,))

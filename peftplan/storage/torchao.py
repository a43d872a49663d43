"""Weights that torchao stores: `NF4Tensor`. Version 0.18.

n elements.
"""

from __future__ import annotations

from peftplan.errors import RefusedError
from peftplan.ledger import Allocation
from peftplan.storage.config import QuantConfig

SCALER_BLOCKSIZE = 256
"""Scalers per second-level factor (`to_nf4`)."""
CODE_4BIT = 16
"""Entries of the NF4 table, one table per weight."""


def nf4(quant: QuantConfig, *, shape: tuple[int, int], dtype: str) -> tuple[Allocation, ...]:
    """The tensors of an `NF4Tensor`, double quantized: what is not packed has the dtype of the weight, here D.

        weight               uint8 (n/2,): two elements per byte
        quantized_scalers    int8 (n/blocksize,)
        quantization_factor  D (n/blocksize/256,)
        scaler_mean          D ()
        code                 D (16,)

    Source: `NF4Tensor.from_tensor`, torchao/quantization/quantize_/workflows/nf4/nf4_tensor.py. Left out: the temporaries of
    quantizing. Raises RefusedError where torchao asserts whole blocks.
    """
    o, i = shape
    n, block = o * i, quant.blocksize * SCALER_BLOCKSIZE
    if n % block:
        raise RefusedError(f"quant: torchao stores whole blocks of {block} elements in nf4, and a {o} × {i} weight has {n}")
    scalers = n // quant.blocksize
    return (
        Allocation("weight", "uint8", (n // 2,)),
        Allocation("quantized_scalers", "int8", (scalers,)),
        Allocation("quantization_factor", dtype, (scalers // SCALER_BLOCKSIZE,)),
        Allocation("scaler_mean", dtype, ()),
        Allocation("code", dtype, (CODE_4BIT,)),
    )

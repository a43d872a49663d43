"""Weights in narrow floats with block scales, as transformers keeps them: fp8 (e4m3) and mxfp4.

e experts, o output features, i input features.
"""

from __future__ import annotations

from peftplan.errors import RefusedError
from peftplan.ledger import Allocation
from peftplan.storage.config import QuantConfig
from peftplan.units import ceil_div


def fp8(quant: QuantConfig, *, shape: tuple[int, ...], dtype: str) -> tuple[Allocation, ...]:
    """The parameters of an `FP8Linear` (o, i), or of one projection of `FP8Experts` (e, o, i).

        weight             e4m3 (…, o, i)
        weight_scale_inv   fp32 (…, ⌈o/128⌉, ⌈i/128⌉)

    Quantized while loading, a weight that is not a whole number of tiles **stays in its own dtype** and its scales are
    allocated unused (`Fp8Quantize._quantize_one`); a checkpoint stored in fp8 has it in fp8 with partial tiles
    (`quant.pre_quantized`). Source: transformers/integrations/finegrained_fp8.py, 5.24.0, `FineGrainedFP8Config` with
    its defaults: dynamic activations, fp32 scales. Experts in fp8 with a bias do not load. GPUs older than compute
    capability 8.9 get the dequantized model. Left out: static activation scales, ue8m0 scales, fp4 experts, the
    second row of scales where 2 × intermediate_size ≤ 128.
    """
    *experts, o, i = shape
    side = quant.blocksize
    whole_tiles = o % side == 0 and i % side == 0
    scales = (*experts, ceil_div(o, side), ceil_div(i, side))
    return (
        Allocation("weight", "fp8_e4m3" if whole_tiles or quant.pre_quantized else dtype, shape),
        Allocation("weight_scale_inv", "fp32", scales),
    )


def mxfp4(quant: QuantConfig, *, shape: tuple[int, int, int], dtype: str) -> tuple[Allocation, ...]:
    """The packed experts of gpt_oss, from the shape (e, i, o) of its unquantized `gate_up_proj` or `down_proj`.

        weight  uint8 (e, o, i/2): two values per byte         scales  uint8 (e, o, i/32): one exponent per 32 values

    Source: `Mxfp4GptOssExperts` and `Mxfp4Dequantize`, transformers/integrations/mxfp4.py, 5.24.0. Its biases are
    fp32 whatever the model's dtype. Left out: the padding of the kernels' own layouts on Hopper and Blackwell
    (`swizzle_mxfp4`).
    """
    e, i, o = shape
    if i % quant.blocksize:
        raise RefusedError(f"quant: mxfp4 cannot store {i} input features, which are not a multiple of {quant.blocksize}")
    return (
        Allocation("weight", "uint8", (e, o, i // 2)),
        Allocation("scales", "uint8", (e, o, i // quant.blocksize)),
    )

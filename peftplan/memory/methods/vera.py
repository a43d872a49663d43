"""VeRA (peft, tuners/vera/layer.py `Linear.forward`): two trained vectors around frozen matrices that all layers share."""

from __future__ import annotations

from collections.abc import Callable

from peftplan.memory.methods.sides import sides
from peftplan.memory.parts import Part, Running
from peftplan.methods.vera import VeraConfig
from peftplan.storage.config import FOUR_BIT
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter, Tensor


def vera(f: Tape, part: Part, x: Tensor, base: Callable[[Tensor], Tensor], running: Running) -> Tensor:
    """`result + λ_b * (B (λ_d * (A dropout(x))))`, in the dtype of λ; a 4-bit base's result is cloned first."""
    previous = x.dtype
    result = base(x)
    dtype = result.dtype
    if part.quant is not None and part.quant.name in FOUR_BIT:
        result = ops.copied(f, result, "clone", viewed=False)
    n_in, n_out = sides(part)
    outer, inner = part.params["vera_lambda_b"], part.params["vera_lambda_d"]
    rank = inner.dims[0]
    a = Parameter("vera_A", (rank, n_in), running.adapter_buffers, trainable=False)
    b = Parameter("vera_B", (n_out, rank), running.adapter_buffers, trainable=False)
    f.module = part.name
    x = f.to(x, inner.dtype)
    low = products.linear(f, ops.dropout(f, x, running.config_as(VeraConfig).vera_dropout), a)
    low = ops.mul(f, inner, low)
    out = products.linear(f, low, b)
    del low
    out = ops.mul(f, outer, out)
    result = ops.add(f, result, out)
    del out
    result = f.to(result, dtype)
    return f.to(result, previous)

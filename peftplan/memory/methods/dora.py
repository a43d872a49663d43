"""DoRA (arXiv 2402.09353) as peft computes it: tuners/lora/dora.py (`DoraLinearLayer.forward`), lora/variants.py; and as
torchtune does at bd2a0fc7: modules/peft/dora.py (`DoRALinear.forward`).

The norm of W + ΔW needs ΔW itself, made by sending an identity matrix through A and B, so each module takes matrices of its
weight's size while its forward runs.
"""

from __future__ import annotations

from peftplan.memory.parts import Part, Running
from peftplan.memory.quantized import dequantized, restored
from peftplan.methods.lora import LoraConfig
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Operand, Parameter, Tensor


def dora(f: Tape, part: Part, x: Tensor, result: Tensor, running: Running) -> Tensor:
    """`result + (m - 1) * base + m * lora_B(lora_A(x)) * scaling`, with m = magnitude / ‖W + ΔW‖."""
    base_result: Tensor | None = result
    if dropout := running.config_as(LoraConfig).lora_dropout:
        x = f.call(f"{part.name}.lora_dropout", part.layer, (), x, lambda x: ops.dropout(f, x, dropout))
        base_result = None
    of_norm, magnitude = f"{part.name}.lora_magnitude_vector", part.params["lora_magnitude_vector.weight"]
    reads = (part.weight, part.bias if base_result is not None else None)
    return ops.add(
        f, result, f.call(of_norm, part.layer, (magnitude,), x, lambda x: _update(f, part, x, base_result), reads=reads)
    )


def dora_of_torchtune(f: Tape, part: Part, x: Tensor, result: Tensor, running: Running) -> Tensor:
    """`(m - 1) * base + m * lora_B(lora_A(x)) * scaling + base`: ΔW and the restored weight live until the forward returns."""
    a, b, magnitude = part.params["lora_A.weight"], part.params["lora_B.weight"], part.params["lora_magnitude_vector.weight"]
    lora_result = _through(f, part, ops.dropout(f, x, running.config_as(LoraConfig).lora_dropout), a, b)
    eye = f.new((a.dims[1], a.dims[1]), x.dtype, "eye")
    lora_weight = _through(f, part, eye, a, b)
    f.module = part.name
    weight = restored(f, part) if part.quant is not None else part.own_weight
    norm = _norm(f, weight, lora_weight, turned=False)
    scale = ops.divide(f, magnitude, norm)
    scaled_base = ops.mul(f, ops.shift(f, scale), result)
    scaled = ops.scale(f, ops.mul(f, scale, lora_result))
    out = ops.add(f, scaled_base, scaled)
    del scaled_base, scaled
    out = ops.add(f, out, result)
    del eye, lora_weight, weight, norm
    return out


def _update(f: Tape, part: Part, x: Tensor, base_result: Tensor | None) -> Tensor:
    a, b = part.params["lora_A.weight"], part.params["lora_B.weight"]
    lora_weight = f.to(_lora_weight(f, part, a, b), x.dtype)
    f.module = part.name
    if f.modules is not None and part.weight is not None:
        f.modules.read(f"{part.name}.lora_magnitude_vector", part.layer, part.weight)
    base_weight = dequantized(f, part) if part.quant is not None else part.weight
    assert base_weight is not None
    weight = f.to(base_weight, x.dtype)
    del base_weight
    turned = part.kind == "Conv1D" and part.quant is None
    norm = _norm(f, weight, lora_weight, turned=turned)
    magnitude = part.params["lora_magnitude_vector.weight"]
    scale = ops.divide(f, magnitude, norm)
    lora_result = _through(f, part, x, a, b)
    f.module = part.name
    if base_result is None:
        base_result = products.linear(f, x, weight, transposed=turned)
    elif (bias := part.bias) is not None:
        if f.modules is not None:
            f.modules.read(f"{part.name}.lora_magnitude_vector", part.layer, bias)
        base_result = ops.add(f, base_result, bias)
    scaled_base = ops.mul(f, ops.shift(f, scale), base_result)
    scaled = ops.scale(f, ops.mul(f, scale, lora_result))
    out = ops.add(f, scaled_base, scaled)
    del scaled_base, scaled, lora_weight, weight, norm
    return out


def _lora_weight(f: Tape, part: Part, a: Parameter, b: Parameter) -> Tensor:
    """ΔWᵀ: an identity matrix through A and B, with their graph."""
    n_in = a.dims[1]
    f.module = f"{part.name}.lora_A"
    return _through(f, part, f.new((n_in, n_in), a.dtype, "eye"), a, b)


def _through(f: Tape, part: Part, x: Tensor, a: Parameter, b: Parameter) -> Tensor:
    """`lora_B(lora_A(x))`."""
    f.module = f"{part.name}.lora_A"
    low = f.call(f.module, part.layer, (a,), x, lambda x: products.linear(f, x, a))
    f.module = f"{part.name}.lora_B"
    return f.call(f.module, part.layer, (b,), low, lambda x: products.linear(f, x, b))


def _norm(f: Tape, weight: Operand, lora_weight: Tensor, *, turned: bool) -> Tensor:
    """`linalg.norm(W + scaling * ΔW, dim=1)`, without a gradient.

    A Conv1D's weight is turned round: the norm goes over rows, as a sum of columns does.
    """
    scaled = f.new(weight.dims, lora_weight.dtype, "mul")
    total = f.new(weight.dims, ops.promoted(weight.dtype, lora_weight.dtype), "add")
    del scaled
    if turned:
        return f.column_sum(weight.dims, weight.dims[1:], total.dtype)
    return f.new(weight.dims[:1], total.dtype, "norm")

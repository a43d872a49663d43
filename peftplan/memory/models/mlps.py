"""MLPs of a decoder: gated, with the gate and up projections fused, or plain."""

from __future__ import annotations

from peftplan.memory import divided_mlp, fused_layers
from peftplan.memory.activations import activation
from peftplan.memory.models.style import Call
from peftplan.tape import ops
from peftplan.tape.shaping import split
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Operand, Tensor


def mlp(c: Call, x: Tensor) -> Tensor:
    """The MLP of the block's kind."""
    if c.block.mlp.variant == "moe" and c.style.mixture is not None:
        return c.style.mixture(c, x)
    of_variant = plain_mlp if c.block.mlp.variant == "plain" else fused_mlp if c.block.mlp.fused_gate_up else gated_mlp
    x = of_variant(c, x)
    if c.style.drops_inside and not _in_kernel(c):
        c.at("mlp")
        x = c.dropout(x)
    return x


PARTS = ("gate", "up", "down")


def _in_kernel(c: Call) -> bool:
    """Whether one function takes the place of the MLP's forward, with its dropout."""
    kernel = c.model.running.kernels.lora_mlp
    return kernel is not None and c.adapted(kernel, [f"mlp.{part}_proj" for part in PARTS]) is not None


def gated_mlp(c: Call, x: Tensor, name: str = "mlp") -> Tensor:
    """`LlamaMLP.forward`."""
    kernels = c.model.running.kernels
    if kernels.lora_mlp is not None and (ps := c.adapted(kernels.lora_mlp, [f"{name}.{part}_proj" for part in PARTS])):
        from peftplan.memory import lora_mlp

        return lora_mlp.mlp(c.tape, kernels.lora_mlp, x, ps, c.lora_dropout)
    gate = c.linear(f"{name}.gate_proj", x)
    if kernels.glu is not None:
        up = c.linear(f"{name}.up_proj", x)
        x = fused_layers.gated(c.at(name), kernels.glu, gate, up)
        del gate, up
        return c.linear(f"{name}.down_proj", x)
    gate = c.module(f"{name}.act_fn", gate, lambda c, x: activation(c.at(f"{name}.act_fn"), x, c.block.mlp.activation))
    up = c.linear(f"{name}.up_proj", x)
    x = ops.mul(c.at(name), gate, up)
    del gate, up
    return c.linear(f"{name}.down_proj", x)


def fused_mlp(c: Call, x: Tensor) -> Tensor:
    """`Phi3MLP.forward`: gate and up are halves of one projection."""
    x = c.linear("mlp.gate_up_proj", x)
    width = 2 * c.block.mlp.intermediate_size
    if x.dims[-1] != width:
        return c.linear("mlp.down_proj", divided_mlp.gated(c.at("mlp"), x, width))
    half = (*x.dims[:-1], c.block.mlp.intermediate_size)
    gate, x = split(c.at("mlp"), x, (half, half))
    if (kernel := c.model.running.kernels.glu) is not None:
        return c.linear("mlp.down_proj", fused_layers.gated(c.tape, kernel, gate, x, copies=True))

    def activated(c: Call, x: Tensor) -> Tensor:
        return activation(c.at("mlp.activation_fn"), x, c.block.mlp.activation)

    x = ops.mul(c.tape, x, c.module("mlp.activation_fn", gate, activated))
    return c.linear("mlp.down_proj", x)


def plain_mlp(c: Call, x: Tensor) -> Tensor:
    """An MLP without gate."""
    first, second = c.style.plain
    x = c.linear(first, x)
    if c.block.mlp.activation == "xielu":
        x = c.module("mlp.act_fn", x, xielu)
    else:
        x = c.module("mlp.act", x, lambda c, x: activation(c.at("mlp.act"), x, c.block.mlp.activation))
    return c.linear(second, x)


def xielu(c: Call, x: Tensor) -> Tensor:
    """`XIELUActivation._xielu_python`, whose two numbers autocast takes to fp32 (transformers, activations.py)."""
    f, own = c.at("mlp.act_fn"), c.model.part(f"{c.style.stack}.mlp.act_fn", c.number).params
    alpha_p, alpha_n = (_softplus(f, own[name]) for name in ("alpha_p", "alpha_n"))
    alpha_n = ops.shift(f, alpha_n)
    is_positive = f.new(x.dims, "bool", "gt")
    above = _plus_half(f, [ops.mul(f, ops.mul(f, alpha_p, x), x)], x)
    least = f.new(x.dims, x.dtype, "min", f.record(_min_backward, (x,), x))
    wide = f.cast(least, "fp32") if f.autocast else least
    below = ops.keeps_output(f, wide, "expm1", passing=True)
    del wide, least
    below = ops.add(f, below, x)
    products = [ops.mul(f, below, alpha_n)]
    del below
    below = _plus_half(f, products, x)
    return f.new(x.dims, above.dtype, "where", f.record(_where_backward, (above, below), is_positive))


def _plus_half(f: Tape, product: list[Tensor], x: Tensor) -> Tensor:
    """The sum of a product, which ends first, and x times a number."""
    scaled = ops.scale(f, x)
    total = ops.add(f, product[0], scaled)
    product.clear()
    return total


def _softplus(f: Tape, x: Operand) -> Tensor:
    wide = f.to(x, "fp32") if f.autocast else x
    return ops.keeps_input(f, wide, "softplus")


def _min_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    """Half the gradient where both are equal, and none where the number is smaller (torch, derivatives.yaml, `minimum`)."""
    half = f.new(g.dims, g.dtype, "div")
    equal = f.new(g.dims, "bool", "eq")
    out = f.new(g.dims, g.dtype, "where")
    del half, equal
    _larger = f.new(g.dims, "bool", "gt")
    return out


def _where_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Gradients:
    return f.new(g.dims, g.dtype, "where"), f.new(g.dims, g.dtype, "where")

"""Granite 4: Mamba 2 or attention in each layer, then experts beside a shared MLP whose gate and up are one projection.

Mamba 2 runs as transformers' code was recorded (`memory.recorded_function`). Source: transformers,
models/granitemoehybrid/modeling_granitemoehybrid.py.
"""

from __future__ import annotations

from functools import partial

from peftplan.memory import recorded_function
from peftplan.memory.activations import activation
from peftplan.memory.models.decoder import added, attention, decoder
from peftplan.memory.models.moe import granite_route, routed_block
from peftplan.memory.models.style import Call, Style
from peftplan.tape import ops
from peftplan.tape.shaping import split
from peftplan.tape.tensors import Tensor

moe = partial(routed_block, route=granite_route, router="block_sparse_moe.router", name="block_sparse_moe.experts")


def layer(c: Call, x: Tensor) -> Tensor:
    """`GraniteMoeHybridDecoderLayer.forward`."""
    residual = x
    x = c.norm("input_layernorm", x)
    if c.block.state_space is not None:
        x = c.module("mamba", x, mamba, by_name=True)
    else:
        x = c.module("self_attn", x, attention, by_name=True)
    x = added(c, residual, x)
    residual = x
    x = c.norm("post_attention_layernorm", x)
    if c.block.mlp.variant == "moe":
        mixed = c.module("block_sparse_moe", x, moe)
        x = ops.add(c.at(), mixed, c.module("shared_mlp", x, shared_mlp))
        del mixed
    else:
        x = c.module("shared_mlp", x, shared_mlp)
    return added(c, residual, x)


def mamba(c: Call, x: Tensor) -> Tensor:
    """`GraniteMoeHybridMambaLayer.forward`."""
    return recorded_function.mixer(c, "mamba", c.linear("mamba.in_proj", x), dtype=x.dtype)


def shared_mlp(c: Call, x: Tensor) -> Tensor:
    """`GraniteMoeHybridMLP.forward`, whose names hold both halves of the first projection."""
    both = c.linear("shared_mlp.input_linear", x)
    width = both.dims[-1]
    assert isinstance(width, int)
    half = (*both.dims[:-1], width // 2)
    gate, up = split(c.at("shared_mlp"), both, (half, half))
    x = ops.mul(c.at("shared_mlp"), activation(c.tape, gate, c.block.mlp.activation), up)
    return c.linear("shared_mlp.output_linear", x)


STYLE = Style(layer=layer, multiplied=True, mixture=moe)
granitemoehybrid = partial(decoder, style=STYLE)

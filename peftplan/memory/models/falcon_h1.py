"""Falcon-H1: Mamba 2 beside attention in each layer, each branch with multipliers of its own.

Mamba 2 runs as mamba-ssm's function (`memory.state_space`) or as transformers' code was recorded
(`memory.recorded_function`). Source: transformers, models/falcon_h1/modeling_falcon_h1.py.
"""

from __future__ import annotations

from functools import partial

from peftplan.memory import recorded_function, state_space
from peftplan.memory.activations import activation
from peftplan.memory.models.decoder import decoder
from peftplan.memory.models.style import Call, Style
from peftplan.tape import ops
from peftplan.tape.tensors import Tensor


def layer(c: Call, x: Tensor) -> Tensor:
    """`FalconH1DecoderLayer.forward`, whose names hold both branches until it returns."""
    residual = x
    x = c.norm("input_layernorm", x)
    mixed = ops.scale(c.at(), c.module("mamba", x, mamba, by_name=True))
    attended = ops.scale(c.at(), c.module("self_attn", ops.scale(c.at(), x), attention, by_name=True))
    x = ops.add(c.at(), mixed, attended)
    x = ops.add(c.at(), residual, x)
    residual = x
    x = c.module("feed_forward", c.norm("pre_ff_layernorm", x), feed_forward)
    return ops.add(c.at(), residual, x)


def mamba(c: Call, x: Tensor) -> Tensor:
    """`FalconH1Mixer.forward`; `mup_vector` is a buffer. A cache gets the last inputs of the convolution and the last states."""
    space, f = c.block.state_space, c.at("mamba")
    assert space is not None
    x = ops.scale(f, x)
    if c.model.running.kernels.scan is None:
        if c.model.caches:
            taps = c.model.part(f"{c.style.stack}.mamba.conv1d", c.number).own_weight.dims[-1]
            of_inputs = f.new((x.dims[0], space.channels, taps), x.dtype, "conv_states")
            states = f.new((x.dims[0], space.num_heads, space.head_dim, space.state_size), "fp32", "recurrent_states")
            c.model.kept.append((of_inputs, states))
        return recorded_function.mixer(c, "mamba", c.linear("mamba.in_proj", x), dtype=x.dtype)
    projected = c.linear("mamba.in_proj", x)
    table = Tensor(None, (1, 1, projected.dims[-1]), c.model.running.dtype)
    projected = ops.mul(c.at("mamba"), projected, table)
    return state_space.mixer(c.model, f"{c.style.stack}.mamba", c.number, space, projected)


def attention(c: Call, x: Tensor) -> Tensor:
    """`FalconH1Attention.forward`."""
    a, (b, s, _) = c.block.attentions[0], x.dims
    dims = (b, a.num_key_value_heads, s, a.head_dim)
    q = ops.heads(c.tape, c.linear("self_attn.q_proj", x), (b, a.num_attention_heads, s, a.head_dim), clones=True)
    k = ops.scale(c.at("self_attn"), ops.heads(c.tape, c.linear("self_attn.k_proj", x), dims, clones=True))
    v = c.linear("self_attn.v_proj", x).view(dims)
    q, k = c.style.rotate(c.at("self_attn"), q, k, *c.tables)
    return c.linear("self_attn.o_proj", c.attend(q, k, v, rotated=True))


def feed_forward(c: Call, x: Tensor) -> Tensor:
    """`FalconH1MLP.forward`."""
    up = c.linear("feed_forward.up_proj", x)
    gate = ops.scale(c.at("feed_forward"), c.linear("feed_forward.gate_proj", x))
    gate = c.module("feed_forward.act_fn", gate, lambda c, x: activation(c.at("feed_forward"), x, c.block.mlp.activation))
    y = ops.mul(c.at("feed_forward"), up, gate)
    del up, gate
    return ops.scale(c.at("feed_forward"), c.linear("feed_forward.down_proj", y))


STYLE = Style(layer=layer, multiplied=True, final_norm="model.final_layernorm")
falcon_h1 = partial(decoder, style=STYLE)

"""Qwen 3.5, dense and with experts, and Qwen 3 Next: gated attention in some layers, in the others a gated delta rule behind a
short convolution.

Source: transformers, models/{qwen3_5,qwen3_5_moe,qwen3_next}/modeling_*.py.
"""

from __future__ import annotations

from functools import partial

from peftplan.memory import delta_kernels
from peftplan.memory.delta_rule import CHUNK, chunked, repeated, turned
from peftplan.memory.models.decoder import decoder
from peftplan.memory.models.lfm2 import depthwise
from peftplan.memory.models.mlps import mlp
from peftplan.memory.models.moe import qwen2_block
from peftplan.memory.models.style import Call, Style
from peftplan.memory.models.vision_language import with_grids
from peftplan.memory.norms import rms_plus_one
from peftplan.memory.units import in_fp32
from peftplan.tape import ops
from peftplan.tape.norms import rms_normed
from peftplan.tape.rotary import partly_rotary
from peftplan.tape.shaping import cat, sliced, split
from peftplan.tape.tensors import Tensor
from peftplan.units import ceil_div


def layer(c: Call, x: Tensor, *, joined: bool = False) -> Tensor:
    """`Qwen3_5DecoderLayer.forward`, and `Qwen3NextDecoderLayer.forward`, whose projections are `joined`."""
    rule = joined_rule if joined else delta_rule
    name, mixer = ("self_attn", attention) if c.block.delta_rule is None else ("linear_attn", rule)
    residual = x
    x = c.norm("input_layernorm", x)
    x = c.module(name, x, mixer, by_name=True)
    x = ops.add(c.at(), residual, x)
    residual = x
    x = c.norm("post_attention_layernorm", x)
    x = c.module("mlp", x, mlp)
    return ops.add(c.at(), residual, x)


def delta_rule(c: Call, x: Tensor, *, repeats: bool = False) -> Tensor:
    """`Qwen3_5GatedDeltaNet.forward`, whose names hold its projections until it returns. `repeats`: see `ruled`."""
    rule, name, (b, s, _) = c.block.delta_rule, "linear_attn", x.dims
    assert rule is not None
    projected = turned(c.tape, c.linear(f"{name}.in_proj_qkv", x))
    gate = c.linear(f"{name}.in_proj_z", x)
    rates = turned(c.tape, c.linear(f"{name}.in_proj_b", x))
    steps = turned(c.tape, c.linear(f"{name}.in_proj_a", x))
    f = c.at(name)
    whole = depthwise(c, projected, f"{name}.conv1d")
    mixed = ops.keeps_input(c.at(name), sliced(f, whole, (b, s, rule.channels)), "silu")
    del whole
    mixed = f.to(mixed, projected.dtype)
    del projected
    keys = (b, s, rule.key_heads, rule.key_dim)
    q, k, v = split(f, mixed, (keys, keys, (b, s, rule.value_heads, rule.value_dim)))
    return ruled(c, (q, k, v), rates, steps, gate, repeats=repeats)


def joined_rule(c: Call, x: Tensor, *, repeats: bool = False) -> Tensor:
    """`Qwen3NextGatedDeltaNet.forward`, whose names hold both projections until it returns."""
    rule, name, (b, s, _) = c.block.delta_rule, "linear_attn", x.dims
    assert rule is not None
    both, two_rates = c.linear(f"{name}.in_proj_qkvz", x), c.linear(f"{name}.in_proj_ba", x)
    f, each, values = c.at(name), rule.value_heads // rule.key_heads, rule.value_heads // rule.key_heads * rule.value_dim
    of_heads = (b, s, rule.key_heads)
    widths = (rule.key_dim, rule.key_dim, values, values)
    q, k, v, gate = split(f, both.view((*of_heads, sum(widths))), [(*of_heads, width) for width in widths])
    rates, steps = split(f, two_rates.view((*of_heads, 2 * each)), ((*of_heads, each), (*of_heads, each)))
    heads = (b, s, rule.value_heads)
    v, gate = (ops.copied(f, part, "clone", (*heads, rule.value_dim)) for part in (v, gate))
    rates, steps = (ops.copied(f, part, "clone", heads) for part in (rates, steps))
    q, k = (ops.copied(f, part, "clone", (b, s, rule.key_heads * rule.key_dim)) for part in (q, k))
    v = v.view((b, s, rule.width))
    joined = cat(f, (q, k, v), (b, s, rule.channels))
    mixed = ops.keeps_input(c.at(name), sliced(f, depthwise(c, joined, f"{name}.conv1d"), (b, s, rule.channels)), "silu")
    del joined
    f, keys = c.at(name), (b, s, rule.key_heads, rule.key_dim)
    q, k, v = split(f, mixed, (keys, keys, (*heads, rule.value_dim)))
    return ruled(c, (q, k, v), rates, steps, gate, repeats=repeats)


def ruled(c: Call, qkv: tuple[Tensor, ...], rates: Tensor, steps: Tensor, gate: Tensor, *, repeats: bool = False) -> Tensor:
    """The delta rule behind its convolution. `repeats`: the function gets as many heads of queries and keys as of values."""
    (q, k, v), rule, name, f = qkv, c.block.delta_rule, "linear_attn", c.at("linear_attn")
    del qkv
    assert rule is not None
    b, s = v.dims[:2]
    beta = ops.keeps_output(f, rates, "sigmoid")
    own = c.model.part(f"{c.style.stack}.{name}", c.number).params
    units, unit = c.model.units, in_fp32(c.number)
    steps = units.enter_with(unit, steps)
    rate = ops.scale(f, ops.keeps_output(f, f.to(own["A_log"], "fp32"), "exp"), "neg")
    step = ops.keeps_input(f, ops.add(f, f.to(steps, "fp32"), own["dt_bias"]), "softplus")
    decay = units.leave(unit, ops.mul(f, rate, step))
    del rate, step
    if repeats and rule.key_heads != rule.value_heads:
        q, k = (repeated(f, side, (b, s, rule.value_heads, rule.key_dim)) for side in (q, k))
    if c.model.running.kernels.delta_rule is not None:
        y = delta_kernels.by_flash_linear_attention(f, rule, q, k, v, decay, beta)
    else:
        y = chunked(f, rule, q, k, v, decay, beta, ceil_div(c.model.length(s), CHUNK))
    if y.dtype == "fp32":  # a view, of which `reshape` makes rows
        y = ops.copied(f, y, "clone")
    y = gated_norm(c, y, gate.view(y.dims))
    return c.linear(f"{name}.out_proj", y.view((b, s, rule.width)))


def gated_norm(c: Call, x: Tensor, gate: Tensor) -> Tensor:
    """`Qwen3_5RMSNormGated.forward`."""
    f, dtype = c.at("linear_attn.norm"), x.dtype
    weight = c.model.part(f"{c.style.stack}.linear_attn.norm", c.number).own_weight
    x = rms_normed(f, f.to(x, "fp32"))
    x = ops.mul(f, weight, f.to(x, dtype))
    x = ops.mul(f, x, ops.keeps_input(f, f.to(gate, "fp32"), "silu"))
    narrow: Tensor = f.to(x, dtype)
    return narrow


def attention(c: Call, x: Tensor) -> Tensor:
    """`Qwen3_5Attention.forward`, whose name holds the gate until it returns."""
    a, (b, s, _) = c.block.attentions[0], x.dims
    heads = (b, s, a.num_attention_heads, a.head_dim)
    q, gate = split(c.at("self_attn"), c.linear("self_attn.q_proj", x), (heads, heads))
    gate = ops.copied(c.at("self_attn"), gate, "clone", (b, s, a.num_attention_heads * a.head_dim))
    q = _by_head(c.norm("self_attn.q_norm", q))
    k = c.linear("self_attn.k_proj", x)
    k = _by_head(c.norm("self_attn.k_norm", ops.heads(c.tape, k, (b, s, a.num_key_value_heads, a.head_dim), clones=True)))
    v = c.linear("self_attn.v_proj", x).view(k.dims)
    q, k = c.style.rotate(c.at("self_attn"), q, k, *c.tables)[:2]
    k, v = c.cached(k, v, rotated=True)
    y = c.attend(q, k, v, rotated=True)
    f = c.at("self_attn")
    y = ops.mul(f, y, ops.keeps_output(f, gate, "sigmoid"))
    return c.linear("self_attn.o_proj", y)


def _by_head(x: Tensor) -> Tensor:
    b, s, heads, d = x.dims
    return x.view((b, heads, s, d))


STYLE = Style(norm=rms_plus_one, layer=layer, rotate=partly_rotary, by_head=True)
OF_EXPERTS = STYLE._replace(mixture=qwen2_block)


def _within(style: Style) -> Style:
    """The same of the text part of a vision-language model."""
    return style._replace(stack="model.language_model.layers.{}", final_norm="model.language_model.norm")


qwen3_next = partial(decoder, style=OF_EXPERTS._replace(layer=partial(layer, joined=True)))
qwen3_5_text = partial(with_grids, style=STYLE, by_sections=False)
qwen3_5_moe_text = partial(with_grids, style=OF_EXPERTS, by_sections=False)
qwen3_5 = partial(with_grids, style=_within(STYLE), by_sections=False)
qwen3_5_moe = partial(with_grids, style=_within(OF_EXPERTS), by_sections=False)

"""Nemotron-H: a norm before each layer, whose one part is Mamba 2, attention without positions, or an MLP.

Mamba 2 runs as mamba-ssm's function (`memory.state_space`) or as transformers' code was recorded
(`memory.recorded_function`). Source: transformers, models/nemotron_h/modeling_nemotron_h.py, and
the file of that name beside the weights of NVIDIA-Nemotron-3-Nano-30B-A3B, whose operations are the same but for a mask and
repeated keys and values; that of Nemotron Nano 12B v2 chooses the class of attention in the same line.
"""

from __future__ import annotations

from functools import partial

from peftplan.memory import recorded_function, state_space, state_space_apart
from peftplan.memory.activations import activation
from peftplan.memory.calls import inputs
from peftplan.memory.experts import experts
from peftplan.memory.methods.param_wrapper import Stacked
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.moe import call_router, check, deepseek_v3_route
from peftplan.memory.models.style import Call, Style, Sublayer
from peftplan.tape import ops
from peftplan.tape.norms import rms_normed
from peftplan.tape.tensors import Tensor


def rms(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`NemotronHRMSNorm`: the weight multiplies in fp32, as a copy."""
    f, weight = model.tape, model.part(name, layer).own_weight
    f.module = name
    normed = rms_normed(f, f.to(x, "fp32"))
    narrow: Tensor = f.to(ops.mul(f, f.to(weight, "fp32"), normed), x.dtype)
    return narrow


def layer(c: Call, x: Tensor) -> Tensor:
    """`NemotronHBlock.forward`, whose local `residual` holds the layer's input; the norm reads it in its weight's dtype."""
    residual = x
    x = c.norm("norm", c.tape.to(x, c.model.part(f"{c.style.stack}.norm", c.number).own_weight.dtype))
    part = mamba if c.block.state_space else attention if c.block.attentions else _mlp_of(c)
    x = c.module("mixer", x, part, by_name=bool(c.block.attentions))
    return ops.add(c.at(), residual, x)


def _mlp_of(c: Call) -> Sublayer:
    return mixture if c.block.mlp.variant == "moe" else mlp


def mamba(c: Call, x: Tensor) -> Tensor:
    """`NemotronHMamba2Mixer.forward`."""
    assert c.block.state_space is not None
    if c.model.running.kernels.scan is None:
        return recorded_function.mixer(c, "mixer", c.linear("mixer.in_proj", x), dtype=x.dtype)
    name, projected = f"{c.style.stack}.mixer", c.linear("mixer.in_proj", x)
    if c.model.part(f"{name}.out_proj", c.number).quant is not None:  # which mamba-ssm's function cannot multiply
        rows = state_space_apart.mixer(c.model, name, c.number, c.block.state_space, projected)
        del projected
        return c.linear("mixer.out_proj", rows)
    return state_space.mixer(c.model, name, c.number, c.block.state_space, projected)


def attention(c: Call, x: Tensor) -> Tensor:
    """`NemotronHAttention.forward`."""
    a, (b, s, _) = c.block.attentions[0], x.dims
    q = c.linear("mixer.q_proj", x).view((b, a.num_attention_heads, s, a.head_dim))
    k, v = (c.linear(f"mixer.{name}_proj", x).view((b, a.num_key_value_heads, s, a.head_dim)) for name in "kv")
    c.at("mixer")
    return c.linear("mixer.o_proj", c.attend(q, k, v, rotated=False))


def mlp(c: Call, x: Tensor, name: str = "mixer") -> Tensor:
    """`NemotronHMLP.forward`."""
    x = c.linear(f"{name}.up_proj", x)
    x = c.module(f"{name}.act_fn", x, lambda c, x: activation(c.at(f"{name}.act_fn"), x, c.block.mlp.activation))
    return c.linear(f"{name}.down_proj", x)


def mixture(c: Call, x: Tensor) -> Tensor:
    """`NemotronHMoE.forward`: experts without gate, in a latent space where there is one, beside a shared one."""
    check(c)
    _logits, weights, indices = call_router(c, deepseek_v3_route, x, "mixer.gate")
    rows, latent = ops.reshaped(c.tape, x), c.model.has(f"{c.style.stack}.mixer.fc1_latent_proj", c.number)
    out = c.linear("mixer.fc1_latent_proj", rows) if latent else rows
    del rows
    f = c.at("mixer.experts")
    params = Stacked(c.model, f"{c.style.stack}.mixer.experts", c.number, transposed=False)
    act = partial(activation, name=c.block.mlp.activation)
    out = experts(f, out, indices, weights, params, act, kernel=c.model.running.flash, transposed=False)
    out = c.linear("mixer.fc2_latent_proj", out) if latent else out
    return ops.add(c.at("mixer"), out, mlp(c, x, "mixer.shared_experts"))


STYLE = Style(norm=rms, layer=layer, final_norm="model.norm_f")


def nemotron_h(model: Model) -> Tensor:
    """`NemotronHModel.forward`."""
    states = [inputs(model)]
    model.can_cache = not model.running.published_code
    model.tape.module = "model"
    _positions = model.tape.new((model.seq,), "int64", "position_ids")
    _mask = published_mask(model, states[0].dtype) if model.running.published_code else None
    return run_layers(model, STYLE, states, lambda window: ())


def published_mask(model: Model, dtype: str) -> Tensor:
    """`_update_causal_mask` of the published code, which no layer reads: a copy for each sequence where the batch has a mask."""
    f, s = model.tape, model.seq
    whole = f.new((s, s), dtype, "full")
    mask = f.new((s, s), dtype, "triu")
    del whole
    later = f.new((s,), "int64", "arange"), f.new((s, s), "bool", "gt")
    del later
    if "attention_mask" not in model.batch:
        return mask
    mask = f.new(("b", 1, s, s), dtype, "clone")
    open_keys = f.new(mask.dims, "bool", "eq")
    padding = f.new(mask.dims, "bool", "mul")
    del open_keys
    filled = f.new(mask.dims, dtype, "masked_fill")
    del filled, padding
    return mask

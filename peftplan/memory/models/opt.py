"""OPT: learned positions from a running sum over the mask, norms before or after, queries scaled before attention.

Source: transformers, models/opt/modeling_opt.py.
"""

from __future__ import annotations

from peftplan.errors import NeedsTraceError
from peftplan.memory.activations import activation
from peftplan.memory.calls import inputs
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import masks_of, run_layers
from peftplan.memory.models.style import Call, Style
from peftplan.memory.norms import layer_norm
from peftplan.tape import ops
from peftplan.tape.tensors import Tensor


def opt(model: Model) -> Tensor:
    """`OPTDecoder.forward`."""
    f = model.tape
    tokens = inputs(model)
    f.module = "model.decoder"
    _mask = None if model.running.padding else f.new(("b", model.seq), "fp32", "attention_mask")
    dtype = "int64" if _mask is None else "fp32"
    sums = [f.new(("b", model.seq), dtype, "cumsum"), f.new(("b", model.seq), dtype, "mul")]
    _positions = f.new(("b", model.seq), "int64", "position_ids")
    del sums
    masks = masks_of(model, STYLE, tokens.dtype)
    f.module = "model.decoder.embed_positions"
    positions = model.embedding(f.module, ("b", model.seq), f.new(("b", model.seq), "int64", "position_ids + offset"))
    if model.has("model.decoder.project_in"):
        tokens = model.linear("model.decoder.project_in", tokens)
    f.module = "model.decoder"
    states = [ops.add(f, tokens, positions)]  # no name holds it while the layers run
    x = run_layers(model, STYLE, states, lambda window: (), masks=masks)
    if model.has("model.decoder.final_layer_norm"):
        x = layer_norm(model, "model.decoder.final_layer_norm", x, None)
    if model.has("model.decoder.project_out"):
        x = model.linear("model.decoder.project_out", x)
    del tokens, positions
    return x


def layer(c: Call, x: Tensor) -> Tensor:
    """`OPTDecoderLayer.forward`."""
    if not c.model.has(f"{c.style.stack}.final_layer_norm", c.number):
        raise NeedsTraceError("activations of OPT without affine norms")
    before = c.block.norm_position == "pre"
    residual = x
    if before:
        x = c.norm("self_attn_layer_norm", x)
    x = c.behind("attention", c.module("self_attn", x, attention, by_name=True))
    c.at()
    x = c.dropout(x)
    x = ops.add(c.at(), residual, x)
    if not before:
        x = c.norm("self_attn_layer_norm", x)
    b, s, h = x.dims
    residual = x = ops.reshaped(c.at(), x, (f"{b}·{s}", h))  # tokens of all sequences in one dim
    if before:
        x = c.norm("final_layer_norm", x)
    x = c.linear("fc1", x)
    x = c.module("activation_fn", x, lambda c, x: activation(c.at("activation_fn"), x, c.block.mlp.activation))
    x = c.linear("fc2", x)
    c.at()
    x = c.dropout(x)
    x = ops.reshaped(c.at(), ops.add(c.at(), residual, x), (b, s, h))
    return x if before else c.norm("final_layer_norm", x)


def attention(c: Call, x: Tensor) -> Tensor:
    """`OPTAttention.forward`."""
    a = c.block.attentions[0]
    b, s, _ = x.dims
    by_head = (b, a.num_attention_heads, s, a.head_dim)
    q = c.linear("self_attn.q_proj", x)
    q = ops.scale(c.at("self_attn"), q).view(by_head)
    k = c.linear("self_attn.k_proj", x).view(by_head)
    v = c.linear("self_attn.v_proj", x).view(by_head)
    k, v = c.cached(k, v, rotated=False, at_once=False)
    x = c.attend(q, k, v, rotated=False)
    return c.linear("self_attn.out_proj", x)


STYLE = Style(norm=layer_norm, layer=layer, stack="model.decoder.layers.{}", final_norm=None)

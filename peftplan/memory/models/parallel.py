"""Rotary decoders whose attention and MLP read the layer's input side by side, and StableLM, which can.

The call of a module holds its input until the adapter in its hook has run.

Sources: transformers, models/{cohere,cohere2,stablelm,phi,gptj,gpt_neox}/modeling_*.py.
"""

from __future__ import annotations

from functools import partial

from peftplan.memory.attention_layout import viewed
from peftplan.memory.calls import inputs
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import attention, decoder, drop_embedding, masks_of, run_layers
from peftplan.memory.models.mlps import mlp
from peftplan.memory.models.style import Call, Style
from peftplan.memory.norms import layer_norm, written_layer_norm
from peftplan.memory.units import ROTARY
from peftplan.tape import ops
from peftplan.tape.rotary import partly_rotary, partly_rotary_inline, rotary
from peftplan.tape.shaping import cat, sliced, split
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor


def cohere_layer(c: Call, x: Tensor) -> Tensor:
    """`CohereDecoderLayer.forward`: residual + attention + MLP."""
    residual = x
    x = c.norm("input_layernorm", x)
    attended = c.behind("attention", c.module("self_attn", x, attention, by_name=True))
    out = c.behind("output", c.module("mlp", x, mlp))
    f = c.at()
    return ops.add(f, ops.add(f, residual, attended), out)


def cohere_rotary(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated in fp32."""
    dtype = q.dtype
    q, k = f.to(q, "fp32"), f.to(k, "fp32")
    q_embed = rotary(f, q, cos, sin)
    k_embed = rotary(f, k, cos, sin)
    narrow: Tensor = f.to(q_embed, dtype)
    return narrow, f.to(k_embed, dtype)


def stablelm_layer(c: Call, x: Tensor) -> Tensor:
    """`StableLmDecoderLayer.forward`: serial, or parallel behind one norm; the MLP's output alone is dropped out."""
    residual = x
    x = c.norm("input_layernorm", x)
    attended = c.behind("attention", c.module("self_attn", x, attention, by_name=True))
    if c.block.parallel:
        out = c.behind("output", c.module("mlp", x, mlp))
        f = c.at()
        out = c.dropout(out, "dropout")
        return ops.add(f, ops.add(f, residual, attended), out)
    residual = ops.add(c.at(), residual, attended)
    normed = c.norm("post_attention_layernorm", residual)
    out = c.behind("output", c.module("mlp", normed, mlp))
    del normed
    f = c.at()
    out = c.dropout(out, "dropout")
    return ops.add(f, residual, out)


def phi_layer(c: Call, x: Tensor) -> Tensor:
    """`PhiDecoderLayer.forward`: attention + MLP + residual, both dropped out."""
    residual = x
    x = c.norm("input_layernorm", x)
    attended = c.behind("attention", c.module("self_attn", x, attention, by_name=True))
    attended = c.dropout(attended, "resid_dropout")
    out = c.behind("output", c.module("mlp", x, mlp))
    f = c.at()
    out = c.dropout(out, "resid_dropout")
    return ops.add(f, ops.add(f, attended, out), residual)


def neox_layer(c: Call, x: Tensor) -> Tensor:
    """`GPTNeoXLayer.forward`: two norms; serial or parallel."""
    normed = c.norm("input_layernorm", x)
    attended = c.behind("attention", c.module("attention", normed, neox_attention))
    del normed
    attended = c.dropout(attended, "post_attention_dropout")
    if c.block.parallel:
        normed = c.norm("post_attention_layernorm", x)
        out = c.behind("output", c.module("mlp", normed, mlp))
        del normed
        out = c.dropout(out, "post_mlp_dropout")
        f = c.at()
        return ops.add(f, ops.add(f, out, attended), x)
    attended = ops.add(c.at(), attended, x)
    normed = c.norm("post_attention_layernorm", attended)
    out = c.behind("output", c.module("mlp", normed, mlp))
    del normed
    out = c.dropout(out, "post_mlp_dropout")
    return ops.add(c.at(), out, attended)


def neox_attention(c: Call, x: Tensor) -> Tensor:
    """`GPTNeoXAttention.forward`: each head's q, k and v side by side in one projection."""
    a = c.block.attentions[0]
    qkv = c.linear("attention.query_key_value", x)
    b, s, _ = qkv.dims
    f = c.at("attention")
    qkv = ops.heads(f, qkv, (b, a.num_attention_heads, s, 3 * a.head_dim), clones=True)
    q, k, v = split(f, qkv, [(b, a.num_attention_heads, s, a.head_dim)] * 3)
    cos, sin = c.tables
    q, k = partly_rotary(f, q, k, cos, sin)
    k, v = c.cached(k, v, rotated=True)
    return c.linear("attention.dense", c.attend(q, k, v, rotated=True, split=True))


def gptj_layer(c: Call, x: Tensor) -> Tensor:
    """`GPTJBlock.forward`: attention + MLP + residual."""
    residual = x
    x = c.norm("ln_1", x)
    attended = c.behind("attention", c.module("attn", x, gptj_attention, by_name=True))
    out = c.behind("output", c.module("mlp", x, gptj_mlp))
    f = c.at()
    return ops.add(f, ops.add(f, attended, out), residual)


def gptj_attention(c: Call, x: Tensor) -> Tensor:
    """`GPTJAttention.forward`: heads are rotated before they move in front of the sequence, k first."""
    a = c.block.attentions[0]
    b, s, _ = x.dims
    by_token = (b, s, a.num_attention_heads, a.head_dim)
    by_head = (b, a.num_attention_heads, s, a.head_dim)
    q = viewed(c.model, c.linear("attn.q_proj", x).view(by_token))
    k = viewed(c.model, c.linear("attn.k_proj", x).view(by_token))
    v = c.linear("attn.v_proj", x).view(by_head)
    f = c.at("attn")
    k_rot, k_pass = gptj_parts(c, f, k)
    q_rot, q_pass = gptj_parts(c, f, q)
    k_rot, q_rot = gptj_rotary(c, f, k_rot), gptj_rotary(c, f, q_rot)
    k = cat(f, (k_rot, k_pass), by_token).view(by_head)
    q = cat(f, (q_rot, q_pass), by_token).view(by_head)
    k, v = c.cached(k, v, rotated=True)
    return c.dropout(c.linear("attn.out_proj", c.attend(q, k, v, rotated=True)), "attn.resid_dropout")


def gptj_mlp(c: Call, x: Tensor) -> Tensor:
    """`GPTJMLP.forward`."""
    return c.dropout(mlp(c, x), "mlp.dropout")


def gptj_parts(c: Call, f: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """What is rotated, and the rest."""
    a = c.block.attentions[0]
    assert a.rotary_dim is not None
    rest = a.head_dim - a.rotary_dim
    rot = sliced(f, x, (*x.dims[:3], a.rotary_dim)) if rest else x
    return rot, sliced(f, x, (*x.dims[:3], rest))


def gptj_rotary(c: Call, f: Tape, x: Tensor) -> Tensor:
    """`apply_rotary_pos_emb`: makes its own copies of sines and cosines, each number twice."""
    table = c.tables[0]
    dims = (1, table.dims[1], 1, x.dims[3])
    sin, cos = (f.new(dims, table.dtype, "repeat_interleave") for _ in range(2))
    return rotary(f, x, cos, sin)


def gptj(model: Model) -> Tensor:
    """`GPTJModel.forward`: rows of a table of sines and cosines."""
    f = model.tape
    embedded = inputs(model)
    f.module = "transformer"
    _positions = f.new((model.seq,), "int64", "position_ids")
    masks = masks_of(model, GPTJ, embedded.dtype)
    states = [drop_embedding(model, GPTJ, embedded)]  # no name holds it while the layers run
    rotary_dim = model.arch.blocks[0].attentions[0].rotary_dim
    assert rotary_dim is not None
    model.units.enter(ROTARY)
    table = f.new((1, model.seq, rotary_dim), states[0].dtype, "sines and cosines")
    x = run_layers(model, GPTJ, states, lambda window: (table,), masks=masks)
    del embedded
    return x


GPTJ = Style(
    norm=layer_norm,
    layer=gptj_layer,
    plain=("mlp.fc_in", "mlp.fc_out"),
    stack="transformer.h.{}",
    final_norm="transformer.ln_f",
    dropouts=("transformer.drop", None, None),
    narrow_eager=True,
    wide_scores=True,
)

_COHERE = Style(norm=written_layer_norm, layer=cohere_layer, rotate=cohere_rotary, norms_last=True)
cohere = partial(decoder, style=_COHERE)
cohere2 = partial(decoder, style=_COHERE._replace(both_masks=True))
stablelm = partial(
    decoder,
    style=Style(
        norm=layer_norm,
        layer=stablelm_layer,
        rotate=partly_rotary_inline,
        by_head=True,
        views_last=True,
        qk_norm="each",
        norms_last=True,
        qk_names=("q_layernorm", "k_layernorm"),
    ),
)
phi = partial(
    decoder,
    style=Style(
        norm=layer_norm,
        layer=phi_layer,
        rotate=partly_rotary_inline,
        by_head=True,
        qk_norm="moved",
        norms_last=True,
        qk_names=("q_layernorm", "k_layernorm"),
        output="dense",
        plain=("mlp.fc1", "mlp.fc2"),
        final_norm="model.final_layernorm",
        dropouts=("model.embed_dropout", None, None),
    ),
)
gpt_neox = partial(
    decoder,
    style=Style(
        norm=layer_norm,
        layer=neox_layer,
        by_head=True,
        plain=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        stack="gpt_neox.layers.{}",
        final_norm="gpt_neox.final_layer_norm",
        dropouts=("gpt_neox.emb_dropout", None, None),
    ),
)

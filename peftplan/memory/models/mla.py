"""DeepSeek-V2 and V3: multi-head latent attention.

Letters: a heads, n what of a head is not rotated, r what is, l the rank of the latent keys and values.
Sources: transformers, models/deepseek_v2/modeling_deepseek_v2.py, models/deepseek_v3/modeling_deepseek_v3.py; torch,
csrc/autograd/functions/tensor.cpp (`CopySlices`, `CopyBackwards`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peftplan.memory.attention import attend, eager
from peftplan.memory.calls import inputs, into_cache
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import decoder, masks_of, run_layers
from peftplan.memory.models.moe import deepseek_block, deepseek_v2_route, deepseek_v3_route
from peftplan.memory.models.style import Call, Style, rotate_all
from peftplan.tape import ops
from peftplan.tape.rotary import halves_rotated
from peftplan.tape.shaping import cat, sliced, split
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor

Rotate = Callable[..., tuple[Tensor, Tensor]]
"""Queries, keys and the tables of the model → both rotated."""


def deepseek_v2(model: Model) -> Tensor:
    """`DeepseekV2Model.forward`: one table of complex numbers."""
    tokens = inputs(model)
    f = model.tape
    f.module = "model"
    _positions = f.new((model.seq,), "int64", "position_ids")
    masks = masks_of(model, V2, tokens.dtype)
    f.module = "model.rotary_emb"
    model.angles_made()
    rotations = f.new((1, model.seq, _rotated(model)), "fp32", "freqs_cis")
    x = run_layers(model, V2, tokens, lambda window: (rotations,), masks=masks)
    del tokens
    return x


def _rotated(model: Model) -> int:
    rotary_dim = model.arch.blocks[0].attentions[0].rotary_dim
    assert rotary_dim is not None
    return rotary_dim


def as_complex(f: Tape, q: Tensor, k: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    """V2's `apply_rotary_emb`: both sides in fp32, seen as complex numbers."""
    wide_q, wide_k = f.to(q, "fp32"), f.to(k, "fp32")
    q_out = f.to(_turned(f, wide_q, rotations), q.dtype)
    return q_out, f.to(_turned(f, wide_k, rotations), k.dtype)


def _turned(f: Tape, x: Tensor, rotations: Tensor) -> Tensor:
    return f.new(x.dims, "fp32", "mul", f.record(_turned_backward, (x,), rotations))


def _turned_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    conjugate = f.new(saved[0].dims, "fp32", "resolve_conj")
    out = f.new(g.dims, "fp32", "mul")
    del conjugate
    return out


def interleaved(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """V3's `apply_rotary_pos_emb_interleave`: even and odd numbers of a head are the two halves."""
    cos, sin = (table.view((*table.dims[:-1], _half(table))) for table in (cos, sin))
    q_halves, k_halves = _even_and_odd(f, q), _even_and_odd(f, k)
    q_out = halves_rotated(f, *q_halves, cos, sin, q.dims)
    return q_out, halves_rotated(f, *k_halves, cos, sin, k.dims)


def _even_and_odd(f: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    dims = (*x.dims[:-1], _half(x))
    return sliced(f, x, dims), sliced(f, x, dims)


def _half(x: Tensor) -> int:
    width = x.dims[-1]
    assert isinstance(width, int)
    return width // 2


def attention(c: Call, x: Tensor, *, rotate: Rotate | None = None) -> Tensor:
    """`DeepseekV3Attention.forward`: what is cached is the latent and the rotated part that all heads share."""
    a = c.block.attentions[0]
    heads, r = a.num_attention_heads, a.rotary_dim
    assert r is not None
    q = _queries(c, x)
    b, s, _ = x.dims
    f = c.at("self_attn")
    q = ops.heads(f, q, (b, heads, s, a.head_dim), clones=True)
    q_pass, q_rot = split(f, q, ((b, heads, s, a.head_dim - r), (b, heads, s, r)))
    compressed = c.linear("self_attn.kv_a_proj_with_mqa", x)
    width = compressed.dims[-1]
    assert isinstance(width, int)
    latent, k_rot = split(c.at("self_attn"), compressed, ((b, s, width - r), (b, s, r)))
    latent = c.norm("self_attn.kv_a_layernorm", latent).view((b, 1, s, width - r))
    k_rot = k_rot.view((b, 1, s, r))
    f = c.at("self_attn")
    q_rot, k_rot = (rotate or (interleaved if a.interleaved else rotate_all))(f, q_rot, k_rot, *c.tables)
    latent, k_rot = into_cache(c.model, latent, k_rot)
    q = cat(f, (q_pass, q_rot), q.dims)
    k, v = _expanded(c, latent, k_rot)
    dropout = c.model.arch.dropout.attention
    if c.model.running.attention == "eager":
        x = eager(c.model, a, q, k, v, c.mask, dropout=dropout, joined=True)
    else:
        x = attend(c.model, a, q, k, v, c.mask, dropout=dropout, by_head=True)
    return c.linear("self_attn.o_proj", x)


def _queries(c: Call, x: Tensor) -> Tensor:
    """Through a low rank of their own, or not."""
    if not c.model.has(f"{c.style.stack}.self_attn.q_a_proj", c.number):
        return c.linear("self_attn.q_proj", x)
    return c.linear("self_attn.q_b_proj", c.norm("self_attn.q_a_layernorm", c.linear("self_attn.q_a_proj", x)))


def _expanded(c: Call, latent: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """`expand_kv`: keys are written into a tensor of their own, values are a slice of the projection."""
    a = c.block.attentions[0]
    heads, d, r, v = a.num_attention_heads, a.head_dim, k_rot.dims[3], a.value_head_dim
    assert isinstance(r, int)
    assert v is not None
    both = c.linear("self_attn.kv_b_proj", latent)
    f = c.at("self_attn")
    b, _, s, _ = both.dims
    both = ops.heads(f, both, (b, heads, s, d - r + v), clones=True)
    k_pass, values = split(f, both, ((b, heads, s, d - r), (b, heads, s, v)))
    k_rot = ops.expanded(f, k_rot, (b, heads, s, r))
    keys = f.new((b, heads, s, d), both.dtype, "new_empty")
    keys = written(f, keys, k_pass)
    return written(f, keys, k_rot), values


def written(f: Tape, base: Tensor, part: Tensor) -> Tensor:
    """`base[…].copy_(part)`: keeps nothing."""
    node = f.record(_written_backward, (base, part), part.dims, part.dtype)
    return Tensor(base.storage, base.dims, base.dtype, node)


def _written_backward(f: Tape, node: Node, saved: tuple[Dims, str], g: Tensor) -> Gradients:
    """A copy of the gradient, in which what was overwritten gets zeros; another copy for what was written."""
    dims, dtype = saved
    to_base = f.new(g.dims, g.dtype, "clone")
    to_part = f.new(dims, g.dtype, "clone")
    if node.edges[0]:
        zeros = f.new(dims, g.dtype, "zeros")
        narrow: Tensor = f.to(to_part, dtype)
        del zeros
    else:
        narrow = f.to(to_part, dtype)
    return to_base if node.edges[0] else None, narrow if node.edges[1] else None


V2 = Style(
    attention=partial(attention, rotate=as_complex),
    mixture=partial(deepseek_block, route=deepseek_v2_route),
)
V3 = Style(attention=attention, mixture=partial(deepseek_block, route=deepseek_v3_route))

deepseek_v3 = partial(decoder, style=V3)

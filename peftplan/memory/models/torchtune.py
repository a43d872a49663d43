"""Decoders as torchtune builds them, of modules of its own. Weights have transformers' names here.

Source: torchtune at bd2a0fc7, modules/{transformer,attention,feed_forward,rms_norm,position_embeddings}.py,
models/qwen2/_positional_embeddings.py, models/gemma/rms_norm.py, models/gemma2/_attention.py,
models/phi3/_position_embeddings.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from peftplan.arch.blocks import Attention
from peftplan.memory.attention import attend
from peftplan.memory.attention_layout import gathered, product, repeat_kv
from peftplan.memory.calls import inputs
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.mlps import mlp
from peftplan.memory.models.style import Call, Norm, Style
from peftplan.memory.norms import rms_plus_one
from peftplan.tape import ops
from peftplan.tape.norms import rms_normed
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

Rotate = Callable[[Tape, Tensor], Tensor]


class Layer(Protocol):
    """A layer of one family."""

    def __call__(self, c: Call, x: Tensor, *, rotate: Rotate) -> Tensor:
        """Its forward."""


def torchtune(model: Model, *, rotate: Rotate, norm: Norm, layer: Layer | None = None) -> Tensor:
    """`TransformerDecoder.forward` up to its output layer: without a mask, with rotary tables that are buffers."""
    style = Style(norm=norm, layer=partial(layer or _layer, rotate=rotate))
    return run_layers(model, style, [inputs(model)], lambda _: (), masks={})


def _layer(c: Call, x: Tensor, *, rotate: Rotate) -> Tensor:
    """`TransformerSelfAttentionLayer.forward`."""
    h = c.norm("input_layernorm", x)
    attn_out = _attention(c, h, rotate)
    h = ops.add(c.at(), attn_out, x)
    mlp_out = mlp(c, c.norm("post_attention_layernorm", h))
    return ops.add(c.at(), h, mlp_out)


def _attention(c: Call, x: Tensor, rotate: Rotate) -> Tensor:
    """`MultiHeadAttention.forward`: keys and values are repeated for each query head."""
    a, f = c.block.attentions[0], c.tape
    grouped = a.num_attention_heads != a.num_key_value_heads
    q = rotate(f, _by_head(c, a.num_attention_heads, c.linear("self_attn.q_proj", x)))
    q = c.norm("self_attn.q_norm", q) if a.qk_norm else q
    k = c.linear("self_attn.k_proj", x)
    v = c.linear("self_attn.v_proj", x)
    # the sum over a group of heads lies head by head, and all that follows it but `select_backward` keeps that order
    k = rotate(f, _by_head(c, a.num_key_value_heads, k, clones=grouped and rotate is rotated_halves))
    v = _by_head(c, a.num_key_value_heads, v, clones=grouped)
    k = c.norm("self_attn.k_norm", k) if a.qk_norm else k
    if grouped:
        k = _repeated(f, a, k)
        v = _repeated(f, a, v)
    x = attend(c.model, a._replace(num_key_value_heads=a.num_attention_heads), q, k, v)
    return c.linear("self_attn.o_proj", x)


def _by_head(c: Call, heads: int, x: Tensor, *, clones: bool = False) -> Tensor:
    batch, seq, _ = x.dims
    return ops.heads(c.tape, x, (batch, heads, seq, c.block.attentions[0].head_dim), clones=clones)


def _repeated(f: Tape, a: Attention, x: Tensor) -> Tensor:
    """`unsqueeze(2).expand(…).flatten(1, 2)`: a copy, of a single head a view."""
    if a.num_key_value_heads > 1:
        return repeat_kv(f, x, a)
    batch, _, seq, width = x.dims
    return ops.expanded(f, x, (batch, a.num_attention_heads, seq, width))


def rms(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`RMSNorm.forward`: normed in fp32, cast back, times the weight; up to release 0.6.1 cast back after the weight."""
    f, weight = model.tape, model.part(name, layer).own_weight
    f.module = name
    if model.running.loss == "torchtune-chunked":
        wide = f.to(x, "fp32")
        product = ops.mul(f, rms_normed(f, wide), weight)
        del wide
        return f.to(product, x.dtype)
    wide = f.to(x, "fp32")  # stays alive until this returns
    normed = f.to(rms_normed(f, wide), x.dtype)
    return ops.mul(f, normed, weight)


def rotated_pairs(f: Tape, x: Tensor) -> Tensor:
    """`RotaryPositionalEmbeddings.forward`, in fp32: adjacent numbers of a head are a pair. The table is a buffer."""
    wide = f.to(x, "fp32")
    return f.to(_turned(f, wide), x.dtype)


def _turned(f: Tape, x: Tensor) -> Tensor:
    half = (*x.dims[:-1], _half(x))
    node = f.record(_turned_backward, (x,))
    numbers = []
    for op in ("sub", "add"):
        products = f.new(half, x.dtype, "mul"), f.new(half, x.dtype, "mul")
        numbers.append(f.new(half, x.dtype, op))
        del products
    out = f.new(x.dims, x.dtype, "stack", node)
    numbers.clear()
    return out


def _turned_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    """Each of four products takes a `select` of x, whose gradient is whole; three are added into the first in place."""
    half = (*g.dims[:-1], _half(g))
    product = f.new(half, g.dtype, "mul")
    total = f.new(g.dims, g.dtype, "select_backward")
    del product
    for subtracted in (False, True, False):
        negated = f.new(half, g.dtype, "neg") if subtracted else None
        product = f.new(half, g.dtype, "mul")
        del negated
        more = f.new(g.dims, g.dtype, "select_backward")
        del product, more
    return total


def rotated_halves(f: Tape, x: Tensor) -> Tensor:
    """`Qwen2RotaryPositionalEmbeddings.forward`: each call casts its rows of the table, and saves both casts."""
    row = (1, x.dims[2], 1, x.dims[3])
    cos, sin = (None, None) if x.dtype == "fp32" else (f.new(row, x.dtype, name) for name in ("cos", "sin"))
    negated = f.new((*x.dims[:-1], _half(x)), x.dtype, "neg")
    turned = f.new(x.dims, x.dtype, "cat")
    del negated
    node = f.record(_halves_backward, (x,), cos, sin)
    products = f.new(x.dims, x.dtype, "mul"), f.new(x.dims, x.dtype, "mul")
    out = f.new(x.dims, x.dtype, "add", node)
    del products, turned
    return out


def _halves_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    by_sin = f.new(g.dims, g.dtype, "mul")
    total = f.new(g.dims, g.dtype, "mul")
    negated = f.new((*g.dims[:-1], _half(g)), g.dtype, "neg")
    more = f.new(g.dims, g.dtype, "slice_backward")  # added into the total in place, like the next
    del negated, more
    more = f.new(g.dims, g.dtype, "slice_backward")
    del by_sin, more
    return total


def rotated_wide_halves(f: Tape, x: Tensor) -> Tensor:
    """`Phi3RotaryPositionalEmbeddings.forward`: products with fp32 rows of the table, cast back."""
    negated = f.new((*x.dims[:-1], _half(x)), x.dtype, "neg")
    turned = f.new(x.dims, x.dtype, "cat")
    del negated
    node = f.record(_wide_halves_backward, (x,), x.dtype)
    products = f.new(x.dims, "fp32", "mul"), f.new(x.dims, "fp32", "mul")
    out = f.new(x.dims, "fp32", "add", node)
    del products
    out = f.to(out, x.dtype)
    del turned
    return out


def _wide_halves_backward(f: Tape, node: Node, saved: tuple[str], g: Tensor) -> Tensor:
    """Each product's fp32 gradient is cast to the dtype of x."""
    (dtype,) = saved
    narrow = []
    for _ in range(2):
        wide = f.new(g.dims, "fp32", "mul")
        narrow.append(f.new(g.dims, dtype, "to"))
        del wide
    by_sin, total = narrow
    narrow.clear()
    negated = f.new((*g.dims[:-1], _half(g)), dtype, "neg")
    more = f.new(g.dims, dtype, "slice_backward")
    del negated, more
    more = f.new(g.dims, dtype, "slice_backward")
    del by_sin, more
    return total


def _half(x: Tensor) -> int:
    width = x.dims[-1]
    assert isinstance(width, int)
    return width // 2


def _gemma2_layer(c: Call, x: Tensor, *, rotate: Rotate) -> Tensor:
    """`TransformerSelfAttentionLayer.forward` with norms behind attention and MLP (`sa_scale`, `mlp_scale`)."""
    attn_out = _gemma2_attention(c, c.norm("input_layernorm", x), rotate)
    h = ops.add(c.at(), c.norm("post_attention_layernorm", attn_out), x)
    mlp_out = mlp(c, c.norm("pre_feedforward_layernorm", h))
    return ops.add(c.at(), h, c.norm("post_feedforward_layernorm", mlp_out))


def _gemma2_attention(c: Call, x: Tensor, rotate: Rotate) -> Tensor:
    """`Gemma2Attention.forward`: plain operations. The mask is fp32 and made anew in each layer, and so are the masked scores."""
    a, f = c.block.attentions[0], c.tape
    q = rotate(f, _by_head(c, a.num_attention_heads, c.linear("self_attn.q_proj", x)))
    k = c.linear("self_attn.k_proj", x)
    v = c.linear("self_attn.v_proj", x)
    k = rotate(f, _by_head(c, a.num_key_value_heads, k))
    v = _by_head(c, a.num_key_value_heads, v)
    if a.num_attention_heads != a.num_key_value_heads:
        k, v = _repeated(f, a, k), _repeated(f, a, v)
    q = Tensor(q.storage, q.dims, q.dtype, f.record(_scaled_view_backward, (q,)))  # `q.mul_`, and q is a view
    scores = product(c.model, q, k, (*q.dims[:3], k.dims[2]), joined=(False, False), transposed=True)
    mask, *_locals = _fp32_masks(f, scores.dims[2:], windowed=bool(a.window))
    scores = ops.scale(f, scores, "div")
    scores = ops.keeps_output(f, scores, "tanh")
    scores = ops.scale(f, scores)
    scores = ops.add(f, scores, mask)
    weights = f.to(ops.softmax(f, scores, "fp32"), q.dtype)
    del scores
    out = gathered(c.model, product(c.model, weights, v, (*q.dims[:3], v.dims[3]), joined=(True, False)))
    return c.linear("self_attn.o_proj", out)


def _scaled_view_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    """`CopySlices`: the whole gradient, of which a copy of the part is scaled."""
    whole = f.new(g.dims, g.dtype, "new_empty_strided")
    part = f.new(g.dims, g.dtype, "clone")
    product = f.new(g.dims, g.dtype, "mul")
    del part, product
    return whole


def _fp32_masks(f: Tape, dims: Dims, *, windowed: bool) -> list[Tensor]:
    """The mask, and the local variables that live as long."""
    ones = f.new(dims, "bool", "ones")
    lower = f.new(dims, "bool", "tril")
    del ones
    inverted = f.new(dims, "bool", "logical_not")
    mask = f.new(dims, "fp32", "where")
    del inverted, lower
    if not windowed:
        return [mask]
    ones = f.new(dims, "fp32", "ones_like")
    triangles = f.new(dims, "fp32", "triu"), f.new(dims, "fp32", "tril")
    seen = f.new(dims, "fp32", "mul")
    del triangles
    is_seen = f.new(dims, "bool", "eq")
    mask = f.new(dims, "fp32", "where")
    del is_seen
    return [mask, ones, seen]


def _capped_at_the_end(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`GemmaRMSNorm`; behind the layers `Gemma2FinalNorm`, which caps the normed states."""
    x, f = rms_plus_one(model, name, x, layer), model.tape
    if layer is not None:
        return x
    x = ops.keeps_output(f, ops.scale(f, x, "div"), "tanh")
    return ops.scale(f, x)


BUILT = {
    "llama": partial(torchtune, rotate=rotated_pairs, norm=rms),
    "mistral": partial(torchtune, rotate=rotated_pairs, norm=rms),
    "qwen2": partial(torchtune, rotate=rotated_halves, norm=rms),
    "qwen3": partial(torchtune, rotate=rotated_halves, norm=rms),
    "phi3": partial(torchtune, rotate=rotated_wide_halves, norm=rms),
    "gemma": partial(torchtune, rotate=rotated_pairs, norm=rms_plus_one),
    "gemma2": partial(torchtune, rotate=rotated_pairs, norm=_capped_at_the_end, layer=_gemma2_layer),
}
"""model type → torchtune's forward of it."""

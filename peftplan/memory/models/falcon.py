"""Falcon 1: attention through torch's own `scaled_dot_product_attention` or eager, with a mask always, rotary or ALiBi, serial or
parallel.

Source: transformers, models/falcon/modeling_falcon.py.
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention
from peftplan.errors import NeedsTraceError
from peftplan.memory.attention import attend
from peftplan.memory.attention_layout import batched, for_all, gathered
from peftplan.memory.calls import inputs, into_cache
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import rotary_tables, run_layers
from peftplan.memory.models.mlps import mlp
from peftplan.memory.models.style import Call, Style, rotate_all
from peftplan.memory.norms import layer_norm
from peftplan.tape import ops, products
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor


def falcon(model: Model) -> Tensor:
    """`FalconModel.forward`."""
    if model.running.attention not in ("sdpa", "eager"):
        raise NeedsTraceError(f"activations of falcon with {model.running.attention} attention")
    f = model.tape
    tokens = inputs(model)
    f.module = "transformer"
    a = model.arch.blocks[0].attentions[0]
    _positions = f.new((model.seq,), "int64", "position_ids")
    every = ("b", 1, model.seq, model.keys)
    dtype = tokens.dtype
    rows = "b" if "attention_mask" in model.batch else 1
    mask = f.new((rows, *every[1:]), "bool", "attention_mask").view(every)
    if model.running.attention == "eager":
        mask = f.new(every, dtype, "attention_mask")
    tables: tuple[Tensor, ...] = ()
    if a.positions == "alibi":
        tables = (f.new(("b", a.num_attention_heads, 1, model.keys), dtype, "alibi"),)
        mask = _alibi_mask(f, mask, a, dtype)
    tables = (*tables, *rotary_tables(model, dtype))
    x = run_layers(model, STYLE, tokens, lambda window: (mask, *tables), masks={None: None})
    del tokens
    return x


def _alibi_mask(f: Tape, mask: Tensor, a: Attention, dtype: str) -> Tensor:
    """The bias where a query sees a key, the least number elsewhere."""
    plain = f.new(mask.dims, dtype, "where") if mask.dtype == "bool" else mask
    scaled = f.new((mask.dims[0], a.num_attention_heads, 1, mask.dims[3]), dtype, "div")
    hidden = f.new(mask.dims, "bool", "lt")
    out = f.new((mask.dims[0], a.num_attention_heads, *mask.dims[2:]), dtype, "masked_fill")
    del plain, scaled, hidden
    return out


def layer(c: Call, x: Tensor) -> Tensor:
    """`FalconDecoderLayer.forward`."""
    residual = x
    two = c.block.parallel and not c.block.shared_norm
    normed = c.norm("ln_attn" if two else "input_layernorm", x)
    into_mlp = c.norm("ln_mlp", x) if two else normed
    attended = c.behind("attention", c.module("self_attention", normed, attention))
    if not c.block.parallel:
        dropped = ops.dropout(c.at(), attended, c.model.arch.dropout.attention)
        residual = ops.add(c.at(), residual, dropped)
        del dropped
        into_mlp = c.norm("post_attention_layernorm", residual)
    out = c.behind("output", c.module("mlp", into_mlp, mlp))
    f = c.at()
    if c.block.parallel:
        out = Tensor(out.storage, out.dims, out.dtype, f.record(_add_in_place_backward, (out, attended)))
    return ops.add(f, residual, c.dropout(out))


def _add_in_place_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Gradients:
    return g, g


def attention(c: Call, x: Tensor) -> Tensor:
    """`FalconAttention.forward`."""
    a = c.block.attentions[0]
    mask, *tables = c.tables
    qkv = c.linear("self_attention.query_key_value", x)
    f = c.at("self_attention")
    q, k, v = heads(c, a, qkv)
    rotated = a.positions == "rotary"
    if rotated:
        q, k = rotate_all(f, q, k, *tables)
    k, v = into_cache(c.model, k, v)
    alike = a._replace(num_key_value_heads=a.num_attention_heads)
    dropout = 0.0 if rotated else c.model.arch.dropout.attention
    if c.model.running.attention == "eager":
        weights, *_kept_alive = (_rotated_weights if rotated else _biased_weights)(c, q, k, x.dtype, mask, *tables)
        return c.linear("self_attention.dense", eager(c, q, v, weights))
    x = attend(c.model, alike, q, k, v, mask, dropout=dropout, rotated=rotated)
    return c.linear("self_attention.dense", x)


def eager(c: Call, q: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """Weighted values; the weights are handed out."""
    rotated = c.block.attentions[0].positions == "rotary"
    weights = weights if rotated else ops.dropout(c.tape, weights, c.model.arch.dropout.attention)
    c.model.layer_locals.append(weights)
    if c.tape.autocast:
        weights, v = c.tape.cast_all(c.tape.autocast, weights, v)
    return gathered(c.model, products.matmul(c.tape, weights, _for_all(c, v), q.dims))


def _rotated_weights(c: Call, q: Tensor, k: Tensor, dtype: str, mask: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """Softmax of scaled scores and mask, in the dtype of the hidden states."""
    f = c.tape
    scores = _divided_in_place(f, _scores(c, q, k))
    return (ops.softmax(f, ops.add(f, scores, mask), dtype),)


def _biased_weights(
    c: Call, q: Tensor, k: Tensor, dtype: str, mask: Tensor, alibi: Tensor, *tables: Tensor
) -> tuple[Tensor, ...]:
    """The same with ALiBi: in fp32, and with three tensors that have names, which live until attention returns."""
    f = c.tape
    unscaled = _scores(c, q, k)
    scores = f.to(unscaled, "fp32")
    logits = _divided_in_place(f, ops.add(f, scores, alibi))
    return ops.softmax(f, ops.add(f, logits, mask), dtype), unscaled, scores, logits


def _scores(c: Call, q: Tensor, k: Tensor) -> Tensor:
    if c.tape.autocast:
        q, k = c.tape.cast_all(c.tape.autocast, q, k)
    return products.matmul(c.tape, batched(c.model, q), _for_all(c, k), (*q.dims[:3], k.dims[2]))


def _for_all(c: Call, x: Tensor) -> Tensor:
    """Keys or values as `matmul` takes them: a single head is copied for all (not for one sequence), others head by head."""
    every = c.block.attentions[0].num_attention_heads
    if x.dims[1] == every:
        return x if c.model.joins else batched(c.model, x)
    return for_all(c.model, x, every)


def _divided_in_place(f: Tape, x: Tensor) -> Tensor:
    return Tensor(x.storage, x.dims, x.dtype, f.record(_divided_backward, (x,)))


def _divided_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "div")


def heads(c: Call, a: Attention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_split_heads`: queries are a view, and so are keys and values of the old architecture with as many heads.

    Else keys and values are copies. The new architecture, which caches them for all queries, broadcasts each head to its queries
    and flattens the two dims: a copy, or a view where one of the dims is one.
    """
    f = c.tape
    b, s, _ = qkv.dims
    by_head = (b, a.num_attention_heads, s, a.head_dim)
    one = (b, a.num_key_value_heads, s, a.head_dim)
    new = a.cached_heads is not None
    if by_head == one and not new:
        q, k, v = (sliced(f, qkv, by_head) for _ in range(3))
        return q, k, v
    q, k, v = sliced(f, qkv, by_head), indexed(f, qkv, one), indexed(f, qkv, one)
    if not new or by_head == one:
        return q, k, v
    if a.num_key_value_heads == 1:
        return q, ops.expanded(f, k, by_head), ops.expanded(f, v, by_head)
    return ops.copied(f, q, "clone"), expanded(f, k, by_head), expanded(f, v, by_head)


def indexed(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`x[..., [-1], :]`: a copy, whose gradient is put into zeros as large as x."""
    return f.new(dims, x.dtype, "index", f.record(_indexed_backward, (x,), x.dims))


def _indexed_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "index_put")


def expanded(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`broadcast_to` and `flatten`: a copy, whose gradient is summed."""
    return f.new(dims, x.dtype, "clone", f.record(_expanded_backward, (x,), x.dims))


def _expanded_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum")


STYLE = Style(
    norm=layer_norm,
    layer=layer,
    plain=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    stack="transformer.h.{}",
    final_norm="transformer.ln_f",
    hands_out_weights=True,
)

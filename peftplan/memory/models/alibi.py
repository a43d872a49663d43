"""BLOOM and MPT: attention of their own, whose scores take a bias that grows with distance (ALiBi).

Sources: transformers, models/{bloom,mpt}/modeling_*.py; torch, derivatives.yaml (`baddbmm`, `masked_fill`).
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.errors import RefusedError
from peftplan.memory.activations import activation
from peftplan.memory.attention_layout import batched, gathered, product
from peftplan.memory.calls import inputs, into_cache
from peftplan.memory.masks import causal_mask
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.style import Call, Style
from peftplan.memory.norms import layer_norm
from peftplan.tape import ops, products
from peftplan.tape.shaping import sliced, split
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor
from peftplan.versions import named


def bloom(model: Model) -> Tensor:
    """`BloomModel.forward`."""
    f = model.tape
    tokens = inputs(model)
    states = [layer_norm(model, "transformer.word_embeddings_layernorm", tokens, None)]  # no name holds it while the layers run
    f.module = "transformer"
    heads = model.arch.blocks[0].attentions[0].num_attention_heads
    alibi = f.new(("b", heads, 1, model.keys), states[0].dtype, "alibi")
    x = run_layers(model, BLOOM, states, lambda window: (alibi,), dtype=tokens.dtype)
    del tokens
    return x


def bloom_layer(c: Call, x: Tensor) -> Tensor:
    """`BloomBlock.forward`."""
    normed = c.norm("input_layernorm", x)
    attended = c.behind("attention", _with_residual(c, "self_attention", normed, x, bloom_attention))
    normed = c.norm("post_attention_layernorm", attended)
    return c.behind("output", _with_residual(c, "mlp", normed, attended, bloom_mlp))


def _with_residual(c: Call, name: str, x: Tensor, residual: Tensor, function: Callable[[Call, Tensor, Tensor], Tensor]) -> Tensor:
    """A module of this layer, which takes the residual too."""
    return c.tape.call(f"{c.style.stack}.{name}", c.number, (), (x, residual), lambda both: function(c, *both))


def bloom_mlp(c: Call, x: Tensor, residual: Tensor) -> Tensor:
    """`BloomMLP.forward`."""
    hidden = c.linear("mlp.dense_h_to_4h", x)
    hidden = c.module("mlp.gelu_impl", hidden, lambda c, x: bloom_gelu(c.at("mlp.gelu_impl"), x))
    out = c.linear("mlp.dense_4h_to_h", hidden)
    c.at("mlp")
    out = c.dropout(out)
    return ops.add(c.at("mlp"), residual, out)


def bloom_attention(c: Call, x: Tensor, residual: Tensor) -> Tensor:
    """`BloomAttention.forward`."""
    a = c.block.attentions[0]
    b, s, _ = x.dims
    by_head = (b, a.num_attention_heads, s, a.head_dim)
    qkv = c.linear("self_attention.query_key_value", x)
    f = c.at("self_attention")
    q, k, v = (sliced(f, qkv, by_head) for _ in range(3))
    k, v = into_cache(c.model, k, v)
    q = batched(c.model, q)
    if not c.model.joins:
        k, v = batched(c.model, k), batched(c.model, v)
    scores = baddbmm(f, c.tables[0], q, k, (b, a.num_attention_heads, s, k.dims[2]))
    weights = scores if c.mask is None else ops.add(f, scores, c.mask)
    probabilities = f.to(ops.softmax(f, weights, "fp32"), q.dtype)
    probabilities = c.module("self_attention.attention_dropout", probabilities, _drop_weights)
    c.model.layer_locals.append(probabilities)
    context = products.matmul(f, probabilities, v, by_head)
    context = gathered(c.model, context)
    out = c.linear("self_attention.dense", context)
    c.at("self_attention")
    out = c.dropout(out)
    return ops.add(c.at("self_attention"), residual, out)


def _drop_weights(c: Call, weights: Tensor) -> Tensor:
    return ops.dropout(c.tape, weights, c.model.arch.dropout.attention)


def baddbmm(f: Tape, alibi: Tensor, q: Tensor, k: Tensor, dims: Dims) -> Tensor:
    """`alibi.baddbmm(q, k)`: keeps both factors. Autocast runs it in its dtype; without it torch takes three tensors of one."""
    if f.autocast:
        q, k = f.cast_all(f.autocast, q, k)
    elif alibi.dtype != q.dtype:
        raise RefusedError(
            f"{named('torch')} refuses it: RuntimeError: Input dtypes must be the same, got: ALiBi's bias in {alibi.dtype}, "
            f"queries and keys in {q.dtype}; accepted: autocast"
        )
    node = f.record(_baddbmm_backward, (q, k), q if k.node else None, k if q.node else None, q.dims, k.dims)
    return f.new(dims, q.dtype, "baddbmm", node)


def _baddbmm_backward(f: Tape, node: Node, saved: tuple[Tensor | None, Tensor | None, Dims, Dims], g: Tensor) -> Gradients:
    grads = []
    for dims, edge in zip(saved[2:], node.edges, strict=True):
        product = f.new(dims, g.dtype, "bmm") if edge else None
        grads.append(None if product is None else f.new(dims, g.dtype, "mul"))
        del product
    return grads


def bloom_gelu(f: Tape, x: Tensor) -> Tensor:
    """`GeLUFunction`: keeps its input alone. `x * 0.5 * (1 + tanh(0.798 * x * (1 + 0.0447 * x * x)))`, an operation at a time."""
    half = f.new(x.dims, x.dtype, "mul")
    tanh = _bloom_tanh(f, x.dims, x.dtype)
    plus = f.new(x.dims, x.dtype, "add")
    del tanh
    out = f.new(x.dims, x.dtype, "mul", f.record(_bloom_gelu_backward, (x,), x))
    del half, plus
    return out


def _bloom_tanh(f: Tape, dims: Dims, dtype: str) -> Tensor:
    scaled, temporary = (f.new(dims, dtype, "mul") for _ in range(2))
    square = f.new(dims, dtype, "mul")
    del temporary
    plus = f.new(dims, dtype, "add")
    del square
    inner = f.new(dims, dtype, "mul")
    del scaled, plus
    tanh = f.new(dims, dtype, "tanh")
    del inner
    return tanh


def _bloom_gelu_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    """`0.5 * x * ((1 - tanh * tanh) * (0.798 + 0.107 * x * x)) + 0.5 * (1 + tanh)`, times g."""

    def new(op: str) -> Tensor:
        return f.new(g.dims, g.dtype, op)

    tanh = _bloom_tanh(f, g.dims, g.dtype)
    half = new("mul")
    square = new("mul")
    rest = new("rsub")
    del square
    scaled = new("mul")
    square = new("mul")
    del scaled
    slope = new("add")
    del square
    product = new("mul")
    del rest, slope
    first = new("mul")
    del half, product
    plus = new("add")
    second = new("mul")
    del plus
    factor = new("add")
    del first, second
    out = new("mul")
    del tanh, factor
    return out


def mpt(model: Model) -> Tensor:
    """`MptModel.forward`: the mask as booleans, the bias of `max_seq_len` positions."""
    f = model.tape
    tokens = inputs(model)
    f.module = "transformer"
    a = model.arch.blocks[0].attentions[0]
    assert a.alibi_length is not None
    alibi = f.new((a.num_attention_heads, 1, a.alibi_length), "fp32", "alibi")
    added = causal_mask(model, tokens.dtype)
    mask = f.new(("b", 1, model.seq, model.seq), "bool", "attention_mask")
    del added
    x = run_layers(model, MPT, tokens, lambda window: (alibi, mask), masks={None: None})
    del tokens
    return x


def mpt_layer(c: Call, x: Tensor) -> Tensor:
    """`MptBlock.forward`."""
    normed = c.norm("norm_1", x)
    attended = c.behind("attention", mpt_attention(c, normed))
    c.at()
    x = ops.add(c.at(), c.dropout(attended), x)
    normed = c.norm("norm_2", x)
    return c.behind("output", mpt_mlp(c, normed, x))


def mpt_mlp(c: Call, x: Tensor, residual: Tensor) -> Tensor:
    """`MptMLP.forward`."""
    x = c.linear("ffn.up_proj", x)
    x = activation(c.at("ffn.act"), x, c.block.mlp.activation)
    out = c.linear("ffn.down_proj", x)
    out = ops.dropout(c.at("ffn"), out, c.model.arch.dropout.hidden)
    return ops.add(c.at("ffn"), out, residual)


def mpt_attention(c: Call, x: Tensor) -> Tensor:
    """`MptAttention.forward`: the scores become fp32 with the bias, and stay so."""
    a = c.block.attentions[0]
    b, s, h = x.dims
    alibi, mask = c.tables
    by_head = (b, a.num_attention_heads, s, a.head_dim)
    qkv = c.linear("attn.Wqkv", x)
    f = c.at("attn")
    parts = split(f, qkv, [(b, s, h)] * 3)
    # the gradient of transposed keys comes transposed, as `reshape` takes it
    q, k, v = (ops.heads(f, part, by_head, clones=clones) for part, clones in zip(parts, (True, False, True), strict=True))
    del parts
    k, v = into_cache(c.model, k, v)
    joined = c.model.joins
    scores = ops.scale(f, product(c.model, q, k, (b, a.num_attention_heads, s, s), joined=(False, joined)))
    scores = ops.add(f, scores, alibi)
    scores = f.new(scores.dims, scores.dtype, "masked_fill", f.record(_masked_backward, (scores,), mask))
    weights = f.to(ops.softmax(f, scores, "fp32"), v.dtype)
    weights = ops.dropout(f, weights, c.model.arch.dropout.attention)
    c.model.layer_locals.append(weights)
    context = product(c.model, weights, v, by_head, joined=(True, joined))
    context = gathered(c.model, context)
    return c.linear("attn.out_proj", context)


def _masked_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "masked_fill")


BLOOM = Style(norm=layer_norm, layer=bloom_layer, stack="transformer.h.{}", final_norm="transformer.ln_f", hands_out_weights=True)
MPT = Style(
    norm=layer_norm, layer=mpt_layer, stack="transformer.blocks.{}", final_norm="transformer.norm_f", hands_out_weights=True
)

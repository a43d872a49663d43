"""gpt-oss: attention with a sink for each head, experts with biases behind a clamped gate.

Letters: a heads, s queries, k keys; `k+1`: the keys and the sink. Source: transformers, models/gpt_oss/modeling_gpt_oss.py;
torch, FunctionsManual.cpp (`clamp_backward`, `value_selecting_reduction_backward`).
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention
from peftplan.memory.attention_layout import gathered, product, repeat_kv
from peftplan.memory.calls import inputs, into_cache
from peftplan.memory.experts import experts, top_k
from peftplan.memory.methods.param_wrapper import Stacked, matrix
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import masks_of, run_layers
from peftplan.memory.models.moe import Routed, check, routed
from peftplan.memory.models.projections import projected
from peftplan.memory.models.style import Call, Style
from peftplan.memory.norms import minus, rms_cast_last
from peftplan.tape import ops, products
from peftplan.tape.rotary import halves_rotated
from peftplan.tape.shaping import cat, sliced, split
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Parameter, Tensor


def gpt_oss(model: Model) -> Tensor:
    """`GptOssModel.forward`: rotary tables as wide as half a head."""
    tokens = inputs(model)
    f = model.tape
    f.module = "model"
    _positions = f.new((model.seq,), "int64", "position_ids")
    masks = masks_of(model, STYLE, tokens.dtype)
    half = (1, model.seq, model.arch.blocks[0].attentions[0].head_dim // 2)
    f.module = "model.rotary_emb"
    model.angles_made()
    tables = f.new(half, tokens.dtype, "cos"), f.new(half, tokens.dtype, "sin")
    x = run_layers(model, STYLE, tokens, lambda window: tables, masks=masks)
    del tokens
    return x


def layer(c: Call, x: Tensor) -> Tensor:
    """`GptOssDecoderLayer.forward`: attention's weights live until the router's scores take their name."""
    residual = x
    x = c.norm("input_layernorm", x)
    x = c.behind("attention", attention(c, x))
    x = ops.add(c.at(), residual, x)
    residual = x
    x = c.norm("post_attention_layernorm", x)
    x, scores = mixture(c, x)
    c.model.layer_locals[:] = [scores]
    return ops.add(c.at(), residual, c.behind("output", x))


def attention(c: Call, x: Tensor) -> Tensor:
    """`GptOssAttention.forward`: FlashAttention takes the sinks as they are."""
    a = c.block.attentions[0]
    flash = c.model.running.attention == "flash_attention_2"
    q, k, v = projected(c, a, x)
    f = c.at("self_attn")
    v = v if flash else ops.heads(f, v, v.dims, clones=True)
    q, k = rotated(f, q, *c.tables), rotated(f, k, *c.tables)
    k, v = into_cache(c.model, k, v)
    out = c.attend(q, k, v, rotated=True) if flash else eager(c, a, q, k, v)
    return c.linear("self_attn.o_proj", out)


def rotated(f: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_apply_rotary_emb`."""
    half = (*x.dims[:-1], cos.dims[-1])
    first, second = split(f, x, (half, half))
    return halves_rotated(f, first, second, cos, sin, x.dims)


def eager(c: Call, a: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`eager_attention_forward`: each row of scores gets its sink, is lowered by its maximum, and loses the sink's share."""
    f, model = c.tape, c.model
    single = a.num_key_value_heads == 1 != a.num_attention_heads  # a view, which `matmul` copies
    keys, values = (repeat_kv(f, x, a, copies=not single) for x in (k, v))
    in_order = not single and (bool(model.caches) or a.num_attention_heads != a.num_key_value_heads)
    dims = (*q.dims[:3], k.dims[2])
    scores = ops.scale(f, product(model, q, keys, dims, joined=(True, not single), spread=single))
    if c.mask is not None:
        scores = ops.add(f, scores, c.mask)
    logits = with_sinks(f, scores, model.part(f"{c.style.stack}.self_attn", c.number).params["sinks"])
    highest, _ = top_k(f, logits, 1)
    logits = minus(f, logits, highest)
    del highest
    shares = ops.softmax(f, logits, logits.dtype)
    weights = f.to(sliced(f, shares, dims), v.dtype)
    del scores
    weights = ops.dropout(f, weights, model.arch.dropout.attention)
    model.layer_locals.append(weights)
    return gathered(model, product(model, weights, values, (*q.dims[:3], v.dims[3]), joined=(True, in_order), spread=single))


def with_sinks(f: Tape, scores: Tensor, sinks: Parameter) -> Tensor:
    """Scores and, behind the last key, the sink of the head."""
    *rows, keys = scores.dims
    column = Tensor(None, (*rows, 1), sinks.dtype, f.record(_column_backward, (sinks,), sinks.dims))
    return cat(f, (scores, column), (*rows, f"{keys}+1"))


def _column_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum")


def route(c: Call, x: Tensor, name: str) -> Routed:
    """`GptOssTopKRouter.forward`: a softmax over the best alone."""
    router = f"{c.style.stack}.{name}"
    f = c.at(name)
    weight, _update = matrix(c.model, router, c.number)
    logits = products.linear(f, x, weight, c.model.part(router, c.number).bias)
    best, indices = top_k(f, logits, c.block.mlp.num_experts_per_tok)
    return logits, ops.softmax(f, best, best.dtype), indices


def mixture(c: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """`GptOssMLP.forward`: the experts' sum, and the router's scores."""
    check(c)
    _logits, scores, indices = routed(c, route, x, "mlp.router")
    f = c.at("mlp.experts")
    params = Stacked(c.model, f"{c.style.stack}.mlp.experts", c.number, transposed=True)
    return experts(f, x, indices, scores, params, gated, kernel=c.model.running.flash, transposed=True), scores


def gated(f: Tape, x: Tensor) -> Tensor:
    """`_apply_gate`: every second column is the gate; both sides are clamped."""
    *rows, width = x.dims
    assert isinstance(width, int)
    half = (*rows, width // 2)
    gate, up = sliced(f, x, half), sliced(f, x, half)
    gate, up = clamped(f, gate, bounds=1), clamped(f, up, bounds=2)
    glu = ops.mul(f, gate, ops.keeps_output(f, ops.scale(f, gate), "sigmoid"))
    return ops.mul(f, ops.shift(f, up), glu)


def clamped(f: Tape, x: Tensor, *, bounds: int) -> Tensor:
    """`clamp`: keeps its input; backward compares it with each bound."""
    return f.new(x.dims, x.dtype, "clamp", f.record(_clamped_backward, (x,), x, bounds))


def _clamped_backward(f: Tape, node: Node, saved: tuple[Tensor, int], g: Tensor) -> Tensor:
    within = [f.new(g.dims, "bool", "le") for _ in range(saved[1])]
    out = f.new(g.dims, g.dtype, "where")
    del within[1:]
    return out


STYLE = Style(norm=rms_cast_last, layer=layer, both_masks=True, by_head=True)

"""Mixtures of experts as NeMo Automodel divides them with DeepEP's exchange of tokens, beside Transformer Engine's attention.

Letters: n tokens of a rank, k experts a token, e experts, W ranks that own them once, h hidden size, i width of an expert. A rank
gets m tokens, each once, and n·k rows of them for its experts, which have dims (b, s, k, …). Sources: nemo_automodel 0.7.0,
components/models/qwen3_moe/{model,layers}.py, components/moe/layers.py (`Gate`, `MoE`), experts.py (`GroupedExpertsDeepEP`,
`GroupedExpertsTE`), parallelizer.py (`apply_ac`); transformer-engine 2.20.2, pytorch/module/{linear,grouped_linear}.py. Left out:
sums of few numbers, and what `memory.models.automodel_exchange` leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peftplan.job.further_tokens import STACK
from peftplan.memory.calls import inputs
from peftplan.memory.experts import taken, top_k
from peftplan.memory.fused_attention import number
from peftplan.memory.model import Model
from peftplan.memory.models.automodel import opaque_rms
from peftplan.memory.models.automodel_adapted import adapted, adapters
from peftplan.memory.models.automodel_balanced import gate_in_turn
from peftplan.memory.models.automodel_chunks import in_chunks
from peftplan.memory.models.automodel_compiled import compiled_attention, compiled_latent
from peftplan.memory.models.automodel_ep import activated as activated_alone
from peftplan.memory.models.automodel_ep import attention as attention_of_torch
from peftplan.memory.models.automodel_ep import divided, gated, rows_of, turned, weighted
from peftplan.memory.models.automodel_ep import gate as corrected_gate
from peftplan.memory.models.automodel_ep import glm4_moe as in_torch
from peftplan.memory.models.automodel_exchange import GPUS_OF_NODE, combined, dispatched, on_own, permuted, received, unpermuted
from peftplan.memory.models.automodel_hybrid import experts as over_hybrid_ep
from peftplan.memory.models.automodel_latent import latent_attention, of_latent
from peftplan.memory.models.automodel_loop import in_a_loop
from peftplan.memory.models.automodel_moe import Activated, by_engine, masked_rows, product_of, projected, rotary_table
from peftplan.memory.models.automodel_moe import experts as of_all_ranks
from peftplan.memory.models.automodel_moe import gate as gate_behind
from peftplan.memory.models.automodel_moe import gpt_oss as with_flex_attention
from peftplan.memory.models.automodel_moe import mixture as of_own_experts
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.llama import in_turn_in_fp32
from peftplan.memory.models.mlps import gated_mlp
from peftplan.memory.models.style import Call, Rotation, Style
from peftplan.memory.te_attention import of_documents
from peftplan.memory.units import experts as experts_of
from peftplan.memory.units import further
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor


def ernie(model: Model) -> Tensor:
    """`Ernie4_5_MoeModel.forward`. Left out: what a softmax in place of a sigmoid and the loss of balance make, some numbers for
    each expert of a token."""
    f, a = model.tape, model.arch.blocks[0].attentions[0]
    f.module = "model.rotary_emb"
    tables = tuple(f.new(("b", model.seq, a.head_dim), "fp32", name) for name in ("cos", "sin"))
    style = HEADS._replace(attention=partial(attention, turn=in_turn_in_fp32), mixture=partial(shared_mixture, after=False))
    return run_layers(model, style, [inputs(model)], lambda _: tables, masks={})


def of_heads(model: Model, style: Style) -> Tensor:
    """`Qwen3MoeModel.forward`, `GptOssModel.forward`."""
    table = rotary_table(model)
    return run_layers(model, style, [inputs(model)], lambda _: (table,), masks={})


def gpt_oss(model: Model) -> Tensor:
    """`GptOssModel.forward`, whose attention is Transformer Engine's where that is installed."""
    kernels = model.running.kernels
    if kernels.dense is None and kernels.exchange is None:
        return with_flex_attention(model)
    if kernels.exchange is None:
        return of_heads(model, HEADS._replace(mixture=of_own_experts))
    divided = over_hybrid_ep if kernels.exchange.hybrid else None
    return of_heads(model, HEADS._replace(mixture=partial(mixture, gate=gate_behind, divided=divided)))


def qwen3_moe(model: Model) -> Tensor:
    """`Qwen3MoeModel.forward`."""
    exchange = model.running.kernels.exchange
    if exchange is None:
        gathers = partial(mixture, divided=in_a_loop)
        return of_heads(model, HEADS._replace(attention=attention_of_torch, mixture=gathers, by_head=True))
    if model.running.kernels.self_attention is not None:
        return of_heads(model, OVER_HYBRID._replace(attention=compiled_attention))
    return of_heads(model, OVER_HYBRID if exchange.hybrid else HEADS)


def minimax_m2(model: Model) -> Tensor:
    """`MiniMaxM2Model.forward`: norms of all heads at once, and no shared experts."""
    exchange = model.running.kernels.exchange
    divided = over_hybrid_ep if exchange is not None and exchange.hybrid else None
    return of_heads(model, HEADS._replace(attention=flat_attention, mixture=partial(mixture, gate=gate_of_sums, divided=divided)))


def gate_of_sums(c: Call, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`Gate.forward` with a sigmoid and a correction."""
    return corrected_gate(c, x)


def flat_attention(c: Call, x: Tensor) -> Tensor:
    """`MiniMaxM2Attention.forward`."""
    a = c.block.attentions[0]
    b, s, _ = x.dims
    heads = {"q": a.num_attention_heads, "k": a.num_key_value_heads, "v": a.num_key_value_heads}
    q, k, v = (c.linear(f"self_attn.{name}_proj", x) for name in heads)
    q, k = c.norm("self_attn.q_norm", q), c.norm("self_attn.k_norm", k)
    q, k, v = (y.view((b, s, heads[name], a.head_dim)) for name, y in zip(heads, (q, k, v), strict=True))
    f = c.at("self_attn")
    q, k = turned(f, q, k, c.tables[0])
    q, k, v = (y.view((b, y.dims[2], s, a.head_dim)) for y in (q, k, v))
    out = of_documents(f, q, k, v, packed=c.model.running.kernels.attention is not None)
    return c.linear("self_attn.o_proj", out.view((b, s, a.num_attention_heads * a.head_dim)))


def layer(c: Call, x: Tensor) -> Tensor:
    """`Block.forward`."""
    attended = (c.style.attention or attention)(c, c.norm("input_layernorm", x))
    x = ops.add(c.at(), x, attended)
    read = c.norm("post_attention_layernorm", x)
    out = (c.style.mixture or mixture)(c, read) if c.block.mlp.variant == "moe" else gated_mlp(c, read)
    return ops.add(c.at(), x, out)


def attention(c: Call, x: Tensor, *, turn: Rotation | None = None) -> Tensor:
    """`Qwen3MoeAttention.forward`, `GptOssAttention.forward`. `turn`: how queries and keys are rotated, if not by a kernel."""
    a = c.block.attentions[0]
    b, s, _ = x.dims
    heads = {"q": a.num_attention_heads, "k": a.num_key_value_heads, "v": a.num_key_value_heads}
    q, k, v = (c.linear(f"self_attn.{name}_proj", x).view((b, s, heads[name], a.head_dim)) for name in heads)
    if a.qk_norm:
        q, k = c.norm("self_attn.q_norm", q), c.norm("self_attn.k_norm", k)
    f = c.at("self_attn")
    q, k = turned(f, q, k, c.tables[0]) if turn is None else turn(f, q, k, *c.tables)[:2]
    q, k, v = (y.view((b, y.dims[2], s, a.head_dim)) for y in (q, k, v))
    offset = c.model.part(f"{c.style.stack}.self_attn", c.number).params["sinks"] if a.sinks else None
    out = of_documents(c.at("self_attn"), q, k, v, packed=c.model.running.kernels.attention is not None, offset=offset)
    return c.linear("self_attn.o_proj", out.view((b, s, a.num_attention_heads * a.head_dim)))


def shared_mixture(
    c: Call, x: Tensor, *, after: bool, divided: Callable[[Call, Tensor, Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """`MoE.forward`: shared experts before those that ranks divide. `after`: the weights of routing multiply their results."""
    _tokens = c.at("mlp").new(x.dims[:-1], "bool", "flatten")
    weights, indices = (corrected_gate if c.model.running.kernels.gate is None else gate_in_turn)(c, x)
    shared = gated_mlp(c, x, "mlp.shared_experts")
    routed = experts(c, x, weights, indices, after=after) if divided is None else divided(c, x, weights, indices)
    return ops.add(c.at("mlp"), routed, shared)


def mixture(
    c: Call,
    x: Tensor,
    *,
    gate: Callable[[Call, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    divided: Callable[[Call, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """`MoE.forward` without shared experts."""
    tokens = c.at("mlp").new(x.dims[:-1], "bool", "flatten")
    in_turn = c.model.running.kernels.gate is not None
    weights, indices = gate_in_turn(c, x) if in_turn else (gate or gate_before)(c, x, tokens)
    return (divided or experts)(c, x, weights, indices)


def gate_before(c: Call, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`Gate.forward` with a softmax before top-k. Recomputation finds the logits and what top-k gave."""
    f, mlp = c.at("mlp.gate"), c.block.mlp
    weight = c.model.part(f"{c.style.stack}.mlp.gate", c.number).own_weight
    (logits,) = f.chosen(lambda: (products.linear(f, x, weight),))
    scores = ops.softmax(f, f.to(logits, "fp32"), "fp32")
    indices = f.chosen(lambda: top_k(f, scores, mlp.num_experts_per_tok))[1]
    weights = taken(f, scores, indices, indices.dims, "gather")
    of_all = scores
    if mlp.router.norm_topk_prob:
        of_row = (*weights.dims[:-1], 1)
        totals = [ops.shift(f, ops.summed(f, y, of_row)) for y in (weights, scores)]
        weights, of_all = divided(f, weights, totals[0]), divided(f, scores, totals[1])
        del totals
    weights = ops.scale(f, weights)
    load, counted = f.new(scores.dims, "int64", "new_zeros"), f.new(x.dims[:-1], "int64", "to")
    del load, counted
    masked = masked_rows(f, of_all, tokens)
    loss = ops.scale(f, ops.summed(f, masked, (scores.dims[-1],)))
    del masked
    weights = Tensor(weights.storage, weights.dims, weights.dtype, f.record(_balanced_backward, (weights, loss), loss.dims))
    return f.to(weights, x.dtype), indices


def _balanced_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Gradients:
    return g, f.new(saved[0], "fp32", "ones_like")


def experts(
    c: Call,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    name: str = "mlp",
    *,
    after: bool = False,
    activated: Activated | None = None,
) -> Tensor:
    """`forward` of the experts: tokens of all ranks in the order of this rank's experts, and back. `after`: weights multiply
    what the experts give; `activated`: what is between their products, of a gate and up if not said."""
    name = f"{name}.experts".removeprefix(".")
    f, units, stack = c.at(name), c.model.units, c.style.stack
    unit = further(stack, divided=True) if stack.startswith(STACK) else experts_of(c.number)
    dims, (x, weights) = x.dims, units.enter_with_all(unit, x, weights)
    params = c.model.part(f"{c.style.stack}.{name}", c.number).params
    up, down = params.get("gate_up_proj") or params["up_proj"], params["down_proj"]
    owned, all_experts = number(up.dims[0]), c.block.mlp.num_experts
    rows, masked = rows_of(c, indices, owned), f.new(indices.dims, "int64", "masked_fill")
    wide = f.to(weights, "fp32")
    ranks = all_experts // owned
    k, nodes = c.block.mlp.num_experts_per_tok, ranks // GPUS_OF_NODE
    reached = all_experts if c.model.running.worst_routing else k  # a choice of all experts reaches each rank
    kernels = c.model.running.kernels
    exchange, in_turn = kernels.exchange, kernels.gate is not None
    assert exchange is not None
    tokens = received(ranks, all_experts, reached, in_turn=in_turn)
    passing = received(nodes, all_experts, reached, in_turn=in_turn) if nodes > 1 else None
    got, of_got, handle = dispatched(f, x, wide, ranks, tokens, replays=exchange.replays, passing=passing)
    routing, of_experts = on_own(f, of_got, owned)
    chosen, probabilities, row_map = permuted(f, got, of_experts, rows)
    c.model.dispatcher[:] = [masked, wide, of_got, routing, of_experts, row_map]
    del masked, wide, of_got, routing, of_experts, got
    offsets = f.new((owned,), "int32", "to")
    if c.model.running.rows_of_experts == "most":
        second = in_chunks(f, params, chosen, probabilities)
        del chosen
    elif "down_proj_bias" in params:
        second, _ = projected(f, params, chosen, probabilities, offsets, few=c.model.running.rows_of_experts == "few")
        del chosen, _
    else:
        product = product_of(f, c.model.running.kernels.experts, offsets)
        factors = adapters(c, f"{c.style.stack}.{name}", owned)
        out = product(chosen, up, up.dims[1])
        out, *_of_up = (out,) if factors is None else adapted(f, product, chosen, out, factors[0])
        _read = chosen if by_engine(c) else None
        del chosen
        after = after and factors is None  # adapted experts multiply before
        ones = f.new(probabilities.dims, "fp32", "ones_like") if after else None
        out = (activated or gated)(f, out, probabilities) if ones is None else activated_alone(f, out, ones)
        second = product(out, down, down.dims[1])
        second, *_of_down = (second,) if factors is None else adapted(f, product, out, second, factors[1])
        _activated = out if by_engine(c) else None
        del out
        if after:
            second = weighted(f, second, probabilities)
    back = unpermuted(f, second, tokens, row_map)
    del second, row_map
    return units.leave(unit, combined(f, back, dims, handle))


def deepseek_v3(model: Model) -> Tensor:
    """`DeepseekV3Model.forward`, whose ranks gather all tokens without an exchange."""
    style = LATENT._replace(mixture=partial(shared_mixture, after=False))
    exchange, in_turn = model.running.kernels.exchange, model.running.kernels.gate is not None
    if exchange is None or exchange.hybrid:
        divided = over_hybrid_ep if exchange is not None else in_a_loop if in_turn else partial(of_all_ranks, between=gated)
        style = style._replace(mixture=partial(shared_mixture, after=False, divided=divided))
    compiled = model.running.kernels.self_attention is not None
    return of_latent(model, style._replace(attention=compiled_latent) if compiled else style)


def glm4_moe(model: Model) -> Tensor:
    """`Glm4MoeModel.forward`, of which `automodel_ep` has torch's layers."""
    if model.running.kernels.dense is None:
        return in_torch(model)
    divided = partial(over_hybrid_ep, after=True)
    return of_heads(model, HEADS._replace(mixture=partial(shared_mixture, after=True, divided=divided)))


HEADS = Style(norm=opaque_rms, layer=layer)
OVER_HYBRID = HEADS._replace(mixture=partial(mixture, divided=over_hybrid_ep))
LATENT = Style(norm=opaque_rms, layer=layer, attention=latent_attention)
SPARSE = LATENT._replace(mixture=partial(shared_mixture, after=False, divided=over_hybrid_ep))
FORWARDS: dict[str, Callable[[Model], Tensor]] = {
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
    "minimax_m2": minimax_m2,
    "glm4_moe_lite": partial(of_latent, style=LATENT._replace(mixture=partial(shared_mixture, after=True))),
    "deepseek_v3": deepseek_v3,
    "ernie4_5_moe": ernie,
    "glm_moe_dsa": partial(of_latent, style=SPARSE),
}
"""Model type → the tool's forward of it."""

"""Mixtures of experts as NeMo Automodel builds and divides them: attention of torch, HybridEP's exchange of tokens.

Letters: n tokens of a rank, k experts a token, e experts, W ranks that own them once, h hidden size, i width of an expert. Under
balanced routing a rank gets n·k rows, which have dims (b, s, k, …). Sources: nemo_automodel 0.7.0,
components/models/glm4_moe/{model,layers}.py, components/moe/layers.py (`Gate`, `MoE`), experts.py (`GroupedExpertsDeepEP`),
optimized_ops.py, megatron/{fused_indices_converter,token_dispatcher,fused_a2a,moe_utils}.py; DeepEP at 94a9f8f6 (hybrid-ep),
csrc/hybrid_ep/hybrid_ep.cu and executor/executor.cu. Left out: HybridEP's buffers for what ranks send, which it takes from CUDA
itself, beside torch's allocator.
"""

from __future__ import annotations

from peftplan.ledger import Dim
from peftplan.memory.calls import inputs
from peftplan.memory.experts import grouped, taken, top_k
from peftplan.memory.fused_attention import number
from peftplan.memory.model import Model
from peftplan.memory.models.automodel import opaque_rms
from peftplan.memory.models.automodel_moe import rotary_table
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.mlps import gated_mlp
from peftplan.memory.models.style import Call, Style
from peftplan.memory.units import experts as experts_of
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

CHUNK = 8192
"""Rows that the weights of routing multiply at once (`_RW_CHUNK_ROWS`), where they are more than `job.automodel.ROWS_AT_ONCE`."""
GPUS_OF_NODE = 8
"""Ranks that HybridEP reaches by NVLink."""
BLOCK = 64
"""Tokens of a chunk of HybridEP's (`NUM_OF_TOKENS_PER_CHUNK_PREPROCESSING_API`)."""


def glm4_moe(model: Model) -> Tensor:
    """`Glm4MoeModel.forward`."""
    table = rotary_table(model)
    return run_layers(model, STYLE, [inputs(model)], lambda _: (table,), masks={})


def last_map(model: Model) -> list[Tensor]:
    """Which experts the tokens of the last layer go to, and their weights: the dispatcher of all layers holds them."""
    dims: Dims = ("b", model.seq, model.arch.blocks[-1].mlp.num_experts)
    model.tape.module = "model.layers.{}.mlp.experts"
    return [model.tape.new(dims, dtype, name) for dtype, name in (("bool", "last map"), ("fp32", "last weights"))]


def layer(c: Call, x: Tensor) -> Tensor:
    """`Block.forward`."""
    attended = attention(c, c.norm("input_layernorm", x))
    x = ops.add(c.at(), x, attended)
    read = c.norm("post_attention_layernorm", x)
    out = mixture(c, read) if c.block.mlp.variant == "moe" else gated_mlp(c, read)
    return ops.add(c.at(), x, out)


def attention(c: Call, x: Tensor) -> Tensor:
    """`Glm4MoeAttention.forward`: the arguments of attention are copies, and so is its result."""
    a = c.block.attentions[0]
    b, s, _ = x.dims
    heads = {"q": a.num_attention_heads, "k": a.num_key_value_heads, "v": a.num_key_value_heads}
    q, k, v = (c.linear(f"self_attn.{name}_proj", x) for name in heads)
    f = c.at("self_attn")
    q, k = (y.view((b, s, heads[name], a.head_dim)) for name, y in (("q", q), ("k", k)))
    v = ops.heads(f, v, (b, s, heads["v"], a.head_dim), clones=True)
    if a.qk_norm:
        q, k = c.norm("self_attn.q_norm", q), c.norm("self_attn.k_norm", k)
    q, k = turned(c.at("self_attn"), q, k, c.tables[0])
    q, k, v = (ops.copied(f, y, "contiguous", (b, y.dims[2], s, a.head_dim), viewed=False) for y in (q, k, v))
    return c.linear("self_attn.o_proj", c.attend(q, k, v, rotated=True))


def turned(f: Tape, q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """`_compiled_apply_rotary_emb_qk`: keeps both sides of the table in the dtype of q, or the table where it has that."""
    half, width = (*table.dims[:-1], number(table.dims[-1]) // 2), number(table.dims[-1])
    kept = (table,) if table.dtype == q.dtype else (f.new(half, q.dtype, name) for name in ("cos", "sin"))
    node = f.record(_turned_backward, (q, k), width, *kept)
    out = f.new(q.dims, q.dtype, "rotary", node), f.new(k.dims, k.dtype, "rotary")
    return out[0], Tensor(out[1].storage, k.dims, k.dtype, node, 1)


def _turned_backward(f: Tape, node: Node, saved: tuple[int, Tensor], g: Tensor, h: Tensor) -> Gradients:
    """The gradients come by heads, and are copied first; k before q, each beside what is turned of it."""
    copies, width = [f.new(x.dims, x.dtype, "contiguous") for x in (g, h)], saved[0]
    grads = []
    while copies:
        x = copies.pop()
        part = None if x.dims[-1] == width else f.new((*x.dims[:-1], width), x.dtype, "turned")
        grads.append(f.new(x.dims, x.dtype, "rotary"))
        del part, x
    return grads[1], grads[0]


def mixture(c: Call, x: Tensor) -> Tensor:
    """`MoE.forward`: shared experts before those that ranks divide."""
    f = c.at("mlp")
    _tokens = f.new(x.dims[:-1], "bool", "flatten")
    weights, indices = gate(c, x)
    shared = gated_mlp(c, x, "mlp.shared_experts")
    units, unit = c.model.units, experts_of(c.number)
    read, of_experts = units.enter_with_all(unit, x, weights)
    out = experts(c, read, of_experts, indices)
    del read, of_experts
    return ops.add(c.at("mlp"), units.leave(unit, out), shared)


def gate(c: Call, x: Tensor, name: str = "mlp", *, counts: bool = True) -> tuple[Tensor, Tensor]:
    """`Gate.forward` with a sigmoid, in fp32: weights that sum to one, and, if it `counts`, the load of each expert, summed up to
    the step."""
    f, mlp = c.at(f"{name}.gate"), c.block.mlp
    weight = c.model.part(f"{c.style.stack}.{name}.gate", c.number).own_weight
    _logits = _logits_in_fp32(f, x, weight)
    scores = ops.keeps_output(f, _logits, "sigmoid")
    corrected, indices = _chosen(f, scores, mlp.num_experts_per_tok)
    weights = taken(f, scores, indices, indices.dims, "gather")
    if mlp.router.norm_topk_prob:
        weights = divided(f, weights, ops.shift(f, ops.summed(f, weights, (*weights.dims[:-1], 1))))
        _normed = f.new(scores.dims, "fp32", "div")
    weights = ops.scale(f, weights)
    del corrected
    if counts:
        load, counted = f.new(scores.dims, "int64", "new_zeros"), f.new(x.dims[:-1], "int64", "to")
        del load, counted
    return weights, indices


def _logits_in_fp32(f: Tape, x: Tensor, weight: Operand) -> Tensor:
    """Scores of each expert, which recomputation finds (parallelizer.py, `apply_ac`)."""
    wide, own = f.to(x, "fp32"), f.to(weight, "fp32")
    return f.chosen(lambda: (products.linear(f, wide, own),))[0]


def _chosen(f: Tape, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Corrected scores, and the k largest of each token, which recomputation finds."""
    corrected = f.new(scores.dims, "fp32", "add")
    return corrected, f.chosen(lambda: top_k(f, corrected, k))[1]


def divided(f: Tape, x: Tensor, by: Tensor) -> Tensor:
    """`x / by`, one number for each row of x: keeps both."""
    return f.new(x.dims, x.dtype, "div", f.record(_divided_backward, (x, by), x, by))


def _divided_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Gradients:
    quotient = f.new(g.dims, g.dtype, "div")
    again, negative = f.new(g.dims, g.dtype, "div"), f.new(g.dims, g.dtype, "neg")
    by_row = f.new(g.dims, g.dtype, "mul")
    del negative, again, quotient
    return f.new(g.dims, g.dtype, "div"), f.new(saved[1].dims, by_row.dtype, "sum")


def experts(c: Call, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """`GroupedExpertsDeepEP.forward`: rows of other ranks in the order of this rank's experts, and back."""
    f = c.at("mlp.experts")
    params = c.model.part(f"{c.style.stack}.mlp.experts", c.number).params
    up, down = params["gate_up_proj"], params["down_proj"]
    owned, all_experts = number(up.dims[0]), c.block.mlp.num_experts
    rows, masked = rows_of(c, indices, owned), f.new(indices.dims, "int64", "masked_fill")
    weights = on_all(f, weights, all_experts)
    layout = exchange(f, x, owned, ranks=all_experts // owned)
    c.model.lingering += layout  # the dispatcher holds the last layer's `dispatched_probs`, and so the graph
    chosen, probabilities = dispatched(f, x, weights, layout, rows)
    del masked, weights
    ones = f.new((*rows, 1), "fp32", "ones_like")
    offsets = f.new((owned,), "int32", "to")
    out = grouped(f, chosen, up, up.dims[1], kernel=True, bias=None, offsets=offsets)
    del chosen
    out = activated(f, out, ones)
    second = grouped(f, out, down, down.dims[1], kernel=True, bias=None, offsets=offsets)
    del out
    return combined(f, weighted(f, second, probabilities), layout, x.dims)


def rows_of(c: Call, indices: Tensor, owned: int) -> Dims:
    """Rows of a rank's experts: one for each choice of its own tokens in balance; at worst one for each of its experts to which a
    token of any rank can go."""
    *tokens, k = indices.dims
    if not c.model.running.worst_routing:
        return indices.dims
    return (*tokens, c.block.mlp.num_experts // owned * min(number(k), owned))


def on_all(f: Tape, weights: Tensor, experts: int) -> Tensor:
    """`IndicesToMultihot`: keeps where each weight was. The dispatcher of all layers holds the last map and weights."""
    dims = (*weights.dims[:-1], experts)
    marks = f.new(dims, "bool", "multihot")
    node = f.record(_on_all_backward, (weights,), weights.dims)
    out = f.new(dims, "fp32", "multihot", node)
    f.keep(node, f.new(dims, "int32", "position map"))
    del marks
    return out


def _on_all_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor], g: Tensor) -> Tensor:
    marks = f.new(g.dims, "bool", "zeros")
    out = f.new(saved[0], g.dtype, "multihot")
    del marks
    return out


def exchange(f: Tape, x: Tensor, owned: int, *, ranks: int) -> tuple[Tensor, ...]:
    """`metadata_preprocess_core`: where each token goes and comes from, of which both exchanges keep what they need."""
    b, s, _ = x.dims
    nodes = -(-ranks // GPUS_OF_NODE)
    blocks: Dim = f"{s}/{BLOCK}" if isinstance(s, str) else -(-s // BLOCK)
    everywhere = f.new((b, s, ranks, owned * ranks), "bool", "all-gather of the routing")
    layout = (
        f.new((b, s, ranks), "int32", "sparse to dense"),
        f.new((b, s, nodes), "bool", "to ranks of other nodes"),
        f.new((b, s, max(1, nodes - 1)), "bool", "from ranks of other nodes"),
        f.new((b, s, ranks, owned), "bool", "routing of own experts"),
        f.new((b, blocks, ranks), "int32", "layout of chunks"),
        f.new((b, s, ranks, owned), "int32", "dense to expert"),
    )
    del everywhere
    return layout


def dispatched(f: Tape, x: Tensor, weights: Tensor, layout: tuple[Tensor, ...], rows: Dims) -> tuple[Tensor, Tensor]:
    """`HybridEPDispatch`: a row for each expert of each token, and its weight."""
    node = f.record(_dispatched_backward, (x, weights), x.dims, weights.dims, layout)
    out = f.new((*rows, x.dims[-1]), x.dtype, "dispatch", node)
    of_rows = f.new(rows, "fp32", "dispatched weights")
    if node is not None:
        node.in_python = True
    return out, Tensor(of_rows.storage, (*rows, 1), "fp32", node, 1)


def _dispatched_backward(f: Tape, node: Node, saved: tuple[Dims, Dims, object], g: Tensor, h: Tensor | None = None) -> Gradients:
    """Weights that nothing read behind the exchange have a gradient of zeros."""
    h = f.new(g.dims[:-1], "fp32", "zeros") if h is None else h
    return f.new(saved[0], g.dtype, "combine"), f.new(saved[1], "fp32", "combine")


def combined(f: Tape, x: Tensor, layout: tuple[Tensor, ...], dims: Dims) -> Tensor:
    """`HybridEPCombine`: the sum of what a token's experts add."""
    return f.new(dims, x.dtype, "combine", f.record(_combined_backward, (x,), x.dims, layout))


def _combined_backward(f: Tape, node: Node, saved: tuple[Dims, object], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "dispatch")


def activated(f: Tape, x: Tensor, weights: Tensor) -> Tensor:
    """`WeightedSwiGLUFunction`, compiled, with weights that need no gradient: keeps gate and up, and the weights."""
    *rows, wide = x.dims
    node = f.record(_activated_backward, (x,), x.detach(), weights.detach())
    return f.new((*rows, number(wide) // 2), x.dtype, "swiglu", node)


def _activated_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, g.dtype, "dx")


def gated(f: Tape, x: Tensor, weights: Tensor) -> Tensor:
    """`WeightedSwiGLUFunction`, compiled: keeps gate and up, and the weights."""
    *rows, wide = x.dims
    node = f.record(_gated_backward, (x, weights), x.detach(), weights.detach())
    return f.new((*rows, number(wide) // 2), x.dtype, "swiglu", node)


def _gated_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Gradients:
    return f.new(saved[0].dims, g.dtype, "dx"), f.new(saved[1].dims, "fp32", "sum")


def weighted(f: Tape, x: Tensor, weights: Tensor) -> Tensor:
    """`_RouterWeightMulFunction`: products in fp32, chunk by chunk; once it returns, it keeps both, or the weights alone if they
    have no gradient."""
    alone = weights.node is None
    node = f.record(_weighted_backward, (x,) if alone else (x, weights))
    out = f.new(x.dims, x.dtype, "empty", node)
    chunk = (CHUNK, x.dims[-1])
    wide, product = f.new(chunk, "fp32", "to"), f.new(chunk, "fp32", "mul")
    del wide
    narrow = f.new(chunk, x.dtype, "to")
    del product, narrow
    f.keep(node, x.dtype, None if alone else x.detach(), weights.detach())
    return out


def _weighted_backward(f: Tape, node: Node, saved: tuple[str, Tensor | None, Tensor], g: Tensor) -> Gradients:
    """A chunk of the gradient in fp32 lives until the next one is there."""
    dtype, x, weights = saved
    of_x, of_weights = f.new(g.dims, dtype, "empty"), None if x is None else f.new(weights.dims, "fp32", "empty_like")
    chunk = (CHUNK, g.dims[-1])
    for _ in "first", "next":
        wide = f.new(chunk, "fp32", "to")
        product = f.new(chunk, "fp32", "mul")
        narrow = f.new(chunk, g.dtype, "to")
        del product, narrow
        if of_weights is None:
            continue
        other, product = f.new(chunk, "fp32", "to"), f.new(chunk, "fp32", "mul")
        del other
        total = f.new((CHUNK, 1), "fp32", "sum")
        del product, total
    del wide
    return (of_x,) if of_weights is None else (of_x, of_weights)


STYLE = Style(norm=opaque_rms, layer=layer, by_head=True)

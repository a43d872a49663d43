"""gpt-oss as NeMo Automodel builds it on one GPU without Transformer Engine: FlexAttention, and experts of grouped products.

Letters: n tokens, k experts a token, e experts, h hidden size, i width of an expert. Rows sorted by expert have dims
(b, s, k, …). Source: nemo_automodel 0.7.0, components/models/gpt_oss/model.py, layers.py and rope_utils.py,
components/attention/flex_attention.py, components/moe/layers.py (`Gate`, `MoE`) and experts.py (`GroupedExperts`); torch,
_inductor/kernel/flex. What torch compiles there allocates as the rehearsals in tests/rehearse/automodel.jsonl recorded it.
Left out: what Triton's autotuner takes in the first step, and the masks of which it makes those of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from peftplan.job.kernel_facts import Projections
from peftplan.ledger import Dim
from peftplan.memory import te_float8
from peftplan.memory.calls import inputs
from peftplan.memory.experts import grouped, taken, to_local, top_k
from peftplan.memory.fused_attention import FLASH_BLOCK, blocks, number
from peftplan.memory.model import Model
from peftplan.memory.models.automodel import opaque_rms
from peftplan.memory.models.automodel_biased import added_at_once
from peftplan.memory.models.automodel_chunks import CHUNK
from peftplan.memory.models.automodel_gathered import gathered, summed
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.style import Call, Style
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

Activated = Callable[[Tape, Tensor, Tensor], Tensor]
"""What the first product gives, and the weights of its rows → what the second one takes."""


def gpt_oss(model: Model) -> Tensor:
    """`GptOssModel.forward`."""
    table = rotary_table(model)
    return run_layers(model, STYLE, [inputs(model)], lambda _: (table,), masks={})


def rotary_table(model: Model) -> Tensor:
    """`position_ids_to_freqs_cis`: one table of cosines and sines in fp32."""
    f, a = model.tape, next(a for block in model.arch.blocks for a in block.attentions)
    width = a.rotary_dim or a.head_dim
    f.module = "model"
    _positions = f.new((model.seq,), "int64", "position_ids")
    f.module = "model.rotary_emb"
    half: Dims = ("b", model.seq, width // 2)
    positions = f.new(("b", model.seq), "fp32", "to")
    angles = f.new(half, "fp32", "einsum")
    del positions
    sides = []
    for name in ("cos", "sin"):
        side = f.new(half, "fp32", name)
        sides.append(f.new(half, "fp32", f"{name} * concentration"))
        del side
    table = f.new((*half[:-1], width), "fp32", "cat")
    del angles, sides
    return table


def masks(model: Model) -> list[Tensor]:
    """`FlexAttention.block_masks`, for each kind of attention: four lists of a head's blocks, and how long each list is."""
    f, a = model.tape, model.arch.blocks[0].attentions[0]
    of_head: Dims = ("b", a.num_attention_heads, blocks("s", FLASH_BLOCK))
    kinds = len({block.attentions[0].window for block in model.arch.blocks})
    f.module = "model.layers.{}.self_attn"
    sizes = ((of_head, "number of blocks"), ((*of_head, of_head[-1]), "blocks"))
    return [f.many(dims, "int32", name, 4 * kinds) for dims, name in sizes]


def layer(c: Call, x: Tensor) -> Tensor:
    """`Block.forward`."""
    attended = attention(c, c.norm("input_layernorm", x))
    x = ops.add(c.at(), x, attended)
    read = c.norm("post_attention_layernorm", x)
    return ops.add(c.at(), x, mixture(c, read))


def attention(c: Call, x: Tensor) -> Tensor:
    """`GptOssAttention.forward`: the arguments of attention are copies; its result is scaled by its share beside the sink."""
    a = c.block.attentions[0]
    b, s, _ = x.dims
    heads = {"q": a.num_attention_heads, "k": a.num_key_value_heads, "v": a.num_key_value_heads}
    q, k, v = (c.linear(f"self_attn.{name}_proj", x).view((b, s, heads[name], a.head_dim)) for name in heads)
    f = c.at("self_attn")
    q, k = turned(f, q, k, c.tables[0])
    q, k, v = (ops.copied(f, y, "contiguous", (b, y.dims[2], s, a.head_dim), viewed=False) for y in (q, k, v))
    out = flexed(f, q, k, v)
    out = ops.copied(f, out, "contiguous", (b, s, a.num_attention_heads, a.head_dim), viewed=False)
    return c.linear("self_attn.o_proj", out.view((b, s, a.num_attention_heads * a.head_dim)))


def turned(f: Tape, q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """`_compiled_apply_rotary_emb_qk`: keeps both sides of the table in the dtype of q."""
    half = (*table.dims[:-1], number(table.dims[-1]) // 2)
    node = f.record(_turned_backward, (q, k), *(f.new(half, q.dtype, name) for name in ("cos", "sin")))
    out = f.new(q.dims, q.dtype, "rotary", node), f.new(k.dims, k.dtype, "rotary")
    return out[0], Tensor(out[1].storage, k.dims, k.dtype, node, 1)


def _turned_backward(f: Tape, node: Node, saved: object, g: Tensor, h: Tensor) -> Gradients:
    """The gradients come by heads, and are copied first (torch, `coerce_to_expected_memory_format`); k before q."""
    copies = [f.new(x.dims, x.dtype, "contiguous") for x in (g, h)]
    of_k = f.new(h.dims, h.dtype, "rotary")
    del copies[1:]
    return f.new(g.dims, g.dtype, "rotary"), of_k


def flexed(f: Tape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`FlexAttention.forward`: the compiled kernel's output and logsumexp, and what the sink leaves of it, in fp32."""
    rows = q.dims[:-1]
    node = f.record(_flexed_backward, (q, k, v), q.detach(), k.detach(), v.detach())
    lse, scaled = f.new(rows, "fp32", "logsumexp"), f.new(rows, "fp32", "logsumexp")
    out = f.new(q.dims, q.dtype, "flex attention", node)
    f.keep(node, out.detach(), lse)
    del lse
    lse = Tensor(scaled.storage, rows, "fp32", node, 1)
    del scaled
    share = ops.keeps_output(f, ops.shift(f, lse, "sub"), "sigmoid").view((*rows, 1))
    out = ops.mul(f, out, share)
    return f.to(out, q.dtype)


def _flexed_backward(f: Tape, node: Node, saved: tuple[Tensor, ...], g: Tensor, of_lse: Tensor) -> Gradients:
    """The gradient of the result is copied first, as its elements lie by tokens."""
    q, k, v, *_ = saved
    copied = f.new(g.dims, g.dtype, "contiguous")
    delta = f.new(q.dims[:-1], "fp32", "delta")
    grads = tuple(f.new(x.dims, x.dtype, "flex attention backward") for x in (q, k, v))
    del delta, copied
    return grads


def mixture(c: Call, x: Tensor) -> Tensor:
    """`MoE.forward` without shared experts."""
    f = c.at("mlp")
    tokens = f.new(x.dims[:-1], "bool", "ones")
    weights, indices = gate(c, x, tokens)
    return experts(c, x, weights, indices)


def gate(c: Call, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`Gate.forward` with softmax behind top-k, and the load-balancing loss, which weights the gradient alone."""
    f, name = c.at("mlp.gate"), f"{c.style.stack}.mlp.router"
    part = c.model.part(name, c.number)
    scores = products.linear(f, x, part.own_weight, part.bias)
    chosen, indices = top_k(f, scores, c.block.mlp.num_experts_per_tok)
    weights = ops.softmax(f, chosen, "fp32")
    of_all = ops.softmax(f, scores, "fp32")
    weights = ops.scale(f, weights)
    del chosen
    load = f.new(scores.dims, "int64", "new_zeros")
    marks = f.new(tokens.dims, "int64", "to")
    del load, marks
    masked = masked_rows(f, of_all, tokens)
    loss = ops.scale(f, ops.summed(f, masked, (scores.dims[-1],)))
    del masked
    weights = Tensor(weights.storage, weights.dims, weights.dtype, f.record(_balanced_backward, (weights, loss), loss.dims))
    return f.to(weights, x.dtype), indices


def masked_rows(f: Tape, scores: Tensor, tokens: Tensor) -> Tensor:
    """`original_scores * token_mask.unsqueeze(-1)`: keeps the mask."""
    return f.new(scores.dims, scores.dtype, "mul", f.record(_masked_backward, (scores,), tokens))


def _masked_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "mul")


def _balanced_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Gradients:
    return g, f.new(saved[0], "fp32", "ones_like")


def experts(
    c: Call, x: Tensor, weights: Tensor, indices: Tensor, name: str = "mlp", *, between: Activated | None = None
) -> Tensor:
    """`GroupedExperts.forward`: the sum of what a token's experts add is made in fp32. `between`: their activation, if it is not
    that of gpt-oss, whose matrices are (expert, in, out)."""
    f = c.at(f"{name}.experts")
    masters = c.model.part(f"{c.style.stack}.{name}.experts", c.number).params  # in fp32 no unit casts them
    ranks = c.block.mlp.num_experts // number((masters.get("gate_up_proj") or masters["up_proj"]).dims[0])
    owned = {matrix: p if ranks == 1 else to_local(f, p) for matrix, p in masters.items()}
    params: dict[str, Operand] = {matrix: f.to(p, x.dtype) for matrix, p in owned.items()}
    up = params.get("gate_up_proj") or params["up_proj"]
    rows, own, dtype = indices.dims, x.dims, x.dtype
    weights = f.to(weights, "fp32")
    if ranks > 1:
        x, weights, indices = (gathered(f, y, ranks) for y in (x, weights, indices))
    every = indices.dims
    locals_ = [f.new(every, "int64", "masked_fill")]
    if ranks == 1:
        del indices
    locals_.append(f.new(every, "int64", "reshape"))
    local = f.new(every, "bool", "bitwise_and")
    locals_ += f.new(rows, "int64", "index"), f.new(rows, "int64", "index")
    chosen_weights = taken(f, weights, local, rows)
    order = f.new(rows, "int64", "argsort")
    locals_.append(f.new(rows, "int64", "index"))
    token = f.new(rows, "int64", "index")
    probabilities = taken(f, chosen_weights, order, rows).view((*rows, 1))
    slot = f.new(rows, "int64", "index")
    if ranks == 1:
        del weights
    del chosen_weights, local, order, locals_
    total = f.new(x.dims, "fp32", "zeros")
    chosen = taken(f, x, token, (*rows, x.dims[-1]))
    offsets = f.new((up.dims[0],), "int32", "to")
    second, out = projected(
        f, params, chosen, probabilities, offsets, few=c.model.running.rows_of_experts == "few", between=between
    )
    del slot
    node = f.record(_scattered_backward, (f.to(second, "fp32"),), token, second.dims)
    total = Tensor(total.storage, total.dims, total.dtype, node)
    del second, out, chosen
    if ranks > 1:
        total = summed(f, total, x, own)
    return f.to(total, dtype)


def projected(
    f: Tape,
    params: Mapping[str, Operand],
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    *,
    few: bool,
    between: Activated | None = None,
    kernel: Projections | None = None,
) -> tuple[Tensor, Tensor]:
    """What experts give for their rows, and what the second product read: weights multiply what is between, and the second
    bias. `few`: biases are added to all rows at once. `kernel`: Transformer Engine's products, which add them, and what weights
    take of the second bias comes behind (`GroupedExpertsTE`)."""
    up, down = params.get("gate_up_proj") or params["up_proj"], params["down_proj"]
    first, second = (params.get(f"{matrix}_bias") for matrix in ("gate_up_proj", "down_proj"))
    add = added_at_once if few else biased
    product = product_of(f, kernel, offsets)
    out = product(x, up, number(up.dims[2 if between is None else 1]))
    out = out if first is None or kernel is not None else add(f, out, first, None)
    out = (between or activated)(f, out, weights)
    result = product(out, down, x.dims[-1])
    weights = weights if kernel is None else ops.shift(f, weights, "sub")
    return result if second is None else add(f, result, second, weights), out


def by_engine(c: Call) -> bool:
    """Whether Transformer Engine's experts run, in whose forward names hold what both products read."""
    return c.model.running.kernels.experts is not None


def pads(c: Call) -> bool:
    """Whether the rows of each expert are padded, of which routers choose no round number; those that tokens take in turn are
    not (`job.exchanges.pads`)."""
    kernels = c.model.running.kernels
    return kernels.experts is not None and kernels.experts.narrow is not None and kernels.gate is None


def product_of(f: Tape, kernel: Projections | None, offsets: Tensor) -> Callable[[Tensor, Operand, Dim], Tensor]:
    """The product of experts' rows with their matrices, of Transformer Engine or of torch's kernel."""
    if kernel is not None:
        return partial(te_float8.grouped, f, narrow=kernel.narrow, offsets=offsets)
    return partial(grouped, f, kernel=True, bias=None, offsets=offsets)


def _scattered_backward(f: Tape, node: Node, saved: tuple[Tensor, Dims], g: Tensor) -> Tensor:
    return f.new(saved[1], g.dtype, "gather")


def biased(f: Tape, x: Tensor, bias: Operand, weights: Tensor | None) -> Tensor:
    """`_ChunkedBiasAdd`: a copy of x with the bias of each row's expert, by chunks or, where weights multiply it, by a kernel."""
    ids = f.new(x.dims[:-1], "int64", "repeat_interleave")
    node = f.record(_biased_backward, (x, *([] if weights is None else [weights])))
    if node is not None:
        node.in_python = True
    out = f.new(x.dims, x.dtype, "empty_like", node)
    if weights is None:
        chunk = f.new((CHUNK, x.dims[-1]), x.dtype, "index_select"), f.new((CHUNK, x.dims[-1]), x.dtype, "add")
        del chunk
    f.keep(node, *([] if weights is None else [weights.detach()]))
    del ids
    return out


def _biased_backward(f: Tape, node: Node, saved: tuple[Tensor, ...], g: Tensor) -> Gradients:
    if not saved:
        return [g]
    weights = f.new(saved[0].dims, saved[0].dtype, "empty_like")
    ids = f.new(g.dims[:-1], "int64", "repeat_interleave")
    del ids
    return g, weights


def activated(f: Tape, x: Tensor, weights: Tensor) -> Tensor:
    """`quick_geglu_deepep`, compiled: keeps gate and up, and the weights."""
    *rows, wide = x.dims
    assert isinstance(wide, int)
    node = f.record(_activated_backward, (x, weights), x.detach(), weights.detach())
    return f.new((*rows, wide // 2), x.dtype, "quick_geglu", node)


def _activated_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Gradients:
    x, weights = saved
    to_weights = f.new(weights.dims, weights.dtype, "sum")
    activated = f.new(g.dims, g.dtype, "glu")
    to_x = f.new(x.dims, x.dtype, "dx")
    del activated
    return to_x, to_weights


STYLE = Style(norm=opaque_rms, layer=layer)

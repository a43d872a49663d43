"""Attention of NeMo Automodel's mixtures that torch compiles whole: one autograd function, from its input to its result.

Letters: b rows of s tokens, a query heads, g key/value heads, d head size. Source: nemo_automodel 0.7.0,
components/models/qwen3_moe/layers.py (`Qwen3MoEAttention._forward_impl`) and deepseek_v3/layers.py (`MLA._forward_impl`) under
`torch.compile(fullgraph=True, dynamic=False)`. Of Qwen 3 inferred from rehearsals (tests/rehearse/automodel.jsonl): what the
partitioner saves, and the order of the kernels. Of DeepSeek-V3 as torch prints it (`TORCH_LOGS=output_code`). Left out:
sums of the norms' gradients, some numbers for each row, and that a kernel may write over a tensor of just its size.
"""

from __future__ import annotations

from peftplan.memory.fused_attention import efficient_gradients, efficient_output, flash_gradients, number
from peftplan.memory.models.style import Call
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
Saved = tuple[Tensor, tuple[Dims, ...], Tensor, Tensor, Tensor]
"""What backward reads: the input, the dims of what trains, and queries, keys and values by head."""


def compiled_attention(c: Call, x: Tensor) -> Tensor:
    """Keeps what norms, attention and products read, and the statistics of norms and attention. Once recomputed, these stay until
    the next exchange, as the dispatcher holds the graph."""
    a, (b, s, _) = c.block.attentions[0], x.dims
    parts = [c.model.part(f"{c.style.stack}.self_attn.{name}", c.number) for name in (*PROJECTIONS, *NORMS)]
    weights: list[Operand] = [part.own_weight for part in parts]
    f = c.at("self_attn")
    of_q, of_k = ((b, s, n, a.head_dim) for n in (a.num_attention_heads, a.num_key_value_heads))
    projected = [f.new(dims, x.dtype, "mm") for dims in (of_q, of_k)]
    values = f.new(of_k, x.dtype, "mm")
    table: Dims = (b, s, number(a.head_dim) // 2)
    tables = [f.new(table, x.dtype, name) for name in ("cos", "sin")]
    rstd, turned = [], []
    for dims in (of_q, of_k):
        rstd.append(f.new(dims[:-1], "fp32", "rstd"))
        turned.append(f.new(dims, x.dtype, "norm and rotary"))
    copied = f.new(of_k, x.dtype, "contiguous")
    del values
    q, k, v = (y.view((b, y.dims[2], s, a.head_dim)) for y in (*turned, copied))
    out = f.new(of_q, x.dtype, "flash attention")
    logsumexp = f.new((b, a.num_attention_heads, s), "fp32", "logsumexp")
    read = f.new(of_q, x.dtype, "contiguous")
    node = f.record(_backward, (x, *weights), x.detach(), tuple(w.dims for w in weights), q, k, v)
    kept = (*projected, *tables, *rstd, out, logsumexp, read)
    f.keep(node, *kept)
    c.model.compiled[:] = [x.detach(), *turned, copied, *kept] if f.recomputes else []
    return f.new(x.dims, x.dtype, "mm", node)


def _backward(f: Tape, node: Node, saved: Saved, g: Tensor) -> Gradients:
    """Gradients of norms and rotation overwrite those of attention; those of the three products are summed last."""
    x, dims, q, k, v = saved[:5]
    of_output = f.new(dims[3], g.dtype, "mm")
    of_result = f.new(q.dims, g.dtype, "mm")
    dq, dk, dv = flash_gradients(f, q, k, copies_output=True)
    del of_result
    for y in (k, q):
        wide = f.new(y.dims, "fp32", "norm backward")
        del wide
    copied = f.new(v.dims, g.dtype, "contiguous")
    del dv
    of_values = f.new(dims[2], g.dtype, "mm")
    to_x = f.new(x.dims, g.dtype, "mm")
    del copied
    of_keys = f.new(dims[1], g.dtype, "mm")
    others = [f.new(x.dims, g.dtype, "mm")]
    of_queries = f.new(dims[0], g.dtype, "mm")
    del dk
    others.append(f.new(x.dims, g.dtype, "mm"))
    del dq, others
    norms = [f.new(of_norm, g.dtype, "dW") for of_norm in dims[4:]]
    return to_x, of_queries, of_keys, of_values, of_output, *norms


OF_LATENT = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
Latent = tuple[Tensor, tuple[Dims, ...], Tensor, Tensor, Tensor]
"""What backward of latent attention reads: the input, the dims of what trains, and queries, keys and values by head."""


def compiled_latent(c: Call, x: Tensor) -> Tensor:
    """`MLA._forward_impl`, compiled: keys are written over what projected the queries, and values are copied. Once recomputed
    beside experts, what it keeps stays until the next exchange."""
    a, (b, s, _) = c.block.attentions[0], x.dims
    heads, d, r, v = a.num_attention_heads, number(a.head_dim), number(a.rotary_dim or 0), number(a.value_head_dim or 0)
    weights: list[Operand] = [c.model.part(f"{c.style.stack}.self_attn.{name}", c.number).own_weight for name in OF_LATENT]
    f = c.at("self_attn")
    low, *of_low = _normed(f, (b, s, weights[0].dims[0]), x.dtype)
    k = f.new((b, s, heads, d), x.dtype, "mm")
    both = f.new((b, s, weights[3].dims[0]), x.dtype, "mm")
    of_latent = _norm(f, (b, s, number(weights[3].dims[0]) - r), x.dtype)
    rotated = [f.new((b, s, n, r), x.dtype, "rotary") for n in (heads, 1)]
    kv = f.new((b, s, heads, d - r + v), x.dtype, "mm")
    q = f.new((b, heads, s, d), x.dtype, "cat")
    del rotated
    values = f.new((b, heads, s, v), x.dtype, "contiguous")
    del kv
    node = f.record(_latent_backward, (x, *weights), x.detach(), tuple(w.dims for w in weights), q, k.view(q.dims), values)
    kept = (low, *of_low, both, *of_latent, *efficient_output(f, q, values))
    f.keep(node, *kept)
    beside_experts = f.recomputes and bool(c.block.mlp.num_experts)
    c.model.compiled[:] = [x.detach(), q, k, values, *kept] if beside_experts else []
    return f.new(x.dims, x.dtype, "mm", node)


def _normed(f: Tape, dims: Dims, dtype: str) -> tuple[Tensor, ...]:
    """A product, and its norm."""
    return f.new(dims, dtype, "mm"), *_norm(f, dims, dtype)


def _norm(f: Tape, dims: Dims, dtype: str) -> tuple[Tensor, Tensor]:
    """Statistics of rows, and what they norm."""
    return f.new((*dims[:-1], 1), "fp32", "rstd"), f.new(dims, dtype, "norm")


def _latent_backward(f: Tape, node: Node, saved: Latent, g: Tensor) -> Gradients:
    """Two gradients of the input are added in place; those of the three largest products are computed last."""
    x, dims, q, k, values = saved[:5]
    b, heads, s, d = q.dims
    v = number(values.dims[3])
    r = number(dims[3][0]) - number(dims[4][0])
    of_result = f.new((b, s, heads, v), g.dtype, "mm")
    dq, dk, dv, _ = efficient_gradients(f, q, k, values, of_result)
    del of_result
    _of_kv = f.new((b, s, heads, number(d) - r + v), g.dtype, "cat")
    del dv
    of_latent = f.new((b, s, dims[4][0]), g.dtype, "mm")
    norms = [f.new(dims[4], g.dtype, "dW")]
    rotated = f.new((b, s, heads, r), g.dtype, "rotary")
    copied = f.new(rotated.dims, g.dtype, "contiguous")
    del copied
    of_q = f.new((b, s, heads, d), g.dtype, "cat")
    del rotated, dq
    of_low = f.new((b, s, dims[1][0]), g.dtype, "mm")
    of_norm = f.new(of_low.dims, g.dtype, "norm backward")
    del of_low
    norms.append(f.new(dims[1], g.dtype, "dW"))
    of_keys = [f.new((b, s, 1, r), g.dtype, "rotary") for _ in "ab"]
    del dk
    of_both = f.new((b, s, dims[3][0]), g.dtype, "norm backward")
    del of_keys, of_latent
    to_x = f.new(x.dims, g.dtype, "mm")
    of_kv_a = f.new(dims[3], g.dtype, "mm")
    del of_both
    other = f.new(x.dims, g.dtype, "mm")
    of_q_a = f.new(dims[0], g.dtype, "mm")
    del of_norm, other
    of_output = f.new(dims[6], g.dtype, "mm")
    of_q_b = f.new(dims[2], g.dtype, "mm")
    del of_q
    of_kv_b = f.new(dims[5], g.dtype, "mm")
    return to_x, of_q_a, norms[1], of_q_b, of_kv_a, norms[0], of_kv_b, of_output

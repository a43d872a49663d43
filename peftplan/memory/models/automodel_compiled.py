"""Attention of NeMo Automodel's Qwen 3 mixture that torch compiles whole: one autograd function, from its input to its result.

Letters: b rows of s tokens, a query heads, g key/value heads, d head size. Source: nemo_automodel 0.7.0,
components/models/qwen3_moe/layers.py (`Qwen3MoEAttention._forward_impl`) under `torch.compile(fullgraph=True, dynamic=False)`.
Inferred from rehearsals (tests/rehearse/automodel.jsonl): what the partitioner saves, and the order of the kernels. Left out:
sums of the norms' gradients, some numbers for each row, and that a kernel may write over a tensor of just its size.
"""

from __future__ import annotations

from peftplan.memory.fused_attention import flash_gradients, number
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

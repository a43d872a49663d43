"""Latent attention as NeMo Automodel computes it: DeepSeek-V3's, GLM-4.7-Flash's, and GLM-5's sparse one.

Of GLM-5 an indexer scores all keys of each query, and a mask hides those that it did not choose. Letters: b rows of s tokens,
j heads of the indexer of d numbers, r of which are rotated. What the indexer chooses has no gradient, so its weights get none.
Source: nemo_automodel 0.7.0, components/models/deepseek_v3/layers.py (`MLA`), glm_moe_dsa/layers.py (`GlmMoeDsaIndexer`,
`GlmMoeDsaMLA`). Left out: masks of padding, a number for each token.
"""

from __future__ import annotations

from peftplan.ledger import Dim
from peftplan.memory.attention import attend
from peftplan.memory.calls import inputs
from peftplan.memory.experts import top_k
from peftplan.memory.fused_attention import number
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.style import Call, Style
from peftplan.memory.norms import layer_norm
from peftplan.memory.te_attention import of_documents
from peftplan.tape import ops
from peftplan.tape.products import matmul
from peftplan.tape.shaping import cat, split
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Node, Tensor

INDEXER = "self_attn.indexer"


def of_latent(model: Model, style: Style) -> Tensor:
    """`Glm4MoeLiteModel.forward`, `DeepseekV3Model.forward`: one table of complex numbers."""
    f, width = model.tape, number(model.arch.blocks[0].attentions[0].rotary_dim or 0)
    f.module = "model"
    angles = f.new(("b", model.seq, width // 2), "fp32", "einsum")
    table = f.new(("b", model.seq, width), "fp32", "polar")
    del angles
    return run_layers(model, style, [inputs(model)], lambda _: (table,), masks={})


def latent_attention(c: Call, x: Tensor) -> Tensor:
    """`MLA.forward`: names hold what was projected until it returns."""
    a = c.block.attentions[0]
    (b, s, _), heads, d, r, v = (
        x.dims,
        a.num_attention_heads,
        a.head_dim,
        number(a.rotary_dim or 0),
        number(a.value_head_dim or 0),
    )
    if c.model.has(f"{c.style.stack}.self_attn.q_proj", c.number):
        q = c.linear("self_attn.q_proj", x)
    else:
        low = c.norm("self_attn.q_a_layernorm", c.linear("self_attn.q_a_proj", x))
        _keys = None if a.num_chosen_keys is None else chosen_keys(c, x, low)
        q = c.linear("self_attn.q_b_proj", low)
        if a.num_chosen_keys is None:
            del low
    f = c.at("self_attn")
    q_pass, q_rot = split(f, q.view((b, s, heads, d)), ((b, s, heads, d - r), (b, s, heads, r)))
    both = c.linear("self_attn.kv_a_proj_with_mqa", x)
    width = number(both.dims[-1])
    latent, k_rot = split(c.at("self_attn"), both, ((b, s, width - r), (b, s, r)))
    latent = c.norm("self_attn.kv_a_layernorm", latent)
    f = c.at("self_attn")
    q_rot, k_rot = rotated(f, q_rot), rotated(f, k_rot.view((b, s, 1, r)))
    chooses, engine = a.num_chosen_keys is not None, by_engine(c)
    mask = mask_of(c, (b, s)) if chooses and not engine else None
    bias = bias_of(c, (b, s), heads) if chooses and engine else None
    q = cat(f, (q_pass, q_rot), (b, s, heads, d))
    kv = c.linear("self_attn.kv_b_proj", latent).view((b, s, heads, d - r + v))
    f = c.at("self_attn")
    k_pass, values = split(f, kv, ((b, s, heads, d - r), (b, s, heads, v)))
    k = cat(f, (k_pass, ops.expanded(f, k_rot, (b, s, heads, r))), (b, s, heads, d))
    values = ops.copied(f, values, "contiguous", values.dims, viewed=False)
    if c.model.running.kernels.exchange is None or mask is not None:  # torch's attention, on copies by head
        q, k = (ops.copied(f, y, "contiguous", (b, heads, s, d), viewed=False) for y in (q, k))
        out = attend(c.model, a, q, k, values.view((b, heads, s, v)), mask, by_head=c.style.by_head)
    else:
        q, k, values = (y.view((b, y.dims[2], s, y.dims[3])) for y in (q, k, values))
        out = of_documents(f, q, k, values, packed=c.model.running.kernels.attention is not None, bias=bias)
    return c.linear("self_attn.o_proj", out.view((b, s, heads * v)))


def rotated(f: Tape, x: Tensor) -> Tensor:
    """`_FusedRope`: keeps the table."""
    return f.new(x.dims, x.dtype, "rotary", f.record(_rotated_backward, (x,)))


def _rotated_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "rotary")


def chosen_keys(c: Call, x: Tensor, low: Tensor) -> Tensor:
    """`GlmMoeDsaIndexer.forward`: the numbers of a query's keys, which checkpoints keep. `low`: compressed queries."""
    (b, s, _), a, name = x.dims, c.block.attentions[0], f"{c.style.stack}.{INDEXER}"
    d, r = number(c.model.part(f"{name}.wk", c.number).own_weight.dims[0]), number(a.rotary_dim or 0)
    q = c.linear(f"{INDEXER}.wq_b", low)
    j = number(q.dims[-1]) // d
    f = c.at(INDEXER)
    q_rot, q_pass = split(f, q.view((b, s, j, d)), ((b, s, j, r), (b, s, j, d - r)))
    k = layer_norm(c.model, f"{name}.k_norm", c.linear(f"{INDEXER}.wk", x), c.number)
    f = c.at(INDEXER)
    k_rot, k_pass = split(f, k, ((b, s, r), (b, s, d - r)))
    q_rot, k_rot = rotated(f, q_rot), rotated(f, k_rot)
    q, k = cat(f, (q_rot, q_pass), (b, s, j, d)), cat(f, (k_rot, k_pass), (b, s, d))
    weights = ops.scale(c.at(INDEXER), f.to(c.linear(f"{INDEXER}.weights_proj", x), "fp32"))
    f = c.at(INDEXER)
    scores = matmul(f, f.to(q, "fp32"), f.to(k, "fp32"), (b, s, j, s), transposed=True)
    scores = matmul(f, weights, scores, (b, s, s))
    if not by_engine(c):  # by the padding's mask
        scores = ops.shift(f, scores)
    later = after(f, s)
    scores = f.new(scores.dims, "fp32", "masked_fill", f.record(_masked_backward, (scores,), later))
    chosen = number(a.num_chosen_keys or 0)
    return f.chosen(lambda: top_k(f, scores, s if c.model.key_len <= chosen else chosen))[1]


def mask_of(c: Call, dims: tuple[Dim, Dim]) -> Tensor:
    """`_build_sparse_mask`, in the dtype of queries, with the padding's mask added."""
    b, s = dims
    f = c.at("self_attn")
    of_keys = f.new((b, 1, s, s), c.model.running.dtype, "full")
    _later = after(f, s)
    both = f.new(of_keys.dims, of_keys.dtype, "add")
    del of_keys
    return f.new(both.dims, both.dtype, "clamp_min")


def by_engine(c: Call) -> bool:
    """Whether Transformer Engine computes GLM-5's attention; rows that it gets have no mask of padding."""
    kernels = c.model.running.kernels
    return kernels.exchange is not None and kernels.rms_norm is not None


def bias_of(c: Call, dims: tuple[Dim, Dim], heads: int) -> Tensor:
    """The same for Transformer Engine: of all rows at once, and a copy for each head."""
    (b, s), f = dims, c.at("self_attn")
    of_keys = f.new((b, s, s), c.model.running.dtype, "full")
    _later = after(f, s)
    of_rows, numbers = f.new((1, s, s), of_keys.dtype, "max"), f.new((1, s, s), "int64", "max")
    del of_keys, numbers
    return f.new((1, heads, s, s), of_rows.dtype, "contiguous")


def after(f: Tape, s: Dim) -> Tensor:
    """Which keys come after a query."""
    _ones = f.new((s, s), "bool", "ones")
    return f.new((s, s), "bool", "triu")


def _masked_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "masked_fill")

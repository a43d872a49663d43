"""Qwen 3 Next and Qwen 3.5 as NeMo Automodel builds them: gated attention or a gated delta rule, and either experts that go
through HybridEP's exchange beside a gated one that all tokens take, or a dense MLP.

The decays of the delta rule are a unit of FSDP2 in fp32; the rule itself runs in operations of torch. Source: nemo_automodel
0.7.0, components/models/qwen3_next/{model,layers}.py, qwen3_5/model.py (`Qwen3_5DenseBlock`, `Qwen3_5DenseTextBackbone`),
qwen3_5_moe/cp_linear_attn.py (`CPAwareGatedDeltaNet`), components/moe/layers.py (`Gate`, `MoE`, `MLP`).
"""

from __future__ import annotations

from functools import partial

from peftplan.memory.activations import activation
from peftplan.memory.attention import attend
from peftplan.memory.calls import inputs
from peftplan.memory.model import Model
from peftplan.memory.models.automodel import checkpointed, opaque_rms
from peftplan.memory.models.automodel_deepep import experts, gate_before
from peftplan.memory.models.automodel_ep import turned
from peftplan.memory.models.automodel_hybrid import experts as over_hybrid_ep
from peftplan.memory.models.automodel_moe import rotary_table
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.mlps import gated_mlp
from peftplan.memory.models.qwen3_5 import delta_rule, joined_rule
from peftplan.memory.models.style import Call, Style
from peftplan.memory.models.vision_language import LANGUAGE, tables_of_grids
from peftplan.memory.norms import rms_plus_one
from peftplan.tape import ops
from peftplan.tape.shaping import cat, split
from peftplan.tape.tensors import Tensor

FINAL_NORM = "model.norm"


def qwen3_next(model: Model) -> Tensor:
    """`Qwen3NextModel.forward`."""
    table = rotary_table(model)
    return run_layers(model, STYLE, [inputs(model)], lambda _: (table,), masks={})


def qwen3_5(model: Model) -> Tensor:
    """`Qwen3_5Model.forward` of text alone: the mask of the batch multiplies what a delta rule reads. What the model returns
    holds the last hidden states too (`Qwen3_5ForConditionalGeneration.forward`)."""
    x = inputs(model)
    f, rows = model.tape, ("b", model.seq)
    f.module = "model.language_model"
    _places = f.new((model.seq,), "int64", "cache_position")
    _padding = f.new(rows, "bool", "padding_mask")
    cos, sin = tables_of_grids(model, x.dtype, by_sections=False)
    f.module = "model.language_model"
    table = cat(f, (cos, sin), cos.dims)
    del cos, sin
    hidden = run_layers(model, OF_TEXT_PART, [x], lambda _: (table,), masks={})
    model.kept.append(hidden.detach())
    return hidden


def dense_layer(c: Call, x: Tensor) -> Tensor:
    """`Qwen3_5DenseBlock.forward`, whose norms, mixer and MLP are checkpoints each."""
    mixer = attention if c.block.delta_rule is None else masked_rule
    mixed = checkpointed(c, partial(mixer, c), checkpointed(c, partial(c.norm, "input_layernorm"), x))
    x = ops.add(c.at(), x, mixed)
    del mixed
    out = checkpointed(c, partial(gated_mlp, c), checkpointed(c, partial(c.norm, "post_attention_layernorm"), x))
    return ops.add(c.at(), x, out)


def masked_rule(c: Call, x: Tensor) -> Tensor:
    """`CPAwareGatedDeltaNet.forward`."""
    return delta_rule(c, ops.scale(c.at("linear_attn"), x), repeats=True)


def norm(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`Qwen3NextRMSNorm.forward`; the last norm is that of the tool's other models."""
    return (opaque_rms if name == FINAL_NORM else rms_plus_one)(model, name, x, layer)


def layer(c: Call, x: Tensor) -> Tensor:
    """`Block.forward`."""
    mixer = attention if c.block.delta_rule is None else partial(joined_rule, repeats=True)
    mixed = mixer(c, c.norm("input_layernorm", x))
    x = ops.add(c.at(), x, mixed)
    out = mixture(c, c.norm("post_attention_layernorm", x))
    return ops.add(c.at(), x, out)


def attention(c: Call, x: Tensor) -> Tensor:
    """`Qwen3NextAttention.forward`: the arguments of attention are copies, and so is its result."""
    a, (b, s, _) = c.block.attentions[0], x.dims
    heads = (b, s, a.num_attention_heads, a.head_dim)
    q, k, v = (projected(c, f"self_attn.{name}_proj", x) for name in "qkv")
    q, gate = split(c.at("self_attn"), q, (heads, heads))
    gate = ops.copied(c.at("self_attn"), gate, "clone", (b, s, a.num_attention_heads * a.head_dim))
    k, v = (y.view((b, s, a.num_key_value_heads, a.head_dim)) for y in (k, v))
    q, k = c.norm("self_attn.q_norm", q), c.norm("self_attn.k_norm", k)
    f = c.at("self_attn")
    q, k = turned(f, q, k, c.tables[0])
    q, k, v = (ops.copied(f, y, "contiguous", (b, y.dims[2], s, a.head_dim), viewed=False) for y in (q, k, v))
    y = attend(c.model, a, q, k, v, by_head=True)
    f = c.at("self_attn")
    y = ops.mul(f, y, ops.keeps_output(f, gate, "sigmoid"))
    return c.linear("self_attn.o_proj", y)


def mixture(c: Call, x: Tensor) -> Tensor:
    """`MoE.forward`."""
    tokens = c.at("mlp").new(x.dims[:-1], "bool", "flatten")
    weights, indices = gate_before(c, x, tokens)
    gate = activation(c.at("mlp.shared_expert"), projected(c, "mlp.shared_expert.gate_proj", x), c.block.mlp.activation)
    up = projected(c, "mlp.shared_expert.up_proj", x)
    product = ops.mul(c.at("mlp.shared_expert"), gate, up)
    del gate, up
    shared = c.linear("mlp.shared_expert.down_proj", product)
    del product
    share = ops.keeps_output(c.at("mlp"), c.linear("mlp.shared_expert_gate", x), "sigmoid")
    shared = ops.mul(c.at("mlp"), share, shared)
    exchange = c.model.running.kernels.exchange
    divided = over_hybrid_ep if exchange is not None and exchange.hybrid else experts
    return ops.add(c.at("mlp"), divided(c, x, weights, indices), shared)


def projected(c: Call, name: str, x: Tensor) -> Tensor:
    """A projection, whose result recomputation finds where its weight has the router's shape, by which the tool knows the router
    (components/moe/parallelizer.py, `_is_router_projection`)."""
    if c.model.part(f"{c.style.stack}.{name}", c.number).own_weight.dims != (c.block.mlp.num_experts, c.model.arch.hidden_size):
        return c.linear(name, x)
    return c.tape.chosen(lambda: (c.linear(name, x),))[0]


STYLE = Style(norm=norm, layer=layer)
OF_TEXT_PART = LANGUAGE._replace(norm=rms_plus_one, layer=dense_layer, checkpoints_parts=True)

"""Mixtures of vision-language models as NeMo Automodel builds their text parts: Qwen3-VL's and Qwen 3.5's, over text alone.

Experts go through an exchange of tokens; attention is torch's, on copies. Source: nemo_automodel 0.7.0,
components/models/qwen3_vl_moe/model.py (`Qwen3VLMoeTextModelBackend`), qwen3_5_moe/model.py (`Qwen3_5MoeTextModelBackend`,
`Qwen3_5MoeBlock`), qwen3_moe/layers.py (`Qwen3MoeAttention`).
"""

from __future__ import annotations

from peftplan.memory.attention import attend
from peftplan.memory.calls import inputs
from peftplan.memory.model import Model
from peftplan.memory.models.automodel import opaque_rms
from peftplan.memory.models.automodel_deepep import layer as layer_of_experts
from peftplan.memory.models.automodel_ep import turned
from peftplan.memory.models.automodel_next import attention as gated_attention
from peftplan.memory.models.automodel_next import masked_rule, mixture
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.style import Call, Style
from peftplan.memory.models.vision_language import LANGUAGE, tables_of_grids
from peftplan.memory.norms import rms_plus_one
from peftplan.tape import ops
from peftplan.tape.shaping import cat
from peftplan.tape.tensors import Tensor


def of_text(model: Model, style: Style) -> Tensor:
    """`Qwen3VLMoeTextModelBackend.forward`, `Qwen3_5MoeTextModelBackend.forward`."""
    x = inputs(model)
    f = model.tape
    f.module = "model.language_model"
    _places = f.new((model.seq,), "int64", "cache_position")
    _padding = f.new(("b", model.seq), "bool", "padding_mask")
    table = joined_table(model, x.dtype)
    return run_layers(model, style, [x], lambda _: (table,), masks={})


def joined_table(model: Model, dtype: str) -> Tensor:
    """Cosines and sines in one table, in the dtype of the hidden states."""
    cos, sin = tables_of_grids(model, dtype, by_sections=False)
    model.tape.module = "model.language_model"
    return cat(model.tape, (cos, sin), cos.dims)


def qwen3_vl_moe(model: Model) -> Tensor:
    """`Qwen3VLMoeModel.forward`."""
    return of_text(model, OF_HEADS)


def qwen3_5_moe(model: Model) -> Tensor:
    """`Qwen3_5MoeModel.forward`."""
    return of_text(model, GATED)


def attention(c: Call, x: Tensor) -> Tensor:
    """`Qwen3MoeAttention.forward` of rows without padding."""
    a, (b, s, _) = c.block.attentions[0], x.dims
    heads = {"q": a.num_attention_heads, "k": a.num_key_value_heads, "v": a.num_key_value_heads}
    q, k, v = (c.linear(f"self_attn.{name}_proj", x).view((b, s, heads[name], a.head_dim)) for name in heads)
    q, k = c.norm("self_attn.q_norm", q), c.norm("self_attn.k_norm", k)
    f = c.at("self_attn")
    q, k = turned(f, q, k, c.tables[0])
    q, k, v = (ops.copied(f, y, "contiguous", (b, y.dims[2], s, a.head_dim), viewed=False) for y in (q, k, v))
    return c.linear("self_attn.o_proj", attend(c.model, a, q, k, v, by_head=True))


def gated_layer(c: Call, x: Tensor) -> Tensor:
    """`Qwen3_5MoeBlock.forward`."""
    mixer = gated_attention if c.block.delta_rule is None else masked_rule
    mixed = mixer(c, c.norm("input_layernorm", x))
    x = ops.add(c.at(), x, mixed)
    out = mixture(c, c.norm("post_attention_layernorm", x))
    return ops.add(c.at(), x, out)


OF_HEADS = LANGUAGE._replace(norm=opaque_rms, layer=layer_of_experts, attention=attention)
GATED = LANGUAGE._replace(norm=rms_plus_one, layer=gated_layer)

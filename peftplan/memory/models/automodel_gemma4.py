"""Gemma 4's mixture as NeMo Automodel builds it: transformers' attention and MLP beside experts that ranks divide.

Experts go through DeepEP's exchange (`memory.models.automodel_deepep`). Source: nemo_automodel 0.7.0,
components/models/gemma4_moe/model.py (`Gemma4MoEDecoderLayer`, `Gemma4MoE`, `Gemma4Gate`), components/moe/megatron/moe_utils.py
(`WeightedGEGLUFunction`, which keeps what that of SwiGLU keeps).
"""

from __future__ import annotations

from peftplan.memory.calls import inputs
from peftplan.memory.experts import top_k
from peftplan.memory.model import Model
from peftplan.memory.models.automodel_deepep import experts
from peftplan.memory.models.automodel_ep import divided
from peftplan.memory.models.gemma4 import BESIDE_TOWERS, layers
from peftplan.memory.models.style import Call
from peftplan.tape import ops, products
from peftplan.tape.tensors import Tensor


def gemma4(model: Model) -> Tensor:
    """`Gemma4ForConditionalGeneration.forward` of text alone."""
    f = model.tape
    f.module = "model"
    _places = f.new((model.seq,), "int64", "cache_position")
    x = inputs(model)
    f.module = "model.language_model"
    _padding = f.new(("b", model.seq), "bool", "padding_mask")
    return layers(model, BESIDE_TOWERS._replace(mixture=mixture), x, None)


def mixture(c: Call, x: Tensor) -> Tensor:
    """`Gemma4MoE.forward`: experts read what was normed, the router what was not."""
    normed = c.norm("pre_feedforward_layernorm_2", x)
    _tokens = c.at("experts").new(x.dims[:-1], "bool", "flatten")
    weights, indices = gate(c, x)
    return experts(c, normed, weights, indices, "")


def gate(c: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """`Gemma4Gate.forward`: all of it in fp32."""
    params = c.model.part(f"{c.style.stack}.router", c.number).params
    weight = c.model.part(f"{c.style.stack}.router.proj", c.number).own_weight
    x = c.norm("router.norm", x)
    f = c.at("router")
    wide = ops.scale(f, ops.mul(f, f.to(x, "fp32"), f.to(params["scale"], "fp32")))
    scores = products.linear(f, wide, f.to(weight, "fp32"))
    probabilities = ops.softmax(f, scores, "fp32")
    best, indices = top_k(f, probabilities, c.block.mlp.num_experts_per_tok)
    total = ops.shift(f, ops.summed(f, best, (*best.dims[:-1], 1)))
    return f.to(divided(f, best, total), x.dtype), indices

"""Nemotron 3 as NeMo Automodel builds it: layers of Mamba 2, attention without positions, or experts without gate.

Letters: b rows of s tokens, h hidden size. Experts go through DeepEP's exchange (`memory.models.automodel_deepep`), Mamba 2 runs
as mamba-ssm's function (`memory.state_space`). Source: nemo_automodel 0.7.0, components/models/nemotron_v3/{model,layers}.py,
components/moe/layers.py (`MLP`, `MoE`), experts.py (`relu2_deepep`). Left out: where a row begins and ends, a number a token.
"""

from __future__ import annotations

from functools import partial

from peftplan.memory import state_space
from peftplan.memory.activations import activation
from peftplan.memory.attention import attend
from peftplan.memory.calls import inputs
from peftplan.memory.model import Model
from peftplan.memory.models.automodel import checkpointed, opaque_rms
from peftplan.memory.models.automodel_balanced import gate_in_turn
from peftplan.memory.models.automodel_deepep import experts as divided_experts
from peftplan.memory.models.automodel_ep import gate
from peftplan.memory.models.automodel_hybrid import experts as over_hybrid_ep
from peftplan.memory.models.automodel_moe import experts
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.style import Call, Style
from peftplan.memory.te_attention import of_documents
from peftplan.memory.units import in_fp32
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Tensor


def nemotron_h(model: Model) -> Tensor:
    """`NemotronV3Model.forward`."""
    style = STYLE if model.running.kernels.exchange is None else OVER_RANKS
    return run_layers(model, style, [inputs(model)], lambda _: (), masks={})


def layer(c: Call, x: Tensor) -> Tensor:
    """`NemotronV3Block.forward`, whose `mixer` is a checkpoint on one GPU (components/distributed/activation_checkpointing.py,
    `apply_submodule_checkpointing`), and which is one itself where ranks divide experts (components/moe/parallelizer.py,
    `apply_ac`)."""
    apart = mixture if c.block.mlp.variant == "moe" else partial(squared_mlp, name="mixer")
    part = mamba if c.block.state_space else attention if c.block.attentions else apart
    run = partial(checkpointed, c, partial(part, c)) if c.style.checkpoints_parts else partial(part, c)
    out = run(c.norm("norm", x))
    return ops.add(c.at(), x, out)


def mamba(c: Call, x: Tensor) -> Tensor:
    """`NemotronV3Mamba2Mixer.forward`: the batch's mask, which packed rows and a benchmark's have not, multiplies its input."""
    assert c.block.state_space is not None
    kernels = c.model.running.kernels
    x = ops.scale(c.at("mixer"), x) if kernels.attention is None and kernels.gate is None else x
    projected, unit = c.linear("mixer.in_proj", x), in_fp32(c.number)
    projected = c.model.units.leave(unit, c.model.units.enter_with(unit, projected))
    return state_space.mixer(c.model, f"{c.style.stack}.mixer", c.number, c.block.state_space, projected)


def attention(c: Call, x: Tensor) -> Tensor:
    """`NemotronV3Attention.forward`: Transformer Engine's beside experts, and torch's in dense models."""
    a, (b, s, _) = c.block.attentions[0], x.dims
    heads = {"q": a.num_attention_heads, "k": a.num_key_value_heads, "v": a.num_key_value_heads}
    if any(block.mlp.variant == "moe" for block in c.model.arch.blocks):
        q, k, v = (c.linear(f"mixer.{name}_proj", x).view((b, heads[name], s, a.head_dim)) for name in heads)
        out = of_documents(c.at("mixer"), q, k, v, packed=c.model.running.kernels.attention is not None)
    else:
        q, k, v = (c.linear(f"mixer.{name}_proj", x).view((b, s, heads[name], a.head_dim)) for name in heads)
        f = c.at("mixer")
        q, k, v = (ops.copied(f, y, "contiguous", (b, y.dims[2], s, a.head_dim), viewed=False) for y in (q, k, v))
        out = attend(c.model, a, q, k, v, by_head=True)
    return c.linear("mixer.o_proj", out.view((b, s, a.num_attention_heads * a.head_dim)))


def mixture(c: Call, x: Tensor) -> Tensor:
    """`MoE.forward`: the router in fp32, whose weights are cast to the hidden states' dtype, and a shared expert. Experts may
    read what a product gave, in a space of fewer numbers."""
    _tokens = c.at("mixer").new(x.dims[:-1], "bool", "ones")
    latent = c.model.has(f"{c.style.stack}.mixer.fc1_latent_proj", c.number)
    read = c.linear("mixer.fc1_latent_proj", x) if latent else x
    if c.model.running.kernels.gate is None:
        weights, indices = gate(c, x, "mixer", counts=False)
        weights = c.at("mixer.gate").to(weights, x.dtype)
    else:
        weights, indices = gate_in_turn(c, x, "mixer")
    shared = squared_mlp(c, x, "mixer.shared_experts")
    exchange = c.model.running.kernels.exchange
    if exchange is None:
        mixed = experts(c, read, weights, indices, "mixer", between=squared)
    elif exchange.hybrid:
        mixed = over_hybrid_ep(c, read, weights, indices, "mixer", between=squared)
    else:
        mixed = divided_experts(c, read, weights, indices, "mixer", activated=squared)
    mixed = c.linear("mixer.fc2_latent_proj", mixed) if latent else mixed
    return ops.add(c.at("mixer"), mixed, shared)


def squared_mlp(c: Call, x: Tensor, name: str) -> Tensor:
    """`MLP.forward` without a gate."""
    x = activation(c.at(name), c.linear(f"{name}.up_proj", x), c.block.mlp.activation)
    return c.linear(f"{name}.down_proj", x)


def squared(f: Tape, x: Tensor, weights: Tensor) -> Tensor:
    """`relu2_deepep`, compiled: keeps its input and the weights."""
    return f.new(x.dims, x.dtype, "relu2", f.record(_squared_backward, (x, weights), x.detach(), weights.detach()))


def _squared_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Gradients:
    return f.new(saved[0].dims, g.dtype, "dx"), f.new(saved[1].dims, "fp32", "sum")


STYLE = Style(norm=opaque_rms, layer=layer, final_norm="model.norm_f", checkpoints_parts=True)
OVER_RANKS = STYLE._replace(checkpoints_parts=False)

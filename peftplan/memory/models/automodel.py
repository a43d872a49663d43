"""Decoders that NeMo Automodel builds of modules of its own: rotary embedding in fp32, and an RMSNorm that saves its input alone.

Source: nemo_automodel 0.7.0, components/models/{llama,qwen2,qwen3,mistral3}/model.py, llama/rope_utils.py
(`apply_rotary_pos_emb`), common/utils.py (`_float32_rms_norm_impl`, whose backward torch compiles into one kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

from peftplan.memory import fused_layers
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import added, attention, decoder
from peftplan.memory.models.mlps import mlp
from peftplan.memory.models.style import Call, Style
from peftplan.tape.hooks import hooked
from peftplan.tape.rotary import rotary
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Operand, Tensor


def rotated_in_fp32(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`q.float() * cos + rotate_half(q.float()) * sin`, and the same of k, back in the dtype that they came in."""
    wide = f.to(q, "fp32"), f.to(k, "fp32")
    rotated = rotary(f, wide[0], cos, sin), rotary(f, wide[1], cos, sin)
    return f.to(rotated[0], q.dtype), f.to(rotated[1], k.dtype)


def opaque_rms(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`Float32RMSNorm`: an fp32 copy of x lives until it is normed, and one of the result until it returns; or a kernel."""
    f, weight = model.tape, model.part(name, layer).weight
    assert weight is not None
    f.module = name
    if (kernel := model.running.kernels.rms_norm) is not None:
        return fused_layers.rms_norm(f, kernel, x, weight)
    node = f.record(_opaque_backward, (x, weight), x, weight)
    wide = f.new(x.dims, "fp32", "to"), f.new(weight.dims, "fp32", "to")
    normed = f.new(x.dims, "fp32", "rms_norm"), f.new((*x.dims[:-1], 1), "fp32", "rstd")
    del wide
    out = f.new(x.dims, x.dtype, "to", node)
    del normed
    return out


def _opaque_backward(f: Tape, node: Node, saved: tuple[Tensor, Operand], g: Tensor) -> Gradients:
    x, weight = saved
    grad_weight = f.new(weight.dims, weight.dtype, "sum") if node.edges[1] else None
    return f.new(x.dims, x.dtype, "dx"), grad_weight


def layer_of_parts(c: Call, x: Tensor) -> Tensor:
    """A layer whose norms, attention and MLP are checkpoints each (components/distributed/activation_checkpointing.py
    `apply_submodule_checkpointing`): what comes into each of them stays."""
    if c.model.running.kernels.residual is not None and c.model.running.checkpointing and x.node is not None:
        return remade(c, x)
    for norm, name, function in (("input_layernorm", "self_attn", attention), ("post_attention_layernorm", "mlp", mlp)):
        residual = x
        x = checkpointed(c, partial(c.norm, norm), x)
        x = checkpointed(c, partial(c.module, name, function=function, by_name=name == "self_attn"), x)
        x = added(c, residual, x)
    return x


def remade(c: Call, x: Tensor) -> Tensor:
    """Such a layer compiled whole, behind one that trains: torch's partitioner keeps its input and what both norms make of it,
    and the result overwrites the residual between them. Where backward's peak lies in such a layer, this is not its order."""

    def attended(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = c.norm("input_layernorm", x)
        residual = added(c, x, c.module("self_attn", normed, function=attention, by_name=True))
        return normed.detach(), residual, c.norm("post_attention_layernorm", residual)

    kept, residual, normed = cast("tuple[Tensor, Tensor, Tensor]", c.model.checkpoint(attended, x))
    residual = hooked(c.tape, residual, _keep, kept)
    del kept
    return added(c, residual, checkpointed(c, partial(c.module, "mlp", function=mlp), normed))


def _keep(normed: Tensor) -> None:
    """What a norm made stays until this gradient arrives."""


def checkpointed(c: Call, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A part of a layer, which is a checkpoint where the job has any."""
    if not c.model.running.checkpointing:
        return part(x)
    out = c.model.checkpoint(part, x)
    assert isinstance(out, Tensor)
    return out


OWN = Style(layer=layer_of_parts, rotate=rotated_in_fp32, wide_tables=True, checkpoints_parts=True)
of_llama = partial(decoder, style=OWN._replace(norm=opaque_rms, holds_projected=True))
FORWARDS = {
    "llama": of_llama,
    "qwen2": of_llama,
    "qwen3": partial(decoder, style=OWN),
    "ministral3": partial(decoder, style=Style(layer=layer_of_parts, checkpoints_parts=True)),
}
"""model type → the tool's forward of it."""

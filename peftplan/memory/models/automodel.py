"""Decoders that NeMo Automodel builds of modules of its own: rotary embedding in fp32, and an RMSNorm that saves its input alone.

Source: nemo_automodel 0.7.0, components/models/{llama,qwen2,qwen3}/model.py, llama/rope_utils.py (`apply_rotary_pos_emb`),
common/utils.py (`_float32_rms_norm_impl`, whose backward torch compiles into one kernel).
"""

from __future__ import annotations

from functools import partial

from peftplan.memory.model import Model
from peftplan.memory.models.decoder import decoder
from peftplan.memory.models.style import Style
from peftplan.tape.rotary import rotary
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Operand, Tensor


def rotated_in_fp32(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`q.float() * cos + rotate_half(q.float()) * sin`, and the same of k, back in the dtype that they came in."""
    wide = f.to(q, "fp32"), f.to(k, "fp32")
    rotated = rotary(f, wide[0], cos, sin), rotary(f, wide[1], cos, sin)
    return f.to(rotated[0], q.dtype), f.to(rotated[1], k.dtype)


def opaque_rms(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`Float32RMSNorm`: fp32 copies of x and of the result live until it returns."""
    f, weight = model.tape, model.part(name, layer).weight
    assert weight is not None
    f.module = name
    node = f.record(_opaque_backward, (x, weight), x, weight)
    wide = f.new(x.dims, "fp32", "to"), f.new(weight.dims, "fp32", "to")
    normed = f.new(x.dims, "fp32", "rms_norm"), f.new((*x.dims[:-1], 1), "fp32", "rstd")
    out = f.new(x.dims, x.dtype, "to", node)
    del wide, normed
    return out


def _opaque_backward(f: Tape, node: Node, saved: tuple[Tensor, Operand], g: Tensor) -> Gradients:
    x, weight = saved
    grad_weight = f.new(weight.dims, weight.dtype, "sum") if node.edges[1] else None
    return f.new(x.dims, x.dtype, "dx"), grad_weight


of_llama = partial(decoder, style=Style(norm=opaque_rms, rotate=rotated_in_fp32, wide_tables=True))
FORWARDS = {
    "llama": of_llama,
    "qwen2": of_llama,
    "qwen3": partial(decoder, style=Style(rotate=rotated_in_fp32, wide_tables=True)),
}
"""model type → the tool's forward of it."""

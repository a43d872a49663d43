"""LFM2: layers whose attention is replaced by a short convolution over three parts of a projection.

The convolution is torch's, not that of the package causal-conv1d, which LFM2 calls where it is installed. Left out: cuDNN's
workspaces in fp16. Sources: transformers, models/lfm2/modeling_lfm2.py; torch, aten/src/ATen/native/Convolution.cpp
(`_convolution` and `convolution_backward` copy an input of three dims that lies by tokens), Context of `CudaDepthwise2d`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from peftplan.errors import NeedsTraceError
from peftplan.memory.models.decoder import attention, decoder
from peftplan.memory.models.style import Call, Style
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

TAPS = (3, 4)
"""Widths of the filters of every published model: of LFM2, and of Qwen 3.5."""


def layer(c: Call, x: Tensor) -> Tensor:
    """`Lfm2DecoderLayer.forward`, whose local `residual` holds the layer's input until it returns."""
    mixer, name = (attention, "self_attn") if c.block.attentions else (short_convolution, "conv")
    normed = c.norm("operator_norm", x)
    mixed = c.module(name, normed, mixer, by_name=True)
    del normed
    mixed = ops.add(c.at(), mixed, x)
    out = c.behind("output", c.module("feed_forward", c.norm("ffn_norm", mixed), feed_forward))
    return ops.add(c.at(), mixed, out)


def feed_forward(c: Call, x: Tensor) -> Tensor:
    """`Lfm2MLP.forward`."""
    gate = ops.activation(c.at("feed_forward"), c.linear("feed_forward.w1", x), "silu")
    gated = ops.mul(c.at("feed_forward"), gate, c.linear("feed_forward.w3", x))
    del gate
    return c.linear("feed_forward.w2", gated)


def short_convolution(c: Call, x: Tensor) -> Tensor:
    """`Lfm2ShortConv.forward`, whose names hold the projection; padding is multiplied away."""
    model = c.model
    if model.running.padding:
        mask = model.mask or model.batch["attention_mask"]
        x = ops.mul(c.at("conv"), x, Tensor(mask.storage, (*mask.dims, 1), x.dtype))  # of integers, which promote nothing
    parts = c.linear("conv.in_proj", x)
    f = c.at("conv")
    first, gate, last = in_turn(f, parts, 3)
    x = ops.mul(f, first, last)
    whole = depthwise(c, x, "conv.conv")
    y = sliced(f, whole, (x.dims[0], x.dims[2], x.dims[1]))
    if model.caches:  # a slice of the last tokens, which are all
        model.kept.append((f.new((x.dims[0], x.dims[2], TAPS[0]), x.dtype, "zeros"),))
        y = sliced(f, y, y.dims)
    del whole
    x = f.to(y, x.dtype).view(x.dims)
    del y
    x = ops.mul(f, gate, x)
    return c.linear("conv.out_proj", x)


def in_turn(f: Tape, x: Tensor, count: int) -> tuple[Tensor, ...]:
    """`x.transpose(-1, -2).chunk(count, dim=-2)`, viewed by tokens again: their gradients are joined channel by channel."""
    node = f.record(_in_turn_backward, (x,), x.dims)
    width = x.dims[-1]
    assert isinstance(width, int)
    return tuple(Tensor(x.storage, (*x.dims[:-1], width // count), x.dtype, node, number) for number in range(count))


def _in_turn_backward(f: Tape, node: Node, saved: tuple[Dims], *grads: Tensor | None) -> Tensor:
    out = f.new(saved[0], next(g.dtype for g in grads if g is not None), "cat")
    assert out.storage is not None
    f.permuted.add(out.storage.number)
    return f.view_of(out)


def depthwise(c: Call, x: Tensor, name: str) -> Tensor:
    """`causal_conv1d_fn`: one filter per channel, of an input that lies by tokens; a filter's width less one more numbers than it
    has tokens."""
    f, part = c.tape, c.model.part(f"{c.style.stack}.{name}", c.number)
    f.module = part.name
    weight: Operand = part.own_weight
    taps = weight.dims[-1]
    if taps not in TAPS:
        raise NeedsTraceError(f"convolutions over {taps} tokens")
    bias: Operand | None = part.bias
    x = f.to(x, weight.dtype)
    if f.autocast:
        bias = f.cast(bias, f.autocast)
        weight, x = f.to(weight, f.autocast), f.cast(x, f.autocast)  # a view of the weight, whose cast is not cached
    node = f.record(_depthwise_backward, (x, weight, bias), x, weight, bias)
    b, s, h = x.dims
    _contiguous = f.new((b, h, s), x.dtype, "contiguous")
    return f.new((b, h, f"{s}+{int(taps) - 1}"), x.dtype, "convolution", node)


def _depthwise_backward(f: Tape, node: Node, saved: Sequence[Operand], g: Tensor) -> Gradients:
    x = saved[0]
    _contiguous = f.new(x.dims, x.dtype, "contiguous")
    return tuple(
        f.view_of(f.new(y.dims, g.dtype, "convolution_backward")) if edge else None
        for y, edge in zip(saved, node.edges, strict=True)
    )


STYLE = Style(
    norms=("operator_norm", None, "ffn_norm", None),
    layer=layer,
    qk_names=("q_layernorm", "k_layernorm"),
    output="out_proj",
    final_norm="model.embedding_norm",
)
lfm2 = partial(decoder, style=STYLE)
lfm2_vl = partial(
    decoder, style=STYLE._replace(stack="model.language_model.layers.{}", final_norm="model.language_model.embedding_norm")
)

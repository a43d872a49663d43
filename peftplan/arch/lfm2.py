"""LFM2: layers with attention, and layers with a short convolution in its place.

Source: transformers, `models/lfm2/modeling_lfm2.py` and the config class's defaults beside it.
"""

from __future__ import annotations

from math import ceil

from peftplan.arch.blocks import Block, Mlp
from peftplan.arch.decoder import Dims, decoder_backbone, first_met, read_dims, rmsnorms
from peftplan.arch.fields import Fields
from peftplan.arch.heads import decoder_model
from peftplan.arch.llama import BARE
from peftplan.arch.modules import Architecture, Module, linear, rmsnorm
from peftplan.errors import InputError

LAYER_TYPES = ("conv", "full_attention")


def lfm2(c: Fields, task_type: str) -> Architecture:
    """LFM2: an MLP whose width is two thirds of the stated one, rounded up; an RMSNorm on each head of q and k."""
    n = read_dims(c, kv=8, width=("block_ff_dim", "intermediate_size"))
    n = n._replace(i=_width(c, n.i))
    conv, attending = _layers(c, n)
    block = Block("decoder", n.layers, (n.attention._replace(qk_norm=True),), Mlp("gated", n.i, "silu"), "rmsnorm")
    backbone = decoder_backbone(
        c,
        n,
        stem="Lfm2",
        layer=first_met(
            (
                *_convolution(c, n.h, conv),
                *_attention(n, attending),
                linear("layers.{}.feed_forward.w1", n.h, n.i, layers=n.layers),
                linear("layers.{}.feed_forward.w3", n.h, n.i, layers=n.layers),
                linear("layers.{}.feed_forward.w2", n.i, n.h, layers=n.layers),
                *rmsnorms(n, "operator_norm", "ffn_norm"),
            )
        ),
        blocks=tuple(b for b in (block._replace(layers=attending), block._replace(layers=conv, attentions=())) if b.layers),
        norm=rmsnorm("embedding_norm", n.h),
    )
    tied = c.bool("tie_embedding", default=c.bool("tie_word_embeddings", default=True))
    return decoder_model(backbone, c, task_type, tasks=BARE, tie_word_embeddings=tied)


def _layers(c: Fields, n: Dims) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers with a convolution, and with attention. Raises InputError for another type, or another number of them."""
    full = c.ints("full_attn_idxs", default=n.layers, high=len(n.layers) - 1)
    types = c.strs("layer_types", default=tuple(LAYER_TYPES[layer in full] for layer in n.layers))
    if len(types) != len(n.layers) or not set(types) <= set(LAYER_TYPES):
        accepted = f"accepted: {len(n.layers)} entries (num_hidden_layers), each {' or '.join(LAYER_TYPES)}"
        raise InputError(f"{c.name}: layer_types", list(types), accepted)
    return tuple(layer for layer in n.layers if types[layer] == "conv"), tuple(
        layer for layer in n.layers if types[layer] != "conv"
    )


def _width(c: Fields, stated: int) -> int:
    """The MLP's width (`Lfm2MLP.__init__`)."""
    if not c.bool("block_auto_adjust_ff_dim", default=True):
        return stated
    multiple = c.int("block_multiple_of", default=256)
    return multiple * ceil(
        int(c.number("block_ffn_dim_multiplier", default=1.0, low=0, high=64) * int(2 * stated / 3)) / multiple
    )


def _convolution(c: Fields, h: int, layers: tuple[int, ...]) -> tuple[Module, ...]:
    """One filter per channel, between a projection to three parts and one back."""
    bias, taps = c.bool("conv_bias", default=False), c.int("conv_L_cache", default=3)
    beside = (("bias", (h,)),) if bias else ()
    return (
        Module("layers.{}.conv.conv", "Conv1d", (("weight", (h, 1, taps)), *beside), layers),
        linear("layers.{}.conv.in_proj", h, 3 * h, bias, layers),
        linear("layers.{}.conv.out_proj", h, h, bias, layers),
    )


def _attention(n: Dims, layers: tuple[int, ...]) -> tuple[Module, ...]:
    return (
        linear("layers.{}.self_attn.q_proj", n.h, n.a * n.d, layers=layers),
        linear("layers.{}.self_attn.k_proj", n.h, n.kv * n.d, layers=layers),
        linear("layers.{}.self_attn.v_proj", n.h, n.kv * n.d, layers=layers),
        linear("layers.{}.self_attn.out_proj", n.a * n.d, n.h, layers=layers),
        rmsnorm("layers.{}.self_attn.q_layernorm", n.d, layers),
        rmsnorm("layers.{}.self_attn.k_layernorm", n.d, layers),
    )

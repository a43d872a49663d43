"""Granite 4: each layer is Mamba 2 or attention, and a shared gated MLP beside experts, if there are any.

Source: transformers, `models/granitemoehybrid/modeling_granitemoehybrid.py` and the config class's defaults beside it.
"""

from __future__ import annotations

from peftplan.arch.blocks import Block, Mlp, StateSpace
from peftplan.arch.decoder import Dims, decoder_backbone, first_met, read_dims, rmsnorms
from peftplan.arch.fields import Fields
from peftplan.arch.heads import decoder_model
from peftplan.arch.llama import BARE
from peftplan.arch.modules import Architecture, Module, linear, rmsnorm
from peftplan.arch.moe import NORMS, experts, moe_mlp, router
from peftplan.errors import InputError

NAMES = {"mamba": "linear_attention", "attention": "full_attention"}
"""Names of kinds in older configs."""
NAME = "layers.{}.mamba"


def granitemoehybrid(c: Fields, task_type: str) -> Architecture:
    """Granite 4: multipliers of the embedding, of what a part adds, and of the logits."""
    n = read_dims(c)
    types = tuple(NAMES.get(kind, kind) for kind in c.strs("layer_types", "layers_block_type", default=()))
    types = types or ("linear_attention",) * len(n.layers)
    if len(types) != len(n.layers) or not set(types) <= set(NAMES.values()):
        accepted = f"accepted: {len(n.layers)} entries (num_hidden_layers), each {' or '.join(NAMES)}"
        raise InputError(f"{c.name}: layer_types", list(types), accepted)
    mixing, attending = (tuple(layer for layer in n.layers if types[layer] == kind) for kind in NAMES.values())
    e, shared = c.int("num_local_experts", default=8, low=0), c.int("shared_intermediate_size", default=1024)
    act = c.str("hidden_act", default="silu")
    mlp = moe_mlp(c, n.i, e, c.int("num_experts_per_tok", default=2), shared=shared) if e else Mlp("gated", shared, act, True)
    turned = c.str("position_embedding_type", default="") == "rope"
    attention = n.attention if turned else n.attention._replace(positions="none")
    blocks = [Block("decoder", attending, (attention,), mlp, "rmsnorm")]
    mixer: tuple[Module, ...] = ()
    if mixing:
        space = _space(c, n)
        mixer = _mixer(c, n, space, mixing)
        blocks.append(Block("decoder", mixing, (), mlp, "rmsnorm", state_space=space))
    layer = (
        *rmsnorms(n, *NORMS),
        *(
            (
                router("layers.{}.block_sparse_moe.router", e=e, h=n.h, layers=n.layers),
                experts("layers.{}.block_sparse_moe.experts", e=e, h=n.h, i=n.i, layers=n.layers),
            )
            if e
            else ()
        ),
        linear("layers.{}.shared_mlp.input_linear", n.h, 2 * shared, layers=n.layers),
        linear("layers.{}.shared_mlp.output_linear", shared, n.h, layers=n.layers),
        *mixer,
        *_attention(n, c.bool("attention_bias", default=False), attending),
    )
    blocks_of_kinds = tuple(block for block in blocks if block.layers)
    backbone = decoder_backbone(c, n, stem="GraniteMoeHybrid", layer=first_met(layer), blocks=blocks_of_kinds)
    backbone = backbone._replace(logits_ops=("scale",), buffers=backbone.buffers if turned else ())
    return decoder_model(backbone, c, task_type, tasks=BARE)


def _space(c: Fields, n: Dims) -> StateSpace:
    heads = c.int("mamba_n_heads", default=128)
    width = c.int("mamba_expand", default=2) * n.h
    return StateSpace(
        num_heads=heads,
        head_dim=c.divide("mamba_expand · hidden_size", width, "mamba_n_heads", heads),
        groups=c.int("mamba_n_groups", default=1),
        state_size=c.int("mamba_d_state", default=256),
        chunk_size=c.int("mamba_chunk_size", default=256),
    )


def _mixer(c: Fields, n: Dims, space: StateSpace, layers: tuple[int, ...]) -> tuple[Module, ...]:
    heads, bias, taps = space.num_heads, c.bool("mamba_proj_bias", default=False), c.int("mamba_d_conv", default=4)
    beside = (("bias", (space.channels,)),) if c.bool("mamba_conv_bias", default=True) else ()
    return (
        Module(NAME, "Module", (("dt_bias", (heads,)), ("A_log", (heads,)), ("D", (heads,))), layers),
        Module(f"{NAME}.conv1d", "Conv1d", (("weight", (space.channels, 1, taps)), *beside), layers),
        linear(f"{NAME}.in_proj", n.h, space.width + space.channels + heads, bias, layers),
        rmsnorm(f"{NAME}.norm", space.width, layers),
        linear(f"{NAME}.out_proj", space.width, n.h, bias, layers),
    )


def _attention(n: Dims, bias: bool, layers: tuple[int, ...]) -> tuple[Module, ...]:
    widths = {"q": (n.h, n.a * n.d), "k": (n.h, n.kv * n.d), "v": (n.h, n.kv * n.d), "o": (n.a * n.d, n.h)}
    return tuple(linear(f"layers.{{}}.self_attn.{name}_proj", *width, bias, layers) for name, width in widths.items())

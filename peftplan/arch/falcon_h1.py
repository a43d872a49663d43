"""Falcon-H1: Mamba 2 and attention read the same normed hidden states in each layer, before a gated MLP.

Source: transformers, `models/falcon_h1/modeling_falcon_h1.py` and the config class's defaults beside it.
"""

from __future__ import annotations

from peftplan.arch.blocks import Block, Mlp, StateSpace
from peftplan.arch.decoder import attention_modules, decoder_backbone, gated_mlp, read_dims, rmsnorms
from peftplan.arch.fields import Fields
from peftplan.arch.heads import decoder_model
from peftplan.arch.llama import BARE
from peftplan.arch.modules import Architecture, Buffer, Module, linear, rmsnorm

NAME = "layers.{}.mamba"


def falcon_h1(c: Fields, task_type: str) -> Architecture:
    """Falcon-H1: multipliers of every branch, a table of them for the mixer's projection."""
    n = read_dims(c, kv=8)
    width = c.optional_int("mamba_d_ssm", absent=1024) or int(c.int("mamba_expand", default=2) * n.h)
    heads = c.int("mamba_n_heads", default=128)
    space = StateSpace(
        num_heads=heads,
        head_dim=c.divide("mamba_d_ssm", width, "mamba_n_heads", heads),
        groups=c.int("mamba_n_groups", default=1),
        state_size=c.int("mamba_d_state", default=256),
        chunk_size=c.int("mamba_chunk_size", default=256),
    )
    projected, bias = width + space.channels + heads, c.bool("attention_bias", default=False)
    act = c.str("hidden_act", default="silu")
    backbone = decoder_backbone(
        c,
        n,
        stem="FalconH1",
        layer=(
            *gated_mlp(n.h, n.i, n.layers, bias=c.bool("mlp_bias", default=False), name="layers.{}.feed_forward"),
            *_mixer(c, n.h, space, projected, n.layers),
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            *rmsnorms(n, "input_layernorm", "pre_ff_layernorm"),
        ),
        blocks=(Block("decoder", n.layers, (n.attention,), Mlp("gated", n.i, act), "rmsnorm", state_space=space),),
        norm=rmsnorm("final_layernorm", n.h),
    )
    table = Buffer(f"{NAME}.mup_vector", "model", (1, 1, projected), n.layers)
    backbone = backbone._replace(buffers=(table, *backbone.buffers), logits_ops=("scale",))
    return decoder_model(backbone, c, task_type, tasks=BARE)


def _mixer(c: Fields, h: int, space: StateSpace, projected: int, layers: tuple[int, ...]) -> tuple[Module, ...]:
    heads, taps = space.num_heads, c.int("mamba_d_conv", default=4)
    beside = (("bias", (space.channels,)),) if c.bool("mamba_conv_bias", default=True) else ()
    norm = (rmsnorm(f"{NAME}.norm", space.width, layers),) if c.bool("mamba_rms_norm", default=False) else ()
    return (
        Module(NAME, "Module", (("dt_bias", (heads,)), ("A_log", (heads,)), ("D", (heads,))), layers),
        Module(f"{NAME}.conv1d", "Conv1d", (("weight", (space.channels, 1, taps)), *beside), layers),
        linear(f"{NAME}.in_proj", h, projected, c.bool("mamba_proj_bias", default=False), layers),
        *norm,
        linear(f"{NAME}.out_proj", space.width, h, c.bool("projectors_bias", default=False), layers),
    )

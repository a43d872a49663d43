"""Later decoders of the Llama shape: Nemotron, Ministral 3, Seed-OSS, Hunyuan, EXAONE 4, Arcee, Apertus, ERNIE 4.5.

Sources: transformers, `models/<model_type>/modeling_<model_type>.py` and the config class's defaults beside it.
"""

from __future__ import annotations

from peftplan.arch.blocks import Block, Mlp
from peftplan.arch.decoder import (
    Dims,
    attention_modules,
    decoder_backbone,
    gated_mlp,
    grouped_blocks,
    layer_windows,
    qk_norms,
    read_dims,
    rmsnorms,
)
from peftplan.arch.fields import Fields
from peftplan.arch.heads import decoder_model, partial_rotary_dim, probability
from peftplan.arch.llama import BARE, NO_TOKEN_CLS, plain, uniform_block
from peftplan.arch.modules import NO_DROPOUT, Architecture, Buffer, Module, layernorm, linear, rmsnorm


def ministral3(c: Fields, task_type: str) -> Architecture:
    """Ministral 3: Mistral whose queries are multiplied by a factor of their position."""
    n = read_dims(c, kv=8, head_dim=128)
    attention = n.attention._replace(window=c.optional_int("sliding_window"), scaled_queries=True)
    return decoder_model(plain(c, n, stem="Ministral3", attention=attention), c, task_type)


def seed_oss(c: Fields, task_type: str) -> Architecture:
    """Seed-OSS: biases on q, k and v; attention and the MLP drop out what they return."""
    n = read_dims(c, kv=8, head_dim=128)
    backbone = plain(
        c,
        n,
        stem="SeedOss",
        qkv_bias=c.bool("attention_bias", default=True),
        o_bias=c.bool("attention_out_bias", default=False),
        mlp_bias=c.bool("mlp_bias", default=False),
    )
    residual, attention = (probability(c, f"{part}_dropout", default=0.1) for part in ("residual", "attention"))
    return decoder_model(backbone._replace(dropout=backbone.dropout._replace(hidden=residual, attention=attention)), c, task_type)


def hunyuan_v1_dense(c: Fields, task_type: str) -> Architecture:
    """Hunyuan: an RMSNorm on each head of q and k once they are rotated; `head_dim` has no default."""
    n = read_dims(c)
    c.int("head_dim")
    bias = c.bool("attention_bias", default=False)
    norms = tuple(rmsnorm(f"layers.{{}}.self_attn.{side}_layernorm", n.d, n.layers) for side in ("query", "key"))
    attention = n.attention._replace(qk_norm=True)
    backbone = plain(c, n, stem="HunYuanDenseV1", qkv_bias=bias, o_bias=bias, norms=norms, attention=attention)
    return decoder_model(backbone, c, task_type, tasks=NO_TOKEN_CLS)


def exaone4(c: Fields, task_type: str) -> Architecture:
    """EXAONE 4: norms after attention and MLP and on heads; beside layers with a window, those without have no positions."""
    n = read_dims(c, kv=32)
    window = c.optional_int("sliding_window", absent=4096)
    every = 1 if c.raw.get("layer_types") else c.int("sliding_window_pattern", default=4)
    windows = layer_windows(c, n.layers, sliding=lambda at: window is not None and (at + 1) % every != 0, window=window)
    attentions = [
        n.attention._replace(qk_norm=True, window=own, positions="rotary" if window is None or own else "none") for own in windows
    ]
    block = uniform_block(c, n, n.attention)._replace(norm_position="post")
    backbone = decoder_backbone(
        c,
        n,
        stem="Exaone4",
        layer=(
            *attention_modules(n),
            *qk_norms(n),
            *gated_mlp(n.h, n.i, n.layers),
            *rmsnorms(n, "post_attention_layernorm", "post_feedforward_layernorm"),
        ),
        blocks=grouped_blocks(n.layers, attentions, [block.mlp] * len(n.layers), block),
    )
    return decoder_model(backbone, c, task_type)


def arcee(c: Fields, task_type: str) -> Architecture:
    """Arcee: Llama whose MLP has no gate."""
    n = read_dims(c, shows_head_dim=True)
    bias = c.bool("attention_bias", default=False)
    backbone = decoder_backbone(
        c,
        n,
        stem="Arcee",
        layer=(
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            *_up_and_down(n, bias=c.bool("mlp_bias", default=False)),
            *rmsnorms(n, "input_layernorm", "post_attention_layernorm"),
        ),
        blocks=(uniform_block(c, n, n.attention)._replace(mlp=Mlp("plain", n.i, c.str("hidden_act", default="relu2"))),),
    )
    return decoder_model(backbone, c, task_type)


def apertus(c: Fields, task_type: str) -> Architecture:
    """Apertus: norms on heads, an MLP without gate whose xIELU has two trainable numbers and two buffers."""
    n = read_dims(c)
    bias = c.bool("attention_bias", default=False)
    act = c.str("hidden_act", default="xielu")
    own = tuple((name, (1,)) for name in ("alpha_p", "alpha_n"))
    backbone = decoder_backbone(
        c,
        n,
        stem="Apertus",
        layer=(
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            *qk_norms(n),
            *_up_and_down(n, bias=False),
            *((Module("layers.{}.mlp.act_fn", "Module", own, n.layers),) if act == "xielu" else ()),
            *rmsnorms(n, "attention_layernorm", "feedforward_layernorm"),
        ),
        blocks=(uniform_block(c, n, n.attention._replace(qk_norm=True))._replace(mlp=Mlp("plain", n.i, act)),),
    )
    numbers = [Buffer(f"layers.{{}}.mlp.act_fn.{name}", "model", (), n.layers) for name in ("beta", "eps")] * (act == "xielu")
    backbone = backbone._replace(buffers=(*numbers, *backbone.buffers))
    return decoder_model(backbone, c, task_type, tasks=("CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION"))


def nemotron(c: Fields, task_type: str) -> Architecture:
    """Nemotron, Minitron: LayerNorms whose weight counts from one, an MLP without gate, part of a head rotated."""
    n = read_dims(c, shows_head_dim=True)
    bias = c.bool("attention_bias", default=False)
    mlp = Mlp("plain", n.i, c.str("hidden_act", default="relu2"))
    backbone = decoder_backbone(
        c,
        n,
        stem="Nemotron",
        layer=(
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            *_up_and_down(n, bias=c.bool("mlp_bias", default=False)),
            *(layernorm(f"layers.{{}}.{name}", n.h, layers=n.layers) for name in ("input_layernorm", "post_attention_layernorm")),
        ),
        blocks=(Block("decoder", n.layers, (n.attention,), mlp, "layernorm"),),
        norm=layernorm("norm", n.h),
        rotary_dim=partial_rotary_dim(c, n.d, default=0.5),
    )
    return decoder_model(backbone, c, task_type)


def ernie4_5(c: Fields, task_type: str) -> Architecture:
    """ERNIE 4.5: one field for all biases, no dropout; its rotation is in fp32."""
    n = read_dims(c, kv=2, head_dim=128)
    bias = c.bool("use_bias", default=False)
    backbone = plain(c, n, stem="Ernie4_5", qkv_bias=bias, o_bias=bias, mlp_bias=bias)._replace(dropout=NO_DROPOUT)
    return decoder_model(backbone, c, task_type, tasks=BARE, tie_word_embeddings=True)


def _up_and_down(n: Dims, *, bias: bool) -> tuple[Module, ...]:
    """The two matrices of an MLP without gate."""
    return (
        linear("layers.{}.mlp.up_proj", n.h, n.i, bias, n.layers),
        linear("layers.{}.mlp.down_proj", n.i, n.h, bias, n.layers),
    )

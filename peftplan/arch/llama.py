"""Decoders of the Llama shape: token embedding, [norm, attention, norm, gated MLP] × layers, final norm, head.

Sources: transformers, `models/<model_type>/modeling_<model_type>.py` and the config class's defaults beside it.
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.decoder import (
    Dims,
    attention_modules,
    decoder_backbone,
    fused_mlp,
    gated_mlp,
    grouped_blocks,
    layer_windows,
    qk_norms,
    read_dims,
    rmsnorms,
    rotary_by_layer_type,
    windowed_blocks,
)
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, classifier_dropout, decoder_model, partial_rotary_dim, probability
from peftplan.arch.modules import Architecture, Dropout, Module, linear, rmsnorm
from peftplan.errors import InputError

BARE = ("CAUSAL_LM", "FEATURE_EXTRACTION")
NO_TOKEN_CLS = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")


def llama(c: Fields, task_type: str) -> Architecture:
    """Llama 1 … 3: `attention_bias` on q, k, v and o; `mlp_bias` on all three of the MLP."""
    return decoder_model(_with_both_biases(c, read_dims(c, shows_head_dim=True), stem="Llama"), c, task_type)


def granite(c: Fields, task_type: str) -> Architecture:
    """Granite 3: Llama whose logits are divided by `logits_scaling`."""
    backbone = _with_both_biases(c, read_dims(c), stem="Granite")._replace(logits_ops=("scale",))
    return decoder_model(backbone, c, task_type, tasks=BARE)


def mistral(c: Fields, task_type: str) -> Architecture:
    """Mistral: Llama with a sliding window in every layer and no biases."""
    n = read_dims(c, kv=8, shows_head_dim=True)
    window = c.optional_int("sliding_window", absent=4096)
    return decoder_model(plain(c, n, stem="Mistral", attention=n.attention._replace(window=window)), c, task_type)


def qwen2(c: Fields, task_type: str) -> Architecture:
    """Qwen1.5 … 2.5: biases on q, k and v; a window from layer `max_window_layers` on where `use_sliding_window` says so."""
    n = read_dims(c, kv=32)
    backbone = plain(c, n, stem="Qwen2", qkv_bias=True)
    return decoder_model(backbone._replace(blocks=_qwen_windows(c, backbone.blocks[0])), c, task_type)


def qwen3(c: Fields, task_type: str) -> Architecture:
    """Qwen3: Qwen2 with an RMSNorm on each head of q and k, and biases only with `attention_bias`."""
    n = read_dims(c, kv=32, head_dim=128)
    bias = c.bool("attention_bias", default=False)
    attention = n.attention._replace(qk_norm=True)
    backbone = plain(c, n, stem="Qwen3", qkv_bias=bias, o_bias=bias, norms=qk_norms(n), attention=attention)
    return decoder_model(backbone._replace(blocks=_qwen_windows(c, backbone.blocks[0])), c, task_type)


def smollm3(c: Fields, task_type: str) -> Architecture:
    """SmolLM3: Llama in which some layers (every fourth, or as `no_rope_layers` says) have no positions."""
    n = read_dims(c, kv=4)
    interval = c.int("no_rope_layer_interval", default=4)
    rotary = c.ints("no_rope_layers", default=tuple(int((layer + 1) % interval != 0) for layer in n.layers), high=1)
    if len(rotary) < len(n.layers):
        raise InputError(f"{c.name}: no_rope_layers", list(rotary), f"accepted: at least {len(n.layers)} entries of 0 or 1")
    window = c.optional_int("sliding_window") if c.bool("use_sliding_window", default=False) else None
    windows = layer_windows(c, n.layers, sliding=lambda layer: window is not None and not rotary[layer], window=window)
    attentions = [
        n.attention._replace(window=w, positions="rotary" if r else "none")
        for w, r in zip(windows, rotary[: len(n.layers)], strict=True)
    ]
    backbone = _with_both_biases(c, n, stem="SmolLM3")
    block = backbone.blocks[0]
    blocks = grouped_blocks(n.layers, attentions, [block.mlp] * len(n.layers), block)
    return decoder_model(backbone._replace(blocks=blocks), c, task_type, tie_word_embeddings=True)


def olmo(c: Fields, task_type: str) -> Architecture:
    """OLMo 1: Llama with LayerNorms that have no parameters. They appear only in the blocks."""
    n = read_dims(c)
    bias, attention = c.bool("attention_bias", default=False), n.attention._replace(clipped=c.raw.get("clip_qkv") is not None)
    backbone = decoder_backbone(
        c,
        n,
        stem="Olmo",
        layer=(*attention_modules(n, qkv_bias=bias, o_bias=bias), *gated_mlp(n.h, n.i, n.layers)),
        blocks=(uniform_block(c, n, attention)._replace(norm="layernorm"),),
    )
    without_norm = backbone._replace(modules=backbone.modules[:-1])
    return decoder_model(without_norm, c, task_type, tasks=NO_TOKEN_CLS)


def olmo2(c: Fields, task_type: str) -> Architecture:
    """OLMo 2: norms after attention and MLP instead of before, and an RMSNorm over all heads of q (and of k) at once."""
    n = read_dims(c)
    return decoder_model(_olmo(c, n, "Olmo2", n.attention._replace(qk_norm=True)), c, task_type, tasks=NO_TOKEN_CLS)


def olmo3(c: Fields, task_type: str) -> Architecture:
    """OLMo 3: OLMo 2 with a window in three layers of four, and rotary tables for each kind of attention."""
    n = read_dims(c)
    backbone = _olmo(c, n, "Olmo3", n.attention._replace(qk_norm=True))
    window = c.optional_int("sliding_window", absent=4096)
    blocks = windowed_blocks(backbone.blocks[0], layer_windows(c, n.layers, sliding=lambda at: (at + 1) % 4 != 0, window=window))
    backbone = backbone._replace(blocks=blocks, buffers=rotary_by_layer_type(n, blocks))
    return decoder_model(backbone, c, task_type, tasks=("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"))


def _olmo(c: Fields, n: Dims, stem: str, attention: Attention) -> Backbone:
    bias = c.bool("attention_bias", default=False)
    return decoder_backbone(
        c,
        n,
        stem=stem,
        layer=(
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            rmsnorm("layers.{}.self_attn.q_norm", n.a * n.d, n.layers),
            rmsnorm("layers.{}.self_attn.k_norm", n.kv * n.d, n.layers),
            *gated_mlp(n.h, n.i, n.layers),
            *rmsnorms(n, "post_attention_layernorm", "post_feedforward_layernorm"),
        ),
        blocks=(uniform_block(c, n, attention)._replace(norm_position="post"),),
    )


def phi3(c: Fields, task_type: str) -> Architecture:
    """Phi-3, Phi-4: q, k and v in one matrix, gate and up in one; no biases; `partial_rotary_factor` of a head is rotated."""
    n = read_dims(c)
    attention = n.attention._replace(fused_qkv=True, window=c.optional_int("sliding_window"))
    backbone = decoder_backbone(
        c,
        n,
        stem="Phi3",
        layer=(
            linear("layers.{}.self_attn.o_proj", n.a * n.d, n.h, layers=n.layers),
            linear("layers.{}.self_attn.qkv_proj", n.h, (n.a + 2 * n.kv) * n.d, layers=n.layers),
            *fused_mlp(n),
            *rmsnorms(n, "input_layernorm", "post_attention_layernorm"),
        ),
        blocks=(uniform_block(c, n, attention, fused_gate_up=True),),
        rotary_dim=partial_rotary_dim(c, n.d, default=1.0),
        dropout=Dropout(probability(c, "resid_pdrop"), probability(c, "attention_dropout"), classifier=classifier_dropout(c)),
    )
    return decoder_model(backbone, c, task_type)


def glm4(c: Fields, task_type: str) -> Architecture:
    """GLM-4 of 0414: GLM with norms behind attention and MLP too."""
    n = read_dims(c, kv=2, head_dim=128)
    norms = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
    block = uniform_block(c, n, n.attention, fused_gate_up=True)._replace(norm_position="sandwich")
    return _glm(c, n, block, task_type, stem="Glm4", norms=norms)


def glm(c: Fields, task_type: str) -> Architecture:
    """GLM-4: gate and up in one matrix, half of a head rotated; o has no bias."""
    n = read_dims(c, kv=2, head_dim=128)
    block = uniform_block(c, n, n.attention, fused_gate_up=True)
    return _glm(c, n, block, task_type, stem="Glm", norms=("input_layernorm", "post_attention_layernorm"))


def _glm(c: Fields, n: Dims, block: Block, task_type: str, *, stem: str, norms: tuple[str, ...]) -> Architecture:
    backbone = decoder_backbone(
        c,
        n,
        stem=stem,
        layer=(
            *attention_modules(n, qkv_bias=c.bool("attention_bias", default=True)),
            *fused_mlp(n),
            *rmsnorms(n, *norms),
        ),
        blocks=(block,),
        rotary_dim=partial_rotary_dim(c, n.d, default=0.5),
    )
    return decoder_model(backbone, c, task_type)


def _with_both_biases(c: Fields, n: Dims, *, stem: str) -> Backbone:
    bias = c.bool("attention_bias", default=False)
    return plain(c, n, stem=stem, qkv_bias=bias, o_bias=bias, mlp_bias=c.bool("mlp_bias", default=False))


def plain(
    c: Fields,
    n: Dims,
    *,
    stem: str,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    norms: tuple[Module, ...] = (),
    attention: Attention | None = None,
) -> Backbone:
    """Llama itself; `norms` are those inside the attention."""
    return decoder_backbone(
        c,
        n,
        stem=stem,
        layer=(
            *attention_modules(n, qkv_bias=qkv_bias, o_bias=o_bias),
            *norms,
            *gated_mlp(n.h, n.i, n.layers, bias=mlp_bias),
            *rmsnorms(n, "input_layernorm", "post_attention_layernorm"),
        ),
        blocks=(uniform_block(c, n, attention or n.attention),),
    )


def uniform_block(c: Fields, n: Dims, attention: Attention, *, fused_gate_up: bool = False) -> Block:
    """All layers as one block: RMSNorms before attention and MLP."""
    mlp = Mlp("gated", n.i, c.str("hidden_act", default="silu"), fused_gate_up=fused_gate_up)
    return Block(stack="decoder", layers=n.layers, attentions=(attention,), mlp=mlp, norm="rmsnorm")


def _qwen_windows(c: Fields, block: Block) -> tuple[Block, ...]:
    """Qwen2 and Qwen3: the first `max_window_layers` layers have full attention."""
    use = c.bool("use_sliding_window", default=False)
    window = c.optional_int("sliding_window", absent=4096) if use else None
    full = c.int("max_window_layers", default=28, low=0)
    windows = layer_windows(c, block.layers, sliding=lambda layer: window is not None and layer >= full, window=window)
    return windowed_blocks(block, windows)

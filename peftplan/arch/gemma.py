"""Gemma 1 … 3 (text): a scaled token embedding, wide heads, a tied output head. 2 and 3 alternate full and sliding attention.

Sources: transformers, `models/gemma*/modeling_gemma*.py` and the config classes beside them. Left out: the multiplication
that scales the embedding.
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.decoder import (
    Dims,
    attention_modules,
    decoder_backbone,
    gated_mlp,
    layer_windows,
    qk_norms,
    read_dims,
    rmsnorms,
    rotary_by_layer_type,
    windowed_blocks,
)
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, decoder_model
from peftplan.arch.modules import Architecture, Buffer, Module

PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
ACTIVATION = "gelu_pytorch_tanh"
HEAD_DIM = 256


def gemma(c: Fields, task_type: str) -> Architecture:
    """Gemma 1: the Llama shape with `head_dim` 256. `gelu` in a config means its tanh form (configuration_gemma.py)."""
    n = read_dims(c, kv=16, head_dim=HEAD_DIM)
    activation = c.str("hidden_act", default=ACTIVATION)
    mlp = Mlp("gated", n.i, ACTIVATION if activation == "gelu" else activation)
    block = Block("decoder", n.layers, (_attention(c, n),), mlp, "rmsnorm")
    backbone = _backbone(c, n, stem="Gemma", blocks=(block,), layer_norms=PRE_NORMS)
    return decoder_model(backbone, c, task_type, tie_word_embeddings=True)


def gemma2(c: Fields, task_type: str) -> Architecture:
    """Gemma 2: norms before and after each sublayer, a window in every other layer, soft-capped scores and logits; no sdpa."""
    n = read_dims(c, kv=4, head_dim=HEAD_DIM)
    attention = _attention(c, n)._replace(softcap=_capped(c, "attn_logit_softcapping", absent=50.0))
    window = c.optional_int("sliding_window", absent=4096)
    blocks = _sandwich_blocks(c, n, attention, sliding=lambda layer: (layer + 1) % 2 != 0, window=window)
    backbone = _backbone(c, n, stem="Gemma2", blocks=blocks, layer_norms=SANDWICH_NORMS)._replace(
        logits_ops=("softcap",) if _capped(c, "final_logit_softcapping", absent=30.0) else (),
        supports_sdpa=False,
    )
    return decoder_model(backbone, c, task_type, tie_word_embeddings=True)


def gemma3_text(c: Fields, task_type: str) -> Architecture:
    """Gemma 3, text only: an RMSNorm on each head of q and k; five sliding layers per full one; rotary tables for each kind."""
    n = read_dims(c, kv=4, head_dim=HEAD_DIM)
    attention = _attention(c, n)._replace(qk_norm=True, softcap=_capped(c, "attn_logit_softcapping", absent=None))
    window = c.optional_int("sliding_window", absent=4096)
    if not attention.causal and window is not None:
        window = window // 2 + 1  # half to each side, including the token itself
    pattern = c.int("sliding_window_pattern", default=6)
    blocks = _sandwich_blocks(c, n, attention, sliding=lambda layer: (layer + 1) % pattern != 0, window=window)
    stem = "Gemma3" if task_type == "CAUSAL_LM" else "Gemma3Text"
    backbone = _backbone(c, n, stem=stem, blocks=blocks, layer_norms=SANDWICH_NORMS, attention_norms=qk_norms(n))
    backbone = backbone._replace(
        buffers=(backbone.buffers[0], *rotary_by_layer_type(n, blocks)),
        logits_ops=("softcap",) if _capped(c, "final_logit_softcapping", absent=None) else (),
    )
    tasks = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
    return decoder_model(backbone, c, task_type, tasks=tasks, tie_word_embeddings=True)


def _attention(c: Fields, n: Dims) -> Attention:
    return n.attention._replace(causal=not c.bool("use_bidirectional_attention", default=False))


def _capped(c: Fields, name: str, *, absent: float | None) -> bool:
    """Whether soft-capping is on. A number turns it on; an explicit null turns it off."""
    if c.raw.get(name, absent) is None:
        return False
    c.number(name, default=absent, low=0, high=1e6)
    return True


def _sandwich_blocks(
    c: Fields, n: Dims, attention: Attention, *, sliding: Callable[[int], bool], window: int | None
) -> tuple[Block, ...]:
    mlp = Mlp("gated", n.i, c.str("hidden_activation", default=ACTIVATION))
    block = Block("decoder", n.layers, (attention,), mlp, "rmsnorm", "sandwich")
    return windowed_blocks(block, layer_windows(c, n.layers, sliding=sliding, window=window))


def _backbone(
    c: Fields,
    n: Dims,
    *,
    stem: str,
    blocks: tuple[Block, ...],
    layer_norms: tuple[str, ...],
    attention_norms: tuple[Module, ...] = (),
) -> Backbone:
    bias = c.bool("attention_bias", default=False)
    layer = (
        *attention_modules(n, qkv_bias=bias, o_bias=bias),
        *attention_norms,
        *gated_mlp(n.h, n.i, n.layers),
        *rmsnorms(n, *layer_norms),
    )
    backbone = decoder_backbone(c, n, stem=stem, layer=layer, blocks=blocks)
    return backbone._replace(buffers=(Buffer("embed_tokens.embed_scale", "model", ()), *backbone.buffers))

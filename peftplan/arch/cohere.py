"""Command R (cohere) and Command R7B (cohere2): attention and MLP in parallel after one LayerNorm; logits are scaled.

Sources: transformers, `models/cohere*/modeling_cohere*.py`. `CohereLayerNorm` has a weight and no bias, computes in fp32 by
plain operations, and is no `nn.LayerNorm`.
"""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.arch.blocks import Block, Mlp
from peftplan.arch.decoder import Dims, attention_modules, decoder_backbone, gated_mlp, layer_windows, read_dims, windowed_blocks
from peftplan.arch.fields import Fields
from peftplan.arch.heads import decoder_model
from peftplan.arch.modules import Architecture, Module, Shape

TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION")


def cohere(c: Fields, task_type: str) -> Architecture:
    """Command R: with `use_qk_norm`, a norm with a weight of its own for each head of q and of k."""
    n = read_dims(c)
    qk_norm = c.bool("use_qk_norm", default=False)
    norms = (_norm("self_attn.q_norm", (n.a, n.d), n), _norm("self_attn.k_norm", (n.kv, n.d), n)) if qk_norm else ()
    return _model(c, n, task_type, stem="Cohere", norms=norms, windows=[None] * len(n.layers))


def cohere2(c: Fields, task_type: str) -> Architecture:
    """Command R7B: of four layers, three have a sliding window and rotary positions, one has full attention and no positions."""
    n = read_dims(c, shows_head_dim=True)
    window = c.optional_int("sliding_window", absent=4096)
    pattern = c.int("sliding_window_pattern", default=4)
    windows = layer_windows(c, n.layers, sliding=lambda layer: (layer + 1) % pattern != 0, window=window)
    return _model(c, n, task_type, stem="Cohere2", norms=(), windows=windows, rotary_in_full=False)


def _norm(name: str, shape: Shape, n: Dims) -> Module:
    return Module(f"layers.{{}}.{name}", "Module", (("weight", shape),), n.layers)


def _model(
    c: Fields,
    n: Dims,
    task_type: str,
    *,
    stem: str,
    norms: tuple[Module, ...],
    windows: Iterable[int | None],
    rotary_in_full: bool = True,
) -> Architecture:
    bias = c.bool("attention_bias", default=False)
    block = Block(
        stack="decoder",
        layers=n.layers,
        attentions=(n.attention._replace(qk_norm=bool(norms)),),
        mlp=Mlp("gated", n.i, c.str("hidden_act", default="silu")),
        norm="layernorm",
        parallel=True,
        shared_norm=True,
    )
    backbone = decoder_backbone(
        c,
        n,
        stem=stem,
        layer=(
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            *norms,
            *gated_mlp(n.h, n.i, n.layers),
            _norm("input_layernorm", (n.h,), n),
        ),
        blocks=tuple(_positions(b, rotary_in_full) for b in windowed_blocks(block, windows)),
        norm=Module("norm", "Module", (("weight", (n.h,)),)),
    )
    return decoder_model(backbone._replace(logits_ops=("scale",)), c, task_type, tasks=TASKS, tie_word_embeddings=True)


def _positions(block: Block, rotary_in_full: bool) -> Block:
    attention = block.attentions[0]
    rotary = rotary_in_full or attention.window is not None
    return block._replace(attentions=(attention._replace(positions="rotary" if rotary else "none"),))

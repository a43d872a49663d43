"""Gemma 4 (text): full layers with wider heads than sliding ones, keys that serve as values, layers that borrow those of earlier
ones, an input of their own for each layer, and experts beside the MLP.

Sources: transformers, `models/gemma4/modeling_gemma4.py` and `models/gemma4_unified/modeling_gemma4_unified.py`, and the config
classes beside them.
"""

from __future__ import annotations

from typing import TypeVar

from peftplan.arch.blocks import Attention, Block, Mlp, Router
from peftplan.arch.decoder import (
    Dims,
    decoder_backbone,
    first_met,
    gated_mlp,
    grouped_blocks,
    layer_windows,
    read_dims,
    rmsnorms,
)
from peftplan.arch.fields import Fields
from peftplan.arch.gemma import ACTIVATION, HEAD_DIM, SANDWICH_NORMS
from peftplan.arch.heads import decoder_model
from peftplan.arch.modules import Architecture, Buffer, Module, embedding, linear, rmsnorm
from peftplan.errors import InputError, NeedsTraceError

GLOBAL_HEAD_DIM = 512
"""Of full layers, where the config does not state `global_head_dim`."""
PATTERN = 6
"""Every so many layers one has full attention, and so has the last."""
EXPERT_NORMS = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")


def gemma4_text(c: Fields, task_type: str) -> Architecture:
    """Gemma 4: of E2B and E4B each layer has an input of its own, of 26B-A4B experts."""
    return _gemma4(c, task_type, stem="Gemma4", window=512, per_layer=256)


def gemma4_unified_text(c: Fields, task_type: str) -> Architecture:
    """Gemma 4 12B: the dense layers alone, whose masks know of blocks of tokens wherever pictures may be."""
    return _gemma4(c, task_type, stem="Gemma4Unified", window=1024, per_layer=0)


def _gemma4(c: Fields, task_type: str, *, stem: str, window: int, per_layer: int) -> Architecture:
    if c.raw.get("use_bidirectional_attention") == "all":
        raise NeedsTraceError("attention of Gemma 4 to both sides")
    n = read_dims(c, kv=4, head_dim=HEAD_DIM)
    attentions = _attentions(c, n, c.int("sliding_window", default=window))
    if not per_layer and c.raw.get("use_bidirectional_attention", "vision") == "vision":
        attentions = [attention._replace(sees_blocks=True) for attention in attentions]
    doubled = c.bool("use_double_wide_mlp", default=False)
    widths = [n.i * (2 if doubled and attention.borrows else 1) for attention in attentions]
    own = c.int("hidden_size_per_layer_input", default=per_layer, low=0) if per_layer else 0
    mixture = bool(per_layer) and c.bool("enable_moe_block", default=False)
    alike = [attention._replace(window=None, stores=False) for attention in attentions]
    layer = [
        *(module for kind in dict.fromkeys(alike) for module in _attention_modules(c, n, kind, _where(alike, kind))),
        *(module for width in dict.fromkeys(widths) for module in gated_mlp(n.h, width, _where(widths, width))),
        *rmsnorms(n, *SANDWICH_NORMS),
        *(_own_input(n, own) if own else ()),
        *(_experts(c, n) if mixture else ()),
    ]
    mlps = [_mlp(c, width, mixture=mixture) for width in widths]
    like = Block("decoder", n.layers, (n.attention,), mlps[0], "rmsnorm", "sandwich")
    widest = max(attentions, key=lambda attention: attention.head_dim)
    stem += "" if task_type == "CAUSAL_LM" else "Text"
    backbone = decoder_backbone(c, n, stem=stem, layer=first_met(layer), blocks=grouped_blocks(n.layers, attentions, mlps, like))
    scales = [Buffer("embed_tokens.embed_scale", "model", ()), Buffer("layers.{}.layer_scalar", "model", (1,), n.layers)]
    backbone = backbone._replace(
        modules=(*backbone.modules, *(_of_all_layers(c, n, own) if own else ())),
        buffers=(*scales, *_rotary(attentions), *([Buffer("embed_tokens_per_layer.embed_scale", "model", ())] if own else ())),
        logits_ops=("softcap",) if c.raw.get("final_logit_softcapping") is not None else (),
        prompt=n.prompt._replace(num_key_value_heads=widest.num_key_value_heads, head_dim=widest.head_dim),
    )
    return decoder_model(backbone, c, task_type, tasks=("CAUSAL_LM", "FEATURE_EXTRACTION"), tie_word_embeddings=True)


T = TypeVar("T")


def _where(kinds: list[T], kind: T) -> tuple[int, ...]:
    """The layers of a kind."""
    return tuple(layer for layer, other in enumerate(kinds) if other == kind)


def _attentions(c: Fields, n: Dims, window: int) -> list[Attention]:
    """The attention of each layer. The last layer of a kind that has keys and values of its own stores them, whether others
    borrow them or not."""
    last, borrowing = len(n.layers) - 1, c.int("num_kv_shared_layers", default=0, low=0)
    windows = [*layer_windows(c, n.layers, sliding=lambda at: (at + 1) % PATTERN != 0 and at != last, window=window)]
    windows[last] = None
    own = len(n.layers) - borrowing
    if own < 1 or set(windows[:own]) != set(windows):
        raise InputError(f"{c.name}: num_kv_shared_layers", borrowing, "accepted: fewer, so that each kind of attention has keys")
    storing = {max(at for at in range(own) if windows[at] == kind) for kind in set(windows)}
    sliding, as_values = n.attention._replace(qk_norm=True), c.bool("attention_k_eq_v", default=False)
    full = sliding._replace(
        head_dim=c.int("global_head_dim", default=GLOBAL_HEAD_DIM),
        num_key_value_heads=(c.optional_int("num_global_key_value_heads") if as_values else None) or n.kv,
        keys_as_values=as_values,
    )
    return [
        (full if of is None else sliding._replace(window=of))._replace(stores=at in storing, borrows=at >= own)
        for at, of in enumerate(windows)
    ]


def _attention_modules(c: Fields, n: Dims, a: Attention, layers: tuple[int, ...]) -> tuple[Module, ...]:
    """q, k, v, o and the norms of heads, of layers of one kind."""
    bias, name = c.bool("attention_bias", default=False), "layers.{}.self_attn"
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    own = (
        rmsnorm(f"{name}.k_norm", a.head_dim, layers),
        linear(f"{name}.k_proj", n.h, keys, bias, layers),
        *(() if a.keys_as_values else (linear(f"{name}.v_proj", n.h, keys, bias, layers),)),
    )
    return (
        linear(f"{name}.q_proj", n.h, queries, bias, layers),
        rmsnorm(f"{name}.q_norm", a.head_dim, layers),
        *(() if a.borrows else own),
        linear(f"{name}.o_proj", queries, n.h, bias, layers),
    )


def _own_input(n: Dims, own: int) -> tuple[Module, ...]:
    """What reads the input that a layer has of its own."""
    return (
        linear("layers.{}.per_layer_input_gate", n.h, own, layers=n.layers),
        linear("layers.{}.per_layer_projection", own, n.h, layers=n.layers),
        *rmsnorms(n, "post_per_layer_input_norm"),
    )


def _experts(c: Fields, n: Dims) -> list[Module]:
    """The router, whose scores a linear layer makes, the experts, and norms of their own."""
    e, i = c.int("num_experts"), c.int("moe_intermediate_size")
    return [
        Module("layers.{}.router", "Router", (("scale", (n.h,)), ("per_expert_scale", (e,))), n.layers),
        linear("layers.{}.router.proj", n.h, e, layers=n.layers),
        Module("layers.{}.experts", "Experts", (("gate_up_proj", (e, 2 * i, n.h)), ("down_proj", (e, n.h, i))), n.layers),
        *rmsnorms(n, *EXPERT_NORMS),
    ]


def _mlp(c: Fields, width: int, *, mixture: bool) -> Mlp:
    activation = c.str("hidden_activation", default=ACTIVATION)
    if not mixture:
        return Mlp("gated", width, activation)
    e, i = c.int("num_experts"), c.int("moe_intermediate_size")
    top_k = c.int("top_k_experts", high=e)
    router = Router(norm_topk_prob=True)
    return Mlp("moe", i, activation, True, e, top_k, shared_intermediate_size=width, router=router)


def _of_all_layers(c: Fields, n: Dims, own: int) -> tuple[Module, ...]:
    """What makes the inputs that layers have of their own."""
    rows = c.int("vocab_size_per_layer_input", default=262_144)
    return (
        embedding("embed_tokens_per_layer", rows, len(n.layers) * own),
        linear("per_layer_model_projection", n.h, len(n.layers) * own),
        rmsnorm("per_layer_projection_norm", own),
    )


def _rotary(attentions: list[Attention]) -> tuple[Buffer, ...]:
    """Two fp32 tables for each kind of attention, as wide as half of its heads."""
    widths = {attention.window is not None: attention.head_dim for attention in attentions}
    return tuple(
        Buffer(f"rotary_emb.{'sliding' if sliding else 'full'}_attention_{part}", "fp32", (width // 2,))
        for sliding, width in sorted(widths.items())
        for part in ("inv_freq", "original_inv_freq")
    )

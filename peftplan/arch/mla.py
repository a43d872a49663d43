"""DeepSeek-V2 and V3, GLM-4.7-Flash: multi-head latent attention; first dense layers, then layers with routed and shared experts.

Sources: transformers, `models/deepseek_v2/modeling_deepseek_v2.py`, `models/deepseek_v3/modeling_deepseek_v3.py`,
`models/glm4_moe_lite/modeling_glm4_moe_lite.py`; the layers
for multi-token prediction (`num_nextn_predict_layers`) are in the checkpoint but not in the model, and not here either.
"""

from __future__ import annotations

from typing import NamedTuple

from peftplan.arch.blocks import Attention
from peftplan.arch.decoder import Dims, decoder_backbone, first_met, gated_mlp, rmsnorms
from peftplan.arch.fields import REQUIRED, Fields
from peftplan.arch.heads import Backbone, decoder_model
from peftplan.arch.modules import Architecture, Buffer, Module, linear, rmsnorm
from peftplan.arch.moe import NORMS, experts, mixed_blocks, moe_mlp, router
from peftplan.errors import InputError


def deepseek_v2(c: Fields, task_type: str) -> Architecture:
    """DeepSeek-V2: `mlp_bias` on dense and shared experts; the router stays in fp32."""
    ranks = _read_ranks(c, DEEPSEEK_RANKS)
    n = _read_dims(c, ranks)
    shape = _Experts(
        e=c.int("n_routed_experts", "num_experts", default=64),
        i=c.int("moe_intermediate_size", default=1407),
        shared=c.int("n_shared_experts", default=2),
        top_k=c.int("num_experts_per_tok"),
        dense=c.int("first_k_dense_replace", default=0, low=0),
        bias=c.bool("mlp_bias", default=False),
        groups=_groups(c) if c.str("topk_method", default="greedy") == "group_limited_greedy" else (0, 0),
    )
    backbone = _backbone(c, n, ranks, shape, stem="DeepseekV2")._replace(keep_in_fp32_strict=("gate.weight",))
    return decoder_model(backbone, c, task_type, tasks=("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"))


def deepseek_v3(c: Fields, task_type: str) -> Architecture:
    """DeepSeek-V3, R1: as V2, with a score correction for each expert, a buffer in fp32."""
    return decoder_model(_corrected(c, "DeepseekV3", dense=c.int("first_k_dense_replace", default=3, low=0)), c, task_type)


def glm4_moe_lite(c: Fields, task_type: str) -> Architecture:
    """GLM-4.7-Flash: DeepSeek-V3 whose `mlp_layer_types` say which layers are dense: by default the first."""
    types = c.strs("mlp_layer_types", default=())
    dense = types.count("dense") if types else 1
    layers = c.int("num_hidden_layers")
    accepted = ("dense",) * dense + ("sparse",) * (layers - dense)
    if types not in ((), accepted):
        raise InputError(f"{c.name}: mlp_layer_types", list(types), f"accepted: {layers} entries, dense ones before sparse ones")
    backbone = _corrected(c, "Glm4MoeLite", dense=dense)
    assert backbone.prompt is not None
    backbone = backbone._replace(prompt=backbone.prompt._replace(head_dim=None))  # another name of `qk_rope_head_dim`
    return decoder_model(backbone, c, task_type, tasks=("CAUSAL_LM", "FEATURE_EXTRACTION"))


def _corrected(c: Fields, stem: str, *, dense: int) -> Backbone:
    """The backbone of DeepSeek-V3, with the defaults of the class `stem`."""
    default = DEFAULTS[stem]
    ranks = _read_ranks(c, default.ranks)
    c.int("head_dim", default=ranks.rope, low=ranks.rope, high=ranks.rope)
    n = _read_dims(c, ranks)
    shape = _Experts(
        e=c.int("n_routed_experts", "num_local_experts", default=default.experts),
        i=c.int("moe_intermediate_size", default=default.width),
        shared=c.int("n_shared_experts", default=1),
        top_k=c.int("num_experts_per_tok", default=default.top_k),
        dense=dense,
        groups=_groups(c, default=default.groups),
        normed=True,
        interleaved=c.bool("rope_interleave", default=True),
    )
    backbone = _backbone(c, n, ranks, shape, stem=stem)
    sparse = n.layers[shape.dense :]
    bias = (Buffer("layers.{}.mlp.gate.e_score_correction_bias", "fp32", (shape.e,), sparse),) if sparse else ()
    return backbone._replace(buffers=(*bias, *backbone.buffers), keep_in_fp32_strict=("e_score_correction_bias", "gate.weight"))


class _Ranks(NamedTuple):
    """q and kv: ranks of the compressed projections (q None: not compressed); nope, rope, v: dimensions of a head."""

    q: int | None
    kv: int
    nope: int
    rope: int
    v: int


class _Defaults(NamedTuple):
    """What a config class says where a config does not."""

    ranks: _Ranks
    experts: int
    width: int
    top_k: int
    groups: tuple[int, int]


DEEPSEEK_RANKS = _Ranks(q=1536, kv=512, nope=128, rope=64, v=128)
DEFAULTS = {
    "DeepseekV3": _Defaults(DEEPSEEK_RANKS, experts=256, width=2048, top_k=8, groups=(8, 4)),
    "Glm4MoeLite": _Defaults(_Ranks(q=768, kv=512, nope=192, rope=64, v=256), experts=64, width=1536, top_k=4, groups=(1, 1)),
}


class _Experts(NamedTuple):
    """e experts of width i, top_k per token, and `shared` ones that process every token. The first `dense` layers have none.

    `groups`: how many of experts, how many of those each token's come from; `normed`: the class's default for weights that sum to
    one; `interleaved`: how heads are rotated.
    """

    e: int
    i: int
    shared: int
    top_k: int
    dense: int
    bias: bool = False
    groups: tuple[int, int] = (0, 0)
    normed: bool = False
    interleaved: bool = False


def _groups(c: Fields, *, default: tuple[object, object] = (REQUIRED, REQUIRED)) -> tuple[int, int]:
    """Groups of experts, and how many of them a token's experts come from."""
    return c.int("n_group", default=default[0]), c.int("topk_group", default=default[1])


def _read_ranks(c: Fields, default: _Ranks) -> _Ranks:
    return _Ranks(
        q=c.optional_int("q_lora_rank", absent=default.q),
        kv=c.int("kv_lora_rank", default=default.kv),
        nope=c.int("qk_nope_head_dim", default=default.nope),
        rope=c.int("qk_rope_head_dim", default=default.rope),
        v=c.int("v_head_dim", default=default.v),
    )


def _read_dims(c: Fields, ranks: _Ranks) -> Dims:
    """The dimensions. d is the config's `head_dim`, the rotated part. Every query head has keys and values of its own."""
    h, a = c.int("hidden_size"), c.int("num_attention_heads")
    kv = c.int("num_key_value_heads", default=a, low=a, high=a)
    i, v, layers = c.int("intermediate_size"), c.int("vocab_size"), c.layers("num_hidden_layers")
    return Dims(h=h, i=i, v=v, a=a, kv=kv, d=ranks.rope, layers=layers, shown_head_dim=ranks.rope)


def _backbone(c: Fields, n: Dims, ranks: _Ranks, shape: _Experts, *, stem: str) -> Backbone:
    dense, sparse = n.layers[: shape.dense], n.layers[shape.dense :]
    shared = shape.shared * shape.i
    layer = (
        *_attention_modules(n, ranks, bias=c.bool("attention_bias", default=False)),
        *gated_mlp(n.h, n.i, dense, bias=shape.bias),
        experts("layers.{}.mlp.experts", e=shape.e, h=n.h, i=shape.i, layers=sparse),
        router("layers.{}.mlp.gate", e=shape.e, h=n.h, layers=sparse),
        *gated_mlp(n.h, shared, sparse, bias=shape.bias, name="layers.{}.mlp.shared_experts"),
        *rmsnorms(n, *NORMS),
    )
    attention = Attention(n.a, n.kv, ranks.nope + ranks.rope, variant="mla", value_head_dim=ranks.v, rotary_dim=ranks.rope)
    attention = attention._replace(interleaved=shape.interleaved)
    mlp = moe_mlp(c, shape.i, shape.e, shape.top_k, shared=shared, groups=shape.groups, normed=shape.normed)
    blocks = mixed_blocks(c, n, [attention] * len(n.layers), mlp, sparse)
    return decoder_backbone(c, n, stem=stem, layer=first_met(layer), blocks=blocks)


def _attention_modules(n: Dims, ranks: _Ranks, *, bias: bool) -> tuple[Module, ...]:
    """q, compressed or not; keys and values through one low rank plus a rotated part that all heads share; o."""

    def proj(name: str, n_in: int, n_out: int, bias: bool = False) -> Module:
        return linear(f"layers.{{}}.self_attn.{name}", n_in, n_out, bias, n.layers)

    q_width = n.a * (ranks.nope + ranks.rope)
    if ranks.q is None:
        q: tuple[Module, ...] = (proj("q_proj", n.h, q_width),)
    else:
        norm = rmsnorm("layers.{}.self_attn.q_a_layernorm", ranks.q, n.layers)
        q = (proj("q_a_proj", n.h, ranks.q, bias), norm, proj("q_b_proj", ranks.q, q_width))
    return (
        *q,
        proj("kv_a_proj_with_mqa", n.h, ranks.kv + ranks.rope, bias),
        rmsnorm("layers.{}.self_attn.kv_a_layernorm", ranks.kv, n.layers),
        proj("kv_b_proj", ranks.kv, n.a * (ranks.nope + ranks.v)),
        proj("o_proj", n.a * ranks.v, n.h, bias),
    )

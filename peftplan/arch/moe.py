"""Llama-like decoders whose MLP is a mixture of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, GraniteMoE, GLM-4.5, gpt-oss.

transformers (`models/<model_type>/modeling_<model_type>.py`) stores all experts of a layer as two 3-D parameters of one
module, gate and up fused, and the router as a class of its own that is no `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.arch.blocks import Attention, Block, Mlp, Router
from peftplan.arch.decoder import (
    Dims,
    attention_modules,
    decoder_backbone,
    first_met,
    gated_mlp,
    grouped_blocks,
    layer_windows,
    qk_norms,
    read_dims,
    rmsnorms,
    windowed_blocks,
)
from peftplan.arch.fields import Fields
from peftplan.arch.heads import decoder_model, partial_rotary_dim
from peftplan.arch.modules import Architecture, Buffer, Module, linear, rmsnorm
from peftplan.errors import InputError

NORMS = ("input_layernorm", "post_attention_layernorm")


def experts(name: str, *, e: int, h: int, i: int, layers: tuple[int, ...]) -> Module:
    """The fused experts of a layer: e experts of width i, weights (expert, out, in)."""
    return Module(name, "Experts", (("gate_up_proj", (e, 2 * i, h)), ("down_proj", (e, h, i))), layers)


def router(name: str, *, e: int, h: int, layers: tuple[int, ...]) -> Module:
    """The weight that scores e experts."""
    return Module(name, "Router", (("weight", (e, h)),), layers)


def moe_mlp(
    c: Fields, width: int, e: int, top_k: int, *, shared: int = 0, groups: tuple[int, int] | None = None, normed: bool = False
) -> Mlp:
    """A mixture of e experts of `width`, `top_k` per token, beside a shared expert of width `shared` that processes every token.

    `groups`, of classes that have no load-balancing loss: into how many the router sorts experts, and how many of them it
    chooses first. `normed`: the class's default for weights that sum to one.
    """
    if top_k > e:
        accepted = f"accepted: a whole number from 1 to {e}, the number of experts"
        raise InputError(f"{c.name}: num_experts_per_tok", top_k, accepted)
    act = c.str("hidden_act", default="silu")
    sorted_into, chosen = groups or (0, 0)
    router = Router(
        norm_topk_prob=c.bool("norm_topk_prob", default=normed),
        groups=sorted_into,
        chosen=chosen,
        noise=c.number("router_jitter_noise", default=0.0, low=0.0, high=1.0) > 0,
        hands_out=c.bool("output_router_logits", default=False),
        coefficient=None if groups is not None else c.number("router_aux_loss_coef", default=0.001, low=0.0, high=1e6),
    )
    return Mlp("moe", width, act, True, num_experts=e, num_experts_per_tok=top_k, shared_intermediate_size=shared, router=router)


def mixtral(c: Fields, task_type: str) -> Architecture:
    """Mixtral: Mistral with experts in every layer."""
    n = read_dims(c, kv=8)
    e = c.int("num_local_experts", "num_experts", default=8)
    attention = n.attention._replace(window=c.optional_int("sliding_window"))
    mlp = moe_mlp(c, n.i, e, c.int("num_experts_per_tok", default=2))
    backbone = decoder_backbone(
        c,
        n,
        stem="Mixtral",
        layer=(
            *attention_modules(n),
            router("layers.{}.mlp.gate", e=e, h=n.h, layers=n.layers),
            experts("layers.{}.mlp.experts", e=e, h=n.h, i=n.i, layers=n.layers),
            *rmsnorms(n, *NORMS),
        ),
        blocks=(Block("decoder", n.layers, (attention,), mlp, "rmsnorm"),),
    )
    return decoder_model(backbone, c, task_type)


def olmoe(c: Fields, task_type: str) -> Architecture:
    """OLMoE: experts in every layer, `intermediate_size` wide, and an RMSNorm over all heads of q (and of k) at once."""
    n = read_dims(c)
    bias = c.bool("attention_bias", default=False)
    e = c.int("num_experts", "num_local_experts", default=64)
    mlp = moe_mlp(c, n.i, e, c.int("num_experts_per_tok", default=8))
    attention = n.attention._replace(qk_norm=True, clipped=c.raw.get("clip_qkv") is not None)
    backbone = decoder_backbone(
        c,
        n,
        stem="Olmoe",
        layer=(
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            rmsnorm("layers.{}.self_attn.q_norm", n.h, n.layers),
            rmsnorm("layers.{}.self_attn.k_norm", n.h // n.a * n.kv, n.layers),
            router("layers.{}.mlp.gate", e=e, h=n.h, layers=n.layers),
            experts("layers.{}.mlp.experts", e=e, h=n.h, i=n.i, layers=n.layers),
            *rmsnorms(n, *NORMS),
        ),
        blocks=(Block("decoder", n.layers, (attention,), mlp, "rmsnorm"),),
    )
    return decoder_model(backbone, c, task_type, tasks=("CAUSAL_LM", "FEATURE_EXTRACTION"))


def granitemoe(c: Fields, task_type: str) -> Architecture:
    """Granite 3 MoE: experts under `block_sparse_moe`, after the norms; logits are divided by `logits_scaling`."""
    n = read_dims(c)
    bias = c.bool("attention_bias", default=False)
    e = c.int("num_local_experts", default=8)
    mlp = moe_mlp(c, n.i, e, c.int("num_experts_per_tok", default=2))
    backbone = decoder_backbone(
        c,
        n,
        stem="GraniteMoe",
        layer=(
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            *rmsnorms(n, *NORMS),
            router("layers.{}.block_sparse_moe.router", e=e, h=n.h, layers=n.layers),
            experts("layers.{}.block_sparse_moe.experts", e=e, h=n.h, i=n.i, layers=n.layers),
        ),
        blocks=(Block("decoder", n.layers, (n.attention,), mlp, "rmsnorm"),),
    )
    tasks = ("CAUSAL_LM", "FEATURE_EXTRACTION")
    return decoder_model(backbone._replace(logits_ops=("scale",)), c, task_type, tasks=tasks)


def qwen2_moe(c: Fields, task_type: str) -> Architecture:
    """Qwen1.5-MoE, Qwen2-MoE: Qwen2 with experts and one gated shared expert, in all or some layers."""
    n = read_dims(c, kv=16)
    e, i = c.int("num_experts", default=60, low=0), c.int("moe_intermediate_size", default=1408)
    shared = c.int("shared_expert_intermediate_size", default=5632)
    sparse = _sparse_layers(c, n, e)
    layer = (
        *attention_modules(n, qkv_bias=c.bool("qkv_bias", default=True)),
        *gated_mlp(n.h, n.i, _rest(n, sparse)),
        router("layers.{}.mlp.gate", e=e, h=n.h, layers=sparse),
        experts("layers.{}.mlp.experts", e=e, h=n.h, i=i, layers=sparse),
        *gated_mlp(n.h, shared, sparse, name="layers.{}.mlp.shared_expert"),
        linear("layers.{}.mlp.shared_expert_gate", n.h, 1, layers=sparse),
        *rmsnorms(n, *NORMS),
    )
    use = c.bool("use_sliding_window", default=False)
    until = c.int("max_window_layers", default=28, low=0)
    window = c.optional_int("sliding_window", absent=4096) if use else None
    windows = layer_windows(c, n.layers, sliding=lambda at: use and (at + 1) % 2 != 0 and at < until, window=window)
    attentions = [n.attention._replace(window=w) for w in windows]
    mlp = moe_mlp(c, i, e, c.int("num_experts_per_tok", default=4), shared=shared) if sparse else None
    blocks = mixed_blocks(c, n, attentions, mlp, sparse)
    return decoder_model(decoder_backbone(c, n, stem="Qwen2Moe", layer=first_met(layer), blocks=blocks), c, task_type)


def qwen3_moe(c: Fields, task_type: str) -> Architecture:
    """Qwen3-MoE: Qwen3 with experts in all or some layers, no shared expert."""
    n = read_dims(c, kv=4)
    bias = c.bool("attention_bias", default=False)
    e, i = c.int("num_experts", "num_local_experts", default=128, low=0), c.int("moe_intermediate_size", default=768)
    sparse = _sparse_layers(c, n, e)
    layer = (
        *attention_modules(n, qkv_bias=bias, o_bias=bias),
        *qk_norms(n),
        *gated_mlp(n.h, n.i, _rest(n, sparse)),
        experts("layers.{}.mlp.experts", e=e, h=n.h, i=i, layers=sparse),
        router("layers.{}.mlp.gate", e=e, h=n.h, layers=sparse),
        *rmsnorms(n, *NORMS),
    )
    window = c.optional_int("sliding_window", absent=4096) if c.bool("use_sliding_window", default=False) else None
    attentions = [n.attention._replace(qk_norm=True, window=window)] * len(n.layers)
    mlp = moe_mlp(c, i, e, c.int("num_experts_per_tok", default=8)) if sparse else None
    blocks = mixed_blocks(c, n, attentions, mlp, sparse)
    return decoder_model(decoder_backbone(c, n, stem="Qwen3Moe", layer=first_met(layer), blocks=blocks), c, task_type)


def glm4_moe(c: Fields, task_type: str) -> Architecture:
    """GLM-4.5 and later: first dense layers, then experts beside shared ones; half of a head is rotated. The layers for
    multi-token prediction are in the checkpoint but not in the model, and not here either."""
    n = read_dims(c, kv=8)
    bias, normed = c.bool("attention_bias", default=False), c.bool("use_qk_norm", default=False)
    e, i = c.int("n_routed_experts", "num_local_experts", default=128), c.int("moe_intermediate_size", default=1408)
    shared = i * c.int("n_shared_experts", default=1)
    dense = c.int("first_k_dense_replace", default=1, low=0)
    sparse = n.layers[dense:]
    layer = (
        *attention_modules(n, qkv_bias=bias),
        *(qk_norms(n) if normed else ()),
        *gated_mlp(n.h, n.i, n.layers[:dense]),
        experts("layers.{}.mlp.experts", e=e, h=n.h, i=i, layers=sparse),
        router("layers.{}.mlp.gate", e=e, h=n.h, layers=sparse),
        *gated_mlp(n.h, shared, sparse, name="layers.{}.mlp.shared_experts"),
        *rmsnorms(n, *NORMS),
    )
    groups = (c.int("n_group", default=1), c.int("topk_group", default=1))
    mlp = moe_mlp(c, i, e, c.int("num_experts_per_tok", default=8), shared=shared, groups=groups, normed=True)
    blocks = mixed_blocks(c, n, [n.attention._replace(qk_norm=normed)] * len(n.layers), mlp, sparse)
    rotary_dim = partial_rotary_dim(c, n.d, default=0.5)
    backbone = decoder_backbone(c, n, stem="Glm4Moe", layer=first_met(layer), blocks=blocks, rotary_dim=rotary_dim)
    correction = (Buffer("layers.{}.mlp.gate.e_score_correction_bias", "fp32", (e,), sparse),) if sparse else ()
    backbone = backbone._replace(
        buffers=(*correction, *backbone.buffers), keep_in_fp32_strict=("e_score_correction_bias", "gate.weight")
    )
    return decoder_model(backbone, c, task_type, tasks=("CAUSAL_LM", "FEATURE_EXTRACTION"))


def gpt_oss(c: Fields, task_type: str) -> Architecture:
    """gpt-oss: biases everywhere, an attention sink per head, a window in every other layer; eager attention only.

    Its experts' weights are (expert, in, out); the activation is a clamped SwiGLU of its own, whatever `hidden_act` says.
    """
    n = read_dims(c, kv=8, head_dim=64)
    bias = c.bool("attention_bias", default=True)
    e = c.int("num_local_experts", "num_experts", default=128)
    windows = layer_windows(
        c, n.layers, sliding=lambda at: (at + 1) % 2 != 0, window=c.optional_int("sliding_window", absent=128)
    )
    mlp = moe_mlp(c, n.i, e, c.int("num_experts_per_tok", default=4))._replace(activation="clamped_swiglu")
    block = Block("decoder", n.layers, (n.attention._replace(sinks=True),), mlp, "rmsnorm")
    backbone = decoder_backbone(
        c,
        n,
        stem="GptOss",
        layer=(
            Module("layers.{}.self_attn", "Module", (("sinks", (n.a,)),), n.layers),
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            *_gpt_oss_experts(n, e),
            *rmsnorms(n, *NORMS),
        ),
        blocks=windowed_blocks(block, windows),
    )
    backbone = backbone._replace(supports_sdpa=False, keep_in_fp32=(*NORMS, "norm"))
    return decoder_model(backbone, c, task_type)


def mixed_blocks(
    c: Fields, n: Dims, attentions: Iterable[Attention], mlp: Mlp | None, sparse: tuple[int, ...]
) -> tuple[Block, ...]:
    """Pre-norm blocks in which the `sparse` layers have the mixture `mlp`, and the others a gated MLP."""
    dense = Mlp("gated", n.i, c.str("hidden_act", default="silu"))
    mlps = [mlp if mlp and layer in sparse else dense for layer in n.layers]
    return grouped_blocks(n.layers, attentions, mlps, Block("decoder", n.layers, (), dense, "rmsnorm"))


def _gpt_oss_experts(n: Dims, e: int) -> tuple[Module, ...]:
    """gpt-oss's router and experts, each with biases."""
    weights = (
        ("gate_up_proj", (e, n.h, 2 * n.i)),
        ("gate_up_proj_bias", (e, 2 * n.i)),
        ("down_proj", (e, n.i, n.h)),
        ("down_proj_bias", (e, n.h)),
    )
    return (
        Module("layers.{}.mlp.router", "Router", (("weight", (e, n.h)), ("bias", (e,))), n.layers),
        Module("layers.{}.mlp.experts", "ExpertsTransposed", weights, n.layers),
    )


def _sparse_layers(c: Fields, n: Dims, e: int) -> tuple[int, ...]:
    """Qwen's rule: every `decoder_sparse_step`-th layer has experts, except those in `mlp_only_layers`."""
    step = c.int("decoder_sparse_step", default=1)
    dense = c.ints("mlp_only_layers", default=())
    return tuple(layer for layer in n.layers if e and layer not in dense and (layer + 1) % step == 0)


def _rest(n: Dims, sparse: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(layer for layer in n.layers if layer not in sparse)

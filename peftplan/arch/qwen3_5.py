"""Qwen 3.5 (text), dense and with experts, and Qwen 3 Next: each layer is gated attention or a gated delta rule.

Source: transformers, `models/{qwen3_5,qwen3_5_moe,qwen3_next}/modeling_*.py` and the config classes' defaults beside them.
"""

from __future__ import annotations

from peftplan.arch.blocks import Block, DeltaRule, Mlp
from peftplan.arch.decoder import Dims, decoder_backbone, first_met, gated_mlp, qk_norms, read_dims, rmsnorms
from peftplan.arch.fields import Fields
from peftplan.arch.heads import decoder_model, partial_rotary_dim
from peftplan.arch.modules import Architecture, Module, linear, rmsnorm
from peftplan.arch.moe import NORMS, experts, moe_mlp, router
from peftplan.errors import InputError

LAYER_TYPES = ("linear_attention", "full_attention")
HEAD_DIM = 256
ROTATED = 0.25
"""The part of a head that is rotated."""
NAME = "layers.{}.linear_attn"


def qwen3_5_text(c: Fields, task_type: str) -> Architecture:
    """Qwen 3.5: every fourth layer is attention, unless `layer_types` says otherwise."""
    n = read_dims(c, kv=4, head_dim=HEAD_DIM)
    mlp = Mlp("gated", n.i, c.str("hidden_act", default="silu"))
    return _model(c, n, mlp, gated_mlp(n.h, n.i, n.layers), task_type, stem="Qwen3_5")


def qwen3_5_moe_text(c: Fields, task_type: str) -> Architecture:
    """The same with experts whose weights sum to one, beside a gated shared one, in every layer."""
    n = read_dims(c, kv=2, head_dim=HEAD_DIM, width=("moe_intermediate_size",))
    e, shared = c.int("num_experts", default=256), c.int("shared_expert_intermediate_size", default=512)
    mlp = moe_mlp(c, n.i, e, c.int("num_experts_per_tok", default=8), shared=shared)
    mlp = mlp._replace(router=mlp.router._replace(norm_topk_prob=True))
    return _model(c, n, mlp, _experts(n, e, shared), task_type, stem="Qwen3_5Moe")


def qwen3_next(c: Fields, task_type: str) -> Architecture:
    """Qwen 3 Next, whose delta rule has two projections in place of four. Raises InputError for layers without experts."""
    if c.strs("mlp_only_layers", default=()) or c.int("decoder_sparse_step", default=1) != 1:
        raise InputError(f"{c.name}: mlp_only_layers", "layers without experts", "accepted: experts in every layer")
    n = read_dims(c, kv=2, head_dim=HEAD_DIM, width=("moe_intermediate_size",))
    e, shared = c.int("num_experts", default=512), c.int("shared_expert_intermediate_size", default=512)
    mlp = moe_mlp(c, n.i, e, c.int("num_experts_per_tok", default=10), shared=shared)
    mlp = mlp._replace(router=mlp.router._replace(norm_topk_prob=c.bool("norm_topk_prob", default=True)))
    return _model(c, n, mlp, _experts(n, e, shared), task_type, stem="Qwen3Next", joined=True)


def _experts(n: Dims, e: int, shared: int) -> tuple[Module, ...]:
    return (
        router("layers.{}.mlp.gate", e=e, h=n.h, layers=n.layers),
        experts("layers.{}.mlp.experts", e=e, h=n.h, i=n.i, layers=n.layers),
        *gated_mlp(n.h, shared, n.layers, name="layers.{}.mlp.shared_expert"),
        linear("layers.{}.mlp.shared_expert_gate", n.h, 1, layers=n.layers),
    )


def _model(
    c: Fields, n: Dims, mlp: Mlp, of_mlp: tuple[Module, ...], task_type: str, *, stem: str, joined: bool = False
) -> Architecture:
    """`joined`: the delta rule has one projection of queries, keys, values and gate, and one of both rates."""
    mixing, attending = _layers(c, n)
    rule = _rule(c)
    blocks = (
        Block("decoder", mixing, (), mlp, "rmsnorm", delta_rule=rule),
        Block("decoder", attending, (n.attention._replace(qk_norm=True),), mlp, "rmsnorm"),
    )
    backbone = decoder_backbone(
        c,
        n,
        stem=stem,
        layer=first_met((*_mixer(n, rule, mixing, joined=joined), *_attention(c, n, attending), *of_mlp, *rmsnorms(n, *NORMS))),
        blocks=tuple(block for block in blocks if block.layers),
        rotary_dim=partial_rotary_dim(c, n.d, default=ROTATED),
    )
    return decoder_model(backbone, c, task_type, tasks=("CAUSAL_LM",))


def _layers(c: Fields, n: Dims) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers with a delta rule, and with attention. Raises InputError for another type, or another number of them."""
    every = c.int("full_attention_interval", default=4)
    types = c.strs("layer_types", default=tuple(LAYER_TYPES[(layer + 1) % every == 0] for layer in n.layers))
    if len(types) != len(n.layers) or not set(types) <= set(LAYER_TYPES):
        accepted = f"accepted: {len(n.layers)} entries (num_hidden_layers), each {' or '.join(LAYER_TYPES)}"
        raise InputError(f"{c.name}: layer_types", list(types), accepted)
    mixing, attending = (tuple(layer for layer in n.layers if types[layer] == kind) for kind in LAYER_TYPES)
    return mixing, attending


def _rule(c: Fields) -> DeltaRule:
    """The heads of the delta rule."""
    rule = DeltaRule(
        key_heads=c.int("linear_num_key_heads", default=16),
        value_heads=c.int("linear_num_value_heads", default=32),
        key_dim=c.int("linear_key_head_dim", default=128),
        value_dim=c.int("linear_value_head_dim", default=128),
        taps=c.int("linear_conv_kernel_dim", default=4),
    )
    c.divide("linear_num_value_heads", rule.value_heads, "linear_num_key_heads", rule.key_heads)
    return rule


def _mixer(n: Dims, rule: DeltaRule, layers: tuple[int, ...], *, joined: bool) -> tuple[Module, ...]:
    """The delta rule between its projections."""
    heads = rule.value_heads
    widths = {"qkv": rule.channels, "z": rule.width, "b": heads, "a": heads}
    if joined:
        widths = {"qkvz": rule.channels + rule.width, "ba": 2 * heads}
    projections = tuple(linear(f"{NAME}.in_proj_{part}", n.h, width, layers=layers) for part, width in widths.items())
    own = (
        Module(NAME, "Module", (("dt_bias", (heads,)), ("A_log", (heads,))), layers),
        Module(f"{NAME}.conv1d", "Conv1d", (("weight", (rule.channels, 1, rule.taps)),), layers),
    )
    ends = rmsnorm(f"{NAME}.norm", rule.value_dim, layers), linear(f"{NAME}.out_proj", rule.width, n.h, layers=layers)
    return (*own, *projections, *ends) if joined else (*own, *ends, *projections)


def _attention(c: Fields, n: Dims, layers: tuple[int, ...]) -> tuple[Module, ...]:
    """q and its gate in one matrix, k, v and o, and an RMSNorm on each head of q and k."""
    bias, name = c.bool("attention_bias", default=False), "layers.{}.self_attn"
    return (
        linear(f"{name}.q_proj", n.h, 2 * n.a * n.d, bias, layers),
        linear(f"{name}.k_proj", n.h, n.kv * n.d, bias, layers),
        linear(f"{name}.v_proj", n.h, n.kv * n.d, bias, layers),
        linear(f"{name}.o_proj", n.a * n.d, n.h, bias, layers),
        *(norm._replace(layers=layers) for norm in qk_norms(n)),
    )

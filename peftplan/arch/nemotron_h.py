"""Nemotron-H: each layer is one of Mamba 2, attention without positions, an MLP without gate, or a mixture of such experts.

Source: transformers, `models/nemotron_h/modeling_nemotron_h.py` and the config class's defaults beside it.
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention, Block, Mlp, Router, StateSpace
from peftplan.arch.decoder import first_met
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, decoder_model, probability
from peftplan.arch.llama import BARE
from peftplan.arch.modules import Architecture, Buffer, Dropout, Module, PromptDims, embedding, linear, rmsnorm
from peftplan.errors import InputError

OF_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
"""Letters of `hybrid_override_pattern`."""
LEGACY = {"mamba": "linear_attention", "attention": "full_attention"}
"""Names of kinds in older configs."""
NAME = "layers.{}.mixer"


def nemotron_h(c: Fields, task_type: str) -> Architecture:
    """Nemotron-H, Nemotron Nano 2 and Nemotron 3."""
    types = _types(c)
    mamba, attending, plain, sparse = (
        tuple(layer for layer, kind in enumerate(types) if kind == wanted)
        for wanted in ("linear_attention", "full_attention", "mlp", "moe")
    )
    h, v = c.int("hidden_size", default=4096), c.int("vocab_size", default=131072)
    a = c.int("num_attention_heads", default=32)
    attention = Attention(
        a, c.optional_int("num_key_value_heads", absent=8) or a, c.int("head_dim", default=128), positions="none"
    )
    i, act = c.int("intermediate_size", default=21504), c.str("mlp_hidden_act", default="relu2")
    space = StateSpace(
        num_heads=c.int("mamba_num_heads", default=128),
        head_dim=c.int("mamba_head_dim", default=64),
        groups=c.int("n_groups", "mamba_n_groups", default=8),
        state_size=c.int("ssm_state_size", default=128),
        chunk_size=c.int("chunk_size", "mamba_chunk_size", default=128),
    )
    mlp = Mlp("plain", i, act)
    blocks = (
        Block("decoder", attending, (attention,), mlp, "rmsnorm"),
        Block("decoder", mamba, (), mlp, "rmsnorm", state_space=space),
        Block("decoder", plain, (), mlp, "rmsnorm"),
        Block("decoder", sparse, (), _mixture(c, act), "rmsnorm"),
    )
    layer = (
        rmsnorm("layers.{}.norm", h, tuple(range(len(types)))),
        *_mamba(c, h, space, mamba),
        *_experts(c, h, sparse),
        *_mlp(c, NAME, h, i, plain),
        *_attention(h, attention, attending),
    )
    corrected = Buffer(f"{NAME}.gate.e_score_correction_bias", "fp32", (c.int("n_routed_experts", default=8),), sparse)
    backbone = Backbone(
        model_type="nemotron_h",
        stem="NemotronH",
        prefix="model",
        modules=(embedding("embeddings", v, h), *first_met(layer), rmsnorm("norm_f", h)),
        blocks=tuple(block for block in blocks if block.layers),
        hidden_size=h,
        vocab_size=v,
        embedding="embeddings",
        buffers=(corrected,) if sparse else (),
        logits_ops=("float",),
        keep_in_fp32_strict=("e_score_correction_bias", "gate.weight"),
        prompt=PromptDims(len(types), h, a, num_key_value_heads=attention.num_key_value_heads, head_dim=attention.head_dim),
        dropout=Dropout(attention=probability(c, "attention_dropout")),
    )
    return decoder_model(backbone, c, task_type, tasks=BARE)


def _types(c: Fields) -> tuple[str, ...]:
    """The kind of each layer. Raises InputError for another."""
    pattern = c.str("hybrid_override_pattern", default="")
    stated = tuple(OF_PATTERN.get(letter, letter) for letter in pattern)
    types = tuple(LEGACY.get(kind, kind) for kind in c.strs("layers_block_type", "layer_types", default=stated))
    if not types or not set(types) <= set(OF_PATTERN.values()):
        accepted = f"accepted: a letter for each layer, of {' '.join(OF_PATTERN)}"
        raise InputError(f"{c.name}: hybrid_override_pattern", pattern or list(types), accepted)
    return types


def _mamba(c: Fields, h: int, space: StateSpace, layers: tuple[int, ...]) -> tuple[Module, ...]:
    """A projection to gate, inputs of the convolution and time steps, and one back."""
    bias, heads = c.bool("use_bias", default=False), space.num_heads
    beside = (("bias", (space.channels,)),) if c.bool("use_conv_bias", "mamba_conv_bias", default=True) else ()
    taps = c.int("conv_kernel", "mamba_d_conv", default=4)
    return (
        Module(NAME, "Module", (("dt_bias", (heads,)), ("A_log", (heads,)), ("D", (heads,))), layers),
        Module(f"{NAME}.conv1d", "Conv1d", (("weight", (space.channels, 1, taps)), *beside), layers),
        linear(f"{NAME}.in_proj", h, space.width + space.channels + heads, bias, layers),
        rmsnorm(f"{NAME}.norm", space.width, layers),
        linear(f"{NAME}.out_proj", space.width, h, bias, layers),
    )


def _attention(h: int, a: Attention, layers: tuple[int, ...]) -> tuple[Module, ...]:
    q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    return (
        linear(f"{NAME}.q_proj", h, q, layers=layers),
        linear(f"{NAME}.k_proj", h, kv, layers=layers),
        linear(f"{NAME}.v_proj", h, kv, layers=layers),
        linear(f"{NAME}.o_proj", q, h, layers=layers),
    )


def _mlp(c: Fields, name: str, h: int, i: int, layers: tuple[int, ...]) -> tuple[Module, ...]:
    bias = c.bool("mlp_bias", default=False)
    return linear(f"{name}.up_proj", h, i, bias, layers), linear(f"{name}.down_proj", i, h, bias, layers)


def _mixture(c: Fields, act: str) -> Mlp:
    """Experts that the router chooses by sigmoid scores, within groups, and shared ones."""
    return Mlp(
        "moe",
        c.int("moe_intermediate_size", default=7688),
        act,
        num_experts=c.int("n_routed_experts", default=8),
        num_experts_per_tok=c.int("num_experts_per_tok", default=2),
        shared_intermediate_size=c.int("moe_shared_expert_intermediate_size", default=7688),
        router=Router(
            norm_topk_prob=c.bool("norm_topk_prob", default=True),
            groups=c.int("n_group", default=1),
            chosen=c.int("topk_group", default=1),
        ),
    )


def _experts(c: Fields, h: int, layers: tuple[int, ...]) -> tuple[Module, ...]:
    """Experts without gate, in a latent space where the config has one."""
    mlp, bias = _mixture(c, ""), c.bool("mlp_bias", default=False)
    latent = c.optional_int("moe_latent_size")
    width = latent or h
    e, i = mlp.num_experts, mlp.intermediate_size
    between = (
        ()
        if latent is None
        else (
            linear(f"{NAME}.fc1_latent_proj", h, width, bias, layers),
            linear(f"{NAME}.fc2_latent_proj", width, h, bias, layers),
        )
    )
    return (
        Module(f"{NAME}.experts", "Experts", (("up_proj", (e, i, width)), ("down_proj", (e, width, i))), layers),
        Module(f"{NAME}.gate", "Router", (("weight", (e, h)),), layers),
        *_mlp(c, f"{NAME}.shared_experts", h, mlp.shared_intermediate_size, layers),
        *between,
    )

"""Tensor parallelism as transformers does it: which part of each matrix a rank stores.

Source: transformers, `base_model_tp_plan` of each model's config and `_tp_plan` of its class; distributed/mixin.py
(`init_parallel_plans`), distributed/tensor_parallel.py (`ColwiseParallel`, `RowwiseParallel`, `EmbeddingParallel`); peft,
tuners/lora/model.py (`add_lora_tp_hooks_dtensor`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from peftplan.arch.blocks import Attention
from peftplan.arch.modules import Architecture
from peftplan.distributed.expert_parallel import owned, owners, reshaped
from peftplan.distributed.pipeline import num_layers, on_stages, stages_of
from peftplan.distributed.strategy import Distributed
from peftplan.parameters import Parameter, Parameters
from peftplan.units import ceil_div

Style = Literal["colwise", "colwise_gather_output", "rowwise", "rowwise_split_input", "rowwise_whole_input", "embedding_rowwise"]
"""`colwise` divides the outputs of a layer over the ranks, `rowwise` its inputs. `gather_output`: every rank gets all outputs;
`split_input`: every rank has all inputs and takes its part; `whole_input`: the product itself takes it."""
Plan = Mapping[str, Style]
"""Module of a layer → style."""

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION: Plan = {**dict.fromkeys(PROJECTIONS, "colwise"), "self_attn.o_proj": "rowwise"}
GATED: Plan = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
FUSED: Plan = {"mlp.gate_up_proj": "colwise_gather_output", "mlp.down_proj": "rowwise_split_input"}
WHOLE_HEADS: Plan = {**dict.fromkeys(PROJECTIONS, "colwise_gather_output"), "self_attn.o_proj": "rowwise_split_input"}
LLAMA: Plan = {**ATTENTION, **GATED}
PLANS: dict[str, Plan] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo"), LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "cohere", "cohere2"), LLAMA),
    "olmo2": {**WHOLE_HEADS, **GATED},
    "phi3": {"self_attn.qkv_proj": "colwise_gather_output", "self_attn.o_proj": "rowwise_split_input", **FUSED},
    "glm4": {**ATTENTION, **FUSED},
    "starcoder2": {**ATTENTION, "mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"},
    "phi": {
        **dict.fromkeys((*PROJECTIONS, "mlp.fc1"), "colwise"),
        **dict.fromkeys(("self_attn.dense", "mlp.fc2"), "rowwise"),
    },
    "gptj": {
        **dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), "colwise"),
        **dict.fromkeys(("attn.out_proj", "mlp.fc_out"), "rowwise"),
    },
    "gpt_neox": {
        "attention.query_key_value": "colwise",
        "attention.dense": "rowwise",
        "mlp.dense_h_to_4h": "colwise",
        "mlp.dense_4h_to_h": "rowwise",
    },
}
"""Model type → plan of its layers. Norms of heads (`replicated_with_grad_allreduce`) stay whole."""
UNPLANNED = (
    *("stablelm", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "bloom", "mpt", "falcon", "mamba", "falcon_mamba", "rwkv", "zamba2"),
    *("bert", "roberta", "xlm-roberta", "distilbert", "deberta-v2", "modernbert", "bart", "whisper", "t5", "mt5"),
    *("vit", "clip", "dinov2"),
)
"""Model types whose config and class state no plan."""
ATTENTION_ALONE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v32", "glm", "glm4_moe", "glm_moe_dsa", "nemotron"),
    *("gemma3", "gemma3n", "gemma4", "gemma4_unified", "internlm3", "llama4", "qwen2_vl", "qwen2_5_vl", "qwen3_next"),
    *("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
)
"""Model types without a plan here whose attention transformers divides by heads (`base_model_tp_plan` of their configs, or of
that of the text model in them)."""


BY_AUTOMODEL: dict[str, Plan] = {
    "phi3": {
        "self_attn.qkv_proj": "rowwise_split_input",
        "self_attn.o_proj": "colwise_gather_output",
        "mlp.gate_up_proj": "colwise",
        "mlp.down_proj": "rowwise_whole_input",
    },
    "phi": PLANS["phi"],
    **dict.fromkeys(("seed_oss", "ministral3", "gemma4"), LLAMA),
    "mixtral": ATTENTION,
    "qwen3_5": {
        **LLAMA,
        **{f"linear_attn.{name}": "colwise_gather_output" for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")},
        "linear_attn.out_proj": "colwise_gather_output",
    },
    "falcon_h1": {
        **ATTENTION,
        **{name.replace("mlp", "feed_forward"): style for name, style in GATED.items()},
    },
}
"""Plans of NeMo Automodel for models that it does not build (components/distributed/optimized_tp_plans.py), and those of
transformers where it has none. With its own, logits stay divided."""
WHOLE_LOGITS = ("seed_oss", "mixtral", "falcon_h1", "qwen3_5")
"""Model types without a plan of its own: transformers' gathers the logits (parallelizer.py, `get_hf_tp_shard_plan`), and so does
that of all others (`_get_parallel_plan`), which Mixtral has because of its experts, and which leaves them whole. Falcon-H1's
own plan gathers them too (optimized_tp_plans.py, `_parallelize_falcon_h1`)."""
WHOLE_TABLES = ("qwen3_5",)
"""Model types whose embedding and head every rank has, since the plan names the embedding as text models do."""
COPIED_SUMS = ("gemma4",)
"""Model types whose sums over ranks are copies of copies instead of DTensors, of which the latest is held
(components/models/gemma4_moe/parallelization.py, `_ReduceFromTensorParallelRegion`)."""
BESIDE_FSDP2: dict[str, Plan] = PLANS | BY_AUTOMODEL


def ranks_of(distributed: Distributed) -> int:
    """The number of ranks that share a matrix."""
    return distributed.divided


def plans_of(distributed: Distributed) -> dict[str, Plan]:
    """The plans that divide a model's layers: beside FSDP2 those of NeMo Automodel, where they are known."""
    return BESIDE_FSDP2 if distributed.strategy == "fsdp2" else PLANS


def style_of(architecture: Architecture, module: str, plans: Mapping[str, Plan] = PLANS) -> Style | None:
    """How a module is divided; None: every rank has all of it."""
    if architecture.model_type not in plans:
        return None
    tables = (architecture.input_embedding, architecture.output_embedding)
    if plans is not PLANS and architecture.model_type in WHOLE_TABLES and module in tables:
        return None
    if module == architecture.input_embedding:
        return "embedding_rowwise"
    if module == architecture.output_embedding:
        return "colwise_gather_output" if plans is PLANS or architecture.model_type in WHOLE_LOGITS else "colwise"
    _, layered, of_layer = module.partition("{}.")
    return plans[architecture.model_type].get(of_layer) if layered else None


def divides_heads(architecture: Architecture, plans: Mapping[str, Plan] = PLANS) -> bool:
    """Whether each rank computes its part of the attention heads."""
    plan = plans.get(architecture.model_type, {})
    return any(style == "colwise" for module, style in plan.items() if "attn" in module or "attention" in module)


def architecture_on_rank(architecture: Architecture, distributed: Distributed) -> Architecture:
    """The architecture with the heads that a rank computes."""
    ranks = ranks_of(distributed)
    if ranks == 1 or not divides_heads(architecture, plans_of(distributed)):
        return architecture
    blocks = (b._replace(attentions=tuple(_heads(a, ranks) for a in b.attentions)) for b in architecture.blocks)
    return replace(architecture, blocks=tuple(blocks))


def _heads(a: Attention, ranks: int) -> Attention:
    return a._replace(num_attention_heads=a.num_attention_heads // ranks, num_key_value_heads=a.num_key_value_heads // ranks)


def shards_of(parameters: Parameters, architecture: Architecture, distributed: Distributed, rank: int = 0) -> Parameters:
    """The part of each parameter that a rank holds: ⌈n/W⌉ of the divided dim, of which the last ranks may have less."""
    ranks, stages = ranks_of(distributed), distributed.pp_size or 1
    _, position = distributed.place(rank) if rank else (0, 0)
    if owners(distributed) > 1:
        parameters = parameters._replace(all=tuple(owned(p, distributed) for p in parameters.all))
    if ranks == stages == 1:
        return parameters
    if stages > 1:
        of_rank = stages_of(distributed, num_layers(parameters.all), rank)
        parameters = parameters._replace(all=tuple(on_stages(parameters.all, architecture, of_rank)))
    dims = ((p, divided_dim(p, architecture, plans_of(distributed))) for p in parameters.all)
    return parameters._replace(all=tuple(_shard(p, dim, ranks, position) for p, dim in dims))


def largest_stage(parameters: Sequence[Parameter], stages: int) -> int:
    """The stage of a pipeline that holds most: the last one has the norm, the first one another layer if they do not divide."""
    return 0 if num_layers(parameters) % stages else stages - 1


def rows_of(rows: int, ranks: int, position: int) -> int:
    """Rows of the chunk of a dim at a position among these ranks, which may be none (`torch.chunk`)."""
    chunk = ceil_div(rows, ranks)
    return max(0, min(chunk, rows - position * chunk)) if position else chunk


def _shard(p: Parameter, dim: int | None, ranks: int, position: int) -> Parameter:
    if dim is None or ranks == 1:
        return p
    return reshaped(p, (*p.shape[:dim], rows_of(p.shape[dim], ranks, position), *p.shape[dim + 1 :]))


def divided_dim(p: Parameter, architecture: Architecture, plans: Mapping[str, Plan]) -> int | None:
    """The dim of a parameter that is divided over the ranks. Of a pair of LoRA's matrices it is the one that the base layer's
    divided dim belongs to; beside a layer that gathers or splits, peft leaves both whole. NeMo Automodel divides both matrices
    as it divides the base layer (components/distributed/parallel_styles.py). Of a model without a plan here, whose step has no
    formula, each rank counts a part of everything: what it certainly holds."""
    if architecture.model_type not in plans:
        return max(range(len(p.shape)), key=p.shape.__getitem__, default=None)
    module, _, leaf = p.name.rpartition(".")
    if p.owner == "adapter":
        base, _, matrix = module.rpartition(".")
        of_base = style_of(architecture, base, plans) or ""
        if plans is BESIDE_FSDP2 and matrix in ("lora_A", "lora_B"):
            return 0 if of_base.startswith("colwise") else 1 if of_base.startswith("rowwise") else None
        of_matrix = {"colwise": "lora_B", "rowwise": "lora_A"}.get(of_base)
        return None if matrix != of_matrix else (0 if matrix == "lora_B" else 1)
    style = style_of(architecture, module, plans)
    if style is None:
        return None
    if style.startswith("rowwise"):
        return 1 if leaf == "weight" else None
    return 0

"""Models that a trainer builds of its own modules: their buffers, and what of a job has no formula then.

Source: torchtune at bd2a0fc7, modules/position_embeddings.py, models/{llama3_1,qwen2}/_position*_embeddings.py, and
models/*/_model_builders.py (`max_seq_len`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.decoder import read_dims
from peftplan.arch.fields import Fields
from peftplan.arch.heads import partial_rotary_dim
from peftplan.arch.modules import VALUE_HEAD, Architecture, Buffer, Module, linear
from peftplan.arch.moe import mixed_blocks, moe_mlp
from peftplan.arch.readers import read_config
from peftplan.errors import InputError
from peftplan.job.kernels import INT8_INT4, OF_PACKAGE
from peftplan.methods.adaptation import Adaptation, trained_params
from peftplan.optim import parse_optim
from peftplan.versions import EXPERTS_FUSED, MIXTURE_ADDED

if TYPE_CHECKING:
    from peftplan.job.job import Job
    from peftplan.job.script import Script

BUILT = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2")
"""Model types whose forward is written as torchtune has it (`memory.models.torchtune`)."""
APART = ("phi3",)
"""Of these, model types whose fused projections torchtune has apart, as Llama has them."""
EAGER = ("gemma2",)
"""Of these, model types whose attention is plain operations, whatever `attn_implementation` says."""
MOST_POSITIONS = {"qwen2": 32768}
"""Rows of the rotary table at most; else those of the model's config."""


def as_torchtune_builds(architecture: Architecture, config: Mapping[str, object], *, adapted: bool) -> Architecture:
    """The architecture with torchtune's buffers: fp32 rotary tables.

    Layers share one, but builders with adapters make one in each layer (`lora_…_self_attention`), those of Llama 3.1 and later
    excepted.
    """
    if architecture.model_type in APART:
        architecture = _with_parts_apart(architecture, config)
    if architecture.model_type not in BUILT or not architecture.blocks:
        return architecture
    positions, width = config.get("max_position_embeddings"), architecture.blocks[0].attentions[0].head_dim
    if not isinstance(positions, int):
        return architecture
    rows = min(positions, MOST_POSITIONS.get(architecture.model_type, positions))
    of_halves = architecture.model_type in ("qwen2", "qwen3", *APART)
    table = (rows, 2 * width) if of_halves else (rows, width // 2, 2)
    scaled = config.get("rope_scaling") or config.get("rope_parameters") or {}
    shared = not adapted or (isinstance(scaled, Mapping) and scaled.get("rope_type") == "llama3")
    name = f"layers.{0 if shared else '{}'}.attn.pos_embeddings"
    layers = None if shared else tuple(layer for block in architecture.blocks for layer in block.layers)
    buffers = (Buffer(f"{name}.theta", "fp32", (width // 2,), layers), Buffer(f"{name}.cache", "fp32", table, layers))
    return replace(architecture, buffers=buffers)


def as_unsloth_loads(
    architecture: Architecture, config: Mapping[str, object], *, in_4_bits: bool, separate: bool = False
) -> Architecture:
    """The architecture of the checkpoint that Unsloth loads in its place: Phi-3's is Mistral's there; in 4 bits the experts of
    gpt-oss are linear layers, and so they are quantized. `separate`: beside a transformers that had a list of experts. Raises
    InputError for `separate` and another model type than ERNIE's.

    Source: unsloth 2026.10.9, models/mapper.py (`unsloth/Phi-3-medium-4k-instruct`), whose printed counts are those of seven
    projections; unsloth_zoo 2026.10.9, temporary_patches/gpt_oss.py (`GptOssExpertsBnb4bit`).
    """
    if architecture.model_type == "gpt_oss" and in_4_bits:
        modules = (m._replace(kind="ExpertsApart") if m.kind == "ExpertsTransposed" else m for m in architecture.modules)
        return replace(architecture, modules=tuple(modules))
    if separate:  # beside that release norms stay in 16 bits
        if architecture.model_type not in OF_PACKAGE["unsloth-experts"]:
            accepted = f"accepted: only for model type {', '.join(OF_PACKAGE['unsloth-experts'])}, not {architecture.model_type}"
            raise InputError("kernels", "unsloth-experts", accepted)
        in_fp32 = ("e_score_correction_bias",)
        apart = with_experts_apart(architecture, None)
        return replace(apart, blocks=blocks_of_ernie(config, architecture.name), keep_in_fp32_strict=in_fp32)
    if architecture.model_type not in APART:
        return architecture
    a = architecture
    return replace(_apart(a, config, "mistral"), name=a.name, source=a.source, notes=a.notes, asides=a.asides)


ORDER = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Linear layers of an expert as its class makes them."""
NOT_APART = frozenset(
    {
        *("dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "glm4v_moe", "hunyuan_v1_moe", "jamba", "longcat_flash", "minimax"),
        *("olmoe", "phimoe", "qwen3_next", "qwen3_omni_moe"),
    }
)
"""Other model types whose experts were a list of modules in the last release before, models/*/modeling_*.py."""
STATICS, STATICS_BEFORE = "mlp.gate.moe_statics", "mlp.moe_statics"
"""Where ERNIE has the corrections of its router's scores, today and then."""
WITH_PARAMETER = ("deepseek_v2", "deepseek_v3")
"""Model types of mixtures whose router has a parameter, as today, and no linear layer."""


def as_of_release(architecture: Architecture, config: Mapping[str, object], script: Script) -> Architecture:
    """The architecture as the transformers that ran builds it. Raises InputError for a release that had no such model."""
    if script.experts_apart:
        architecture = with_experts_apart(architecture, script.transformers)
    return with_rotary_tables(architecture, config) if script.caches_rotary(architecture.model_type) else architecture


def with_experts_apart(architecture: Architecture, release: str | None) -> Architecture:
    """The architecture with the modules that it had before transformers 5: three linear layers for each expert, and a linear
    router but in DeepSeek. Others are as today. Raises InputError for a `release` of transformers that had no such model, or
    another kind of experts in it; None is Unsloth's.

    Source: transformers before `versions.EXPERTS_FUSED`, models/mixtral/modeling_mixtral.py (`MixtralBlockSparseTop2MLP`,
    `MixtralSparseMoeBlock`), models/{qwen2_moe,qwen3_moe,deepseek_v2,deepseek_v3,ernie4_5_moe}/modeling_*.py (`…MoeMLP`, `…MoE`).
    """
    if architecture.model_type in NOT_APART and release is not None:
        why = f"the experts of {architecture.model_type} were linear layers then, which are not counted"
        raise InputError("transformers", release, f"{why}; accepted: {EXPERTS_FUSED.named} or newer")
    if (added := MIXTURE_ADDED.get(architecture.model_type)) is None:
        return architecture
    if added.after(release):
        raise InputError("transformers", release, f"{architecture.model_type} came with {added.named}; accepted: that or newer")
    of_mixtral = architecture.model_type == "mixtral"
    linear_router = architecture.model_type not in WITH_PARAMETER
    up, down = (("w1", "w3"), "w2") if of_mixtral else (("gate_proj", "up_proj"), "down_proj")
    modules: list[Module] = []
    for module in _router_first(architecture.modules) if linear_router else architecture.modules:
        block = module.name.rpartition(".")[0].removesuffix("mlp") + ("block_sparse_moe" if of_mixtral else "mlp")
        module = module._replace(name=module.name.replace(STATICS, STATICS_BEFORE))
        if module.kind == "Router" and linear_router:
            modules.append(module._replace(name=f"{block}.gate", kind="Linear"))
        elif module.kind == "Experts":
            e, h, i = module.shape("down_proj")
            sides = dict(sorted({**dict.fromkeys(up, (h, i)), down: (i, h)}.items(), key=lambda side: ORDER.index(side[0])))
            modules += [linear(f"{block}.experts.{k}.{w}", *sides[w], layers=module.layers) for k in range(e) for w in sides]
        else:
            modules.append(module)
    blocks = tuple(block._replace(mlp=block.mlp._replace(apart=True)) for block in architecture.blocks)
    frozen = tuple(name.replace(STATICS, STATICS_BEFORE) for name in architecture.frozen)
    return replace(architecture, modules=tuple(modules), blocks=blocks, frozen=frozen)


def _router_first(modules: Sequence[Module]) -> list[Module]:
    """The modules with the router of each block before its experts."""
    ordered = list(modules)
    for at, (module, following) in enumerate(pairwise(modules)):
        if (module.kind, following.kind) == ("Experts", "Router"):
            ordered[at : at + 2] = following, module
    return ordered


def with_rotary_tables(architecture: Architecture, config: Mapping[str, object]) -> Architecture:
    """The architecture with what each layer's rotary embedding kept before `versions.ROTARY_UNCACHED`: cosines and sines of all
    positions, in the dtype that the model was made in (`_set_cos_sin_cache`; Llama: `_cos_cached`, for old callers).
    """
    positions, width = config.get("max_position_embeddings"), architecture.blocks[0].attentions[0].head_dim
    if not isinstance(positions, int):
        return architecture
    layers = tuple(layer for block in architecture.blocks for layer in block.layers)
    name = "model.layers.{}.self_attn.rotary_emb"
    tables = (Buffer(f"{name}.{table}_cached", "model", (positions, width), layers) for table in ("cos", "sin"))
    return replace(architecture, buffers=(*architecture.buffers, *tables))


def config_unsloth_loads(config: dict[str, object]) -> dict[str, object]:
    """The config of the checkpoint that Unsloth loads in place of one with this config: of Phi-3 Mistral's."""
    return of_type(config, "mistral") if config.get("model_type") in APART else config


def as_torch_compiles(architecture: Architecture, config: Mapping[str, object], *, scheme: str) -> Architecture:
    """The architecture with norms in fp32, as Unsloth has them, and where no reader gives blocks with those that are recorded.

    A scheme of fake quantization may untie the head. Source: unsloth_zoo 2026.10.9, training_utils.py
    (`prepare_model_for_training`); unsloth 2026.10.9, models/_utils.py (`_untie_input_output_embeddings`).
    """
    if scheme == INT8_INT4:
        head = architecture.output_embedding
        untied = tuple(tie for tie in architecture.ties if tie[0].rpartition(".")[0] != head)
        architecture = replace(architecture, ties=untied)
    blocks = architecture.blocks or _blocks_of_granite(architecture, config) or _blocks_recorded(architecture, config)
    blocks = tuple(block if block.attentions else block._replace(attentions=(WITHOUT_ATTENTION,)) for block in blocks)
    return replace(architecture, blocks=blocks, keep_in_fp32_strict=("norm",))


ERNIE: dict[str, object] = {"hidden_size": 2560, "intermediate_size": 12288, "num_attention_heads": 20}
ERNIE |= {"num_hidden_layers": 28, "vocab_size": 103424}
"""What `Ernie4_5_MoeConfig` says where a config does not."""


def blocks_of_ernie(config: Mapping[str, object], name: str) -> tuple[Block, ...]:
    """The layers of ERNIE 4.5 with experts: dense ones, then mixtures with shared experts."""
    fields = Fields({**ERNIE, **config}, name=name)
    n = read_dims(fields, kv=4)
    width, first = fields.int("moe_intermediate_size", default=1536), fields.int("moe_layer_start_index", default=1, low=0)
    experts, chosen = fields.int("moe_num_experts", default=64), fields.int("moe_k", default=6)
    shared = fields.int("moe_num_shared_experts", default=2) * width
    mlp = moe_mlp(fields, width, experts, chosen, shared=shared, groups=(1, 1), normed=True)
    step, last = fields.int("moe_layer_interval", default=1), fields.int("moe_layer_end_index", default=-1, low=-1)
    sparse = (layer for layer in n.layers[first:] if (layer + 1) % step == 0 and last in (-1, *n.layers[layer:]))
    return mixed_blocks(fields, n, [n.attention] * len(n.layers), mlp, tuple(sparse))


def _blocks_of_granite(architecture: Architecture, config: Mapping[str, object]) -> tuple[Block, ...]:
    """The layers of a Granite 4 without experts: those of attention, and those of Mamba; none of another model."""
    types = config.get("layer_types")
    if architecture.model_type != "granitemoehybrid" or config.get("num_local_experts") or not isinstance(types, Sequence):
        return ()
    if not {"attention", "mamba"}.issuperset(types):
        return ()
    fields = Fields(config, name=architecture.name)
    n = read_dims(fields)
    positions: Literal["rotary", "none"] = "rotary" if config.get("position_embedding_type") == "rope" else "none"
    mlp = Mlp("gated", fields.int("shared_intermediate_size"), fields.str("hidden_act", default="silu"), fused_gate_up=True)
    layers = {kind: tuple(layer for layer in n.layers if types[layer] == kind) for kind in ("attention", "mamba")}
    attentions = {"attention": (n.attention._replace(positions=positions),), "mamba": ()}
    return tuple(Block("decoder", layers[kind], attentions[kind], mlp, "rmsnorm") for kind in layers if layers[kind])


WITHOUT_ATTENTION = Attention(1, 1, 1, positions="none")
"""Of layers with a convolution in its place."""
RECORDED = ("qwen3_5",)
"""Model types whose layers records alone describe."""


def _blocks_recorded(architecture: Architecture, config: Mapping[str, object]) -> tuple[Block, ...]:
    """The layers of a text part that only records describe: a block for each type of layer, with its rotary tables' width."""
    if architecture.model_type not in RECORDED:
        return ()
    text = config.get("text_config")
    fields = Fields(text if isinstance(text, Mapping) else config, name=architecture.name)
    n = read_dims(fields)
    types = fields.strs("layer_types", default=("full_attention",) * len(n.layers))
    wide = fields.optional_int("global_head_dim") or n.d
    rotated = partial_rotary_dim(fields, n.d, default=0.25) if architecture.model_type == "qwen3_5" else None
    blocks = []
    for kind in dict.fromkeys(types):
        layers = tuple(layer for layer in n.layers if types[layer] == kind)
        window = fields.int("sliding_window") if kind == "sliding_attention" else None
        rotary: Literal["rotary", "none"] = "rotary" if kind.endswith("_attention") and kind != "linear_attention" else "none"
        width = wide if kind == "full_attention" else n.d
        attention = n.attention._replace(head_dim=width, window=window, positions=rotary, rotary_dim=rotated)
        blocks.append(Block("decoder", layers, (attention,), Mlp("gated", n.i, "silu"), "rmsnorm"))
    return tuple(blocks)


def _with_parts_apart(architecture: Architecture, config: Mapping[str, object]) -> Architecture:
    """The architecture with queries, keys and values apart, and with gate and up."""
    apart = _apart(architecture, config, "llama")
    return replace(architecture, modules=apart.modules, blocks=apart.blocks)


def _apart(architecture: Architecture, config: Mapping[str, object], model_type: str) -> Architecture:
    return read_config(of_type(config, model_type), name=architecture.name, task_type=architecture.task_type)


def of_type(config: Mapping[str, object], model_type: str) -> dict[str, object]:
    """The config as one of another model type, without a scaling of its positions."""
    name = f"{model_type.capitalize()}ForCausalLM"
    return {**config, "model_type": model_type, "architectures": [name], "rope_scaling": None}


def with_value_head(architecture: Architecture, adaptation: Adaptation) -> tuple[Architecture, Adaptation]:
    """Both with a value head in fp32, which trains beside what the method trains (models/modeling_value_head.py of
    the trl that LLaMA-Factory pins)."""
    assert architecture.hidden_size is not None
    head = linear(VALUE_HEAD, architecture.hidden_size, 1, bias=True)
    in_fp32 = (*architecture.keep_in_fp32_strict, rf"{VALUE_HEAD}\.")
    architecture = replace(architecture, modules=(*architecture.modules, head), keep_in_fp32_strict=in_fp32)
    trained = (*adaptation.trained, *trained_params(architecture, (head,)))
    return architecture, adaptation._replace(trained=trained)


def without_formula(job: Job) -> str | None:
    """Why a step with torchtune's modules has no formula; None where it has one."""
    architecture, setup = job.architecture, job.setup
    unknown = {
        f"model type {architecture.model_type}": architecture.model_type not in BUILT,
        f"method {job.method_name}": not (job.is_full_or_lora or _adapts_by_dora(job)),
        f"quant {setup.quant}": job.quant is not None and not job.quant.by_torchao,
        "autocast": setup.autocast != "none",
        "eager attention": setup.attn_implementation == "eager" and architecture.model_type not in EAGER,
        "padding": setup.padding,
        f"optimizer_in_backward with {setup.optim}": bool(setup.optimizer_in_backward)
        and parse_optim(str(setup.optim)).step_implementation not in ("fused", "kernel"),
        "optimizer_in_backward on several GPUs": bool(setup.optimizer_in_backward) and job.distributed is not None,
        "several GPUs": job.distributed is not None and job.distributed.strategy != "fsdp2",
    }
    missing = next((what for what, is_so in unknown.items() if is_so), None)
    return missing and f"torchtune's modules: {missing}"


def _adapts_by_dora(job: Job) -> bool:
    """Whether a recipe of one forward trains DoRA, over several GPUs with a dense base (tests/rehearse/torchtune.jsonl). Norms of
    shards, which each rank makes while it loads, are counted as those of one GPU.
    """
    by, known = job.setup.by, job.distributed is None or job.quant is None
    return bool(getattr(job.config, "use_dora", False)) and known and not by.of_preferences and not job.setup.kernels

"""Models as NeMo Automodel builds them: dtypes of their routers and logits, and layers of model types without a reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peftplan.arch.blocks import Block
from peftplan.arch.decoder import read_dims
from peftplan.arch.fields import Fields
from peftplan.arch.modules import Architecture
from peftplan.arch.moe import moe_mlp
from peftplan.arch.readers import read_config
from peftplan.job.built import blocks_of_ernie, of_type


def as_automodel_builds(architecture: Architecture, config: Mapping[str, object]) -> Architecture:
    """The architecture whose routers have the model's dtype, and whose class leaves logits in it (nemo_automodel 0.7.0,
    components/models/*/model.py, `_keep_in_fp32_modules_strict`)."""
    if (model_type := SUBCLASSED.get(architecture.model_type)) is not None:
        read = read_config(of_type(config, model_type), name=architecture.name)
        architecture = replace(architecture, model_type=model_type, blocks=read.blocks)
    if architecture.model_type in BLOCKS_BY_AUTOMODEL and not architecture.blocks:
        blocks = BLOCKS_BY_AUTOMODEL[architecture.model_type](config, architecture.name)
        architecture = replace(architecture, blocks=blocks, logits_ops=())
    if architecture.model_type == "gemma4":  # factors multiply the experts (models/gemma4_moe/state_dict_adapter.py)
        modules = tuple(
            module._replace(params=tuple(p for p in module.params if p[0] != "per_expert_scale"))
            if module.kind == "Router"
            else module
            for module in architecture.modules
        )
        return replace(architecture, modules=modules)
    if architecture.model_type in ("qwen3_next", "qwen3_5", "qwen3_5_moe"):  # models/qwen3_next/layers.py (`_install_ssm_gate`)
        return replace(architecture, keep_in_fp32_strict=("A_log", "dt_bias"))
    if architecture.model_type not in ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "deepseek_v3", "nemotron_h"):
        return architecture
    of_mamba = ("A_log", "dt_bias", r"\.D$") if architecture.model_type == "nemotron_h" else ()
    return replace(architecture, keep_in_fp32_strict=("e_score_correction_bias", *of_mamba), logits_ops=())


def without_routers(architecture: Architecture) -> Architecture:
    """The architecture whose tokens take experts in turn (components/moe/layers.py:760)."""
    modules = tuple(module for module in architecture.modules if module.kind != "Router")
    buffers = tuple(buffer for buffer in architecture.buffers if not buffer.name.endswith("e_score_correction_bias"))
    return replace(architecture, modules=modules, buffers=buffers)


def _blocks_of_minimax(config: Mapping[str, object], name: str) -> tuple[Block, ...]:
    """The layers of MiniMax M2: a norm of all heads of q and of k, of which a part is rotated, and experts in every layer."""
    fields = Fields(config, name=name)
    n = read_dims(fields, kv=8)
    rotary_dim = fields.int("rotary_dim", default=n.d, high=n.d)
    mlp = moe_mlp(fields, n.i, fields.int("num_local_experts"), fields.int("num_experts_per_tok"), groups=(1, 1), normed=True)
    attention = n.attention._replace(qk_norm=True, rotary_dim=rotary_dim)
    return (Block("decoder", n.layers, (attention,), mlp, "rmsnorm"),)


def _blocks_of_glm_5(config: Mapping[str, object], name: str) -> tuple[Block, ...]:
    """The layers of GLM-5: DeepSeek-V3's, whose queries attend to the keys that an indexer chooses; of no keys, which has no
    formula, where layers take another one's choice (`indexer_types`) or dense ones come behind mixtures."""
    fields = Fields(config, name=name)
    types = fields.strs("mlp_layer_types", default=())
    shares = "shared" in fields.strs("indexer_types", default=())
    keys = 0 if shares or types != tuple(sorted(types)) else fields.int("index_topk")
    dense = {"first_k_dense_replace": types.count("dense")} if types else {}
    of_class = {**of_type(config, "deepseek_v3"), **dense, "head_dim": None}  # which the class sets itself
    as_deepseek = read_config({"n_group": 1, "topk_group": 1, **of_class}, name=name).blocks
    chosen = (tuple(a._replace(num_chosen_keys=keys) for a in block.attentions) for block in as_deepseek)
    return tuple(block._replace(attentions=attentions) for block, attentions in zip(as_deepseek, chosen, strict=True))


BLOCKS_BY_AUTOMODEL = {"minimax_m2": _blocks_of_minimax, "glm_moe_dsa": _blocks_of_glm_5, "ernie4_5_moe": blocks_of_ernie}
"""Model types without a reader whose modules NeMo Automodel builds → their layers."""
SUBCLASSED = {"kimi_k2": "deepseek_v3"}
"""Model types of which the tool's config is a subclass of another's, without fields of its own, and its model that of the other
(components/models/kimi_k2/config.py; _transformers/registry.py, `DeepseekV3ForCausalLM`)."""

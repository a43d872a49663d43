"""The generated matrix: every method on small models of many types, ours and peft's, with many options.

A model is a built-in model's config with its sizes cut by one table (`SMALL`), so that its flags (ties, biases, fused layers,
layer types, experts) stay those of the real model. A case is one method with options by peft's own names; both sides count it, or
both refuse it.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import peft
import peft.optimizers
import torch

from peftplan.arch.catalogue import find
from peftplan.arch.modules import Architecture
from peftplan.arch.readers import READERS
from peftplan.errors import PeftplanError
from peftplan.job.sources import load, load_config
from peftplan.libraries.count import count_with_peft
from peftplan.libraries.stand_ins import stand_ins
from peftplan.methods import METHODS, adapt, configure, from_peft_config
from peftplan.methods.adaptation import Adaptation, NeedsPeftError
from peftplan.methods.experts import CONVERSIONS, RENAMED, ROUTER
from peftplan.methods.targets import part
from tests.arch import meta
from tests.methods.tiny import PEFT_TASKS
from tests.methods.witness import split

MODELS: dict[str, str] = {
    # model type: the built-in model whose config is cut
    "llama": "llama-3.2-1b", "mistral": "mistral-nemo-base-2407", "qwen2": "qwen2.5-0.5b", "qwen3": "qwen3-4b",
    "gemma": "gemma-2b", "gemma2": "gemma-2-2b", "gemma3_text": "gemma-3-1b-pt", "phi3": "phi-4", "starcoder2": "starcoder2-3b",
    "stablelm": "stablelm-2-1-6b", "cohere": "aya-23-8b", "cohere2": "c4ai-command-r7b-12-2024", "olmo": "olmo-1b",
    "olmo2": "olmo-2-0425-1b", "granite": "granite-3.1-2b-instruct", "smollm3": "smollm3-3b", "glm4": "glm-4-9b-0414",
    "mixtral": "mixtral-8x7b-v0.1", "qwen2_moe": "qwen1.5-moe-a2.7b", "qwen3_moe": "qwen3-30b-a3b", "gpt_oss": "gpt-oss-20b",
    "deepseek_v2": "deepseek-v2-lite", "deepseek_v3": "deepseek-v3", "gpt2": "gpt2", "gpt_bigcode": "starcoder",
    "gptj": "gpt-j-6b", "gpt_neox": "pythia-160m", "phi": "phi-2", "opt": "opt-350m", "bloom": "bloom-560m", "mpt": "mpt-7b",
    "falcon": "falcon-40b", "bert": "bert-base-cased", "roberta": "roberta-base", "xlm-roberta": "xlm-roberta-base",
    "distilbert": "distilbert-base-uncased", "deberta-v2": "deberta-v3-base", "modernbert": "modernbert-base", "t5": "flan-t5-xl",
    "mt5": "mt5-base", "seed_oss": "seed-oss-36b-instruct", "hunyuan_v1_dense": "hunyuan-0.5b-instruct",
    "exaone4": "exaone-4.0-1.2b", "arcee": "afm-4.5b", "ernie4_5": "ernie-4.5-0.3b-pt", "glm4_moe_lite": "glm-4.7-flash",
    "apertus": "apertus-8b-instruct-2509",
    "glm": "glm-4-9b", "lfm2": "lfm2-350m", "glm4_moe": "glm-4.5-air", "nemotron_h": "nvidia-nemotron-nano-9b-v2",
    "falcon_h1": "falcon-h1-0.5b-base", "nemotron": "minitron-8b-base",
    "bart": "bart-base", "whisper": "whisper-tiny", "vit": "vit-base-patch16-224",
    # without a reader: read by transformers
    "mamba": "mamba-130m", "falcon_mamba": "falcon-mamba-7b", "olmoe": "olmoe-1b-7b-0924",
    "qwen3_next": "qwen3-next-80b-a3b-instruct",
    "gpt_neo": "gpt-neo-125m", "granitemoehybrid": "granite-4.0-h-tiny",
    "olmo3": "olmo-3-1025-7b", "minimax_m2": "minimax-m2", "llama4": "llama-4-scout-17b-16e", "dinov2": "dinov2-small",
    "qwen3_vl": "qwen3-vl-2b-instruct", "rwkv": "rwkv-4-169m-pile",
}  # fmt: skip

SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "attention_hidden_size"), 96),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 172),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth"), 3),
    **dict.fromkeys(("num_decoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 6),
    **dict.fromkeys(("decoder_attention_heads",), 6),
    **dict.fromkeys(("head_dim", "d_kv"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "n_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace"), 1),
    "vocab_size": 120, "moe_intermediate_size": 44, "shared_expert_intermediate_size": 60, "shared_intermediate_size": 60,
    "intermediate_size_mlp": 100, "max_source_positions": 32, "word_embed_proj_dim": 64, "rotary_dim": 4, "image_size": 28,
    "patch_size": 14, "out_hidden_size": 96, "num_position_embeddings": 4, "q_lora_rank": 40, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12, "mamba_n_heads": 12, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_d_ssm": 192, "mamba_num_heads": 12, "mamba_head_dim": 16, "ssm_state_size": 16,
    "vision_output_dim": 96, "projector_input_dim": 96, "projector_output_dim": 96,
}  # fmt: skip
"""Sizes of the small models, by the name of the config field. 172 = 4 · 43 has few divisors: block methods must move to one."""
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "num_ln_in_parallel_attn")
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"num_hidden_layers": 4},  # one layer of four has full attention
    **{name: {"pad_token_id": 0} for name in ("smollm3", "glm4", "glm", "whisper")},  # the class's default is a large one
    "distilbert": {"hidden_dim": 172, "intermediate_size": 172},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "nemotron_h": {"hybrid_override_pattern": "M-*"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
}

OF_QWEN3_5: dict[str, Any] = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24,
    "vocab_size": 120, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
OF_GEMMA4: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "num_global_key_value_heads": 1, "head_dim": 24, "global_head_dim": 48, "vocab_size": 120, "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "pad_token_id": 0,
}  # fmt: skip
NOT_BUILT_IN: dict[str, dict[str, Any]] = {
    "gemma4_text": {"model_type": "gemma4_text", "attention_k_eq_v": True, **OF_GEMMA4},
    "gemma4_unified_text": {"model_type": "gemma4_unified_text", "attention_k_eq_v": True, **OF_GEMMA4},
    "granitemoe": {
        "model_type": "granitemoe", "hidden_size": 96, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 120, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "ministral3": {
        "model_type": "ministral3", "hidden_size": 96, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 120,
    },
    "qwen3_5_text": {"model_type": "qwen3_5_text", "intermediate_size": 172, **OF_QWEN3_5},
    "qwen3_5_moe_text": {
        "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 44, "shared_expert_intermediate_size": 60, "num_experts": 4,
        "num_experts_per_tok": 2, **OF_QWEN3_5,
    },
}  # fmt: skip
"""Configs of the types that have a reader and no built-in model."""

AUTO_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "CAUSAL_LM")


def small_config(model_type: str) -> dict[str, Any]:
    """The config of the small model of that type."""
    if model_type in NOT_BUILT_IN:
        return NOT_BUILT_IN[model_type]
    entry = find(MODELS[model_type])
    assert entry is not None
    assert entry.model_type == model_type
    return _cut(entry.facts()["config"]) | OVERRIDES.get(model_type, {})


def _cut(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes of `SMALL`, per-layer lists as long as the layers, token ids inside the vocabulary."""
    small = {key: value for key, value in copy.deepcopy(dict(config)).items() if key != "quantization_config"}
    for key, value in config.items():
        if (isinstance(value, Mapping) and "model_type" in value) or key in ("text_config", "vision_config"):
            small[key] = _cut(value)
        elif key in SMALL and isinstance(value, int):
            small[key] = SMALL[key]
        elif key in KV_HEADS and isinstance(value, int):
            heads = config.get("num_attention_heads")
            small[key] = value if value <= 2 else 6 if value == heads else 2
        elif key.endswith(("_token_id", "_token_index")) and value is not None:
            small[key] = [1] if isinstance(value, list) else 1
        elif key == "layer_types":
            small[key] = value[: SMALL["num_hidden_layers"]]
    return small


@cache
def config_of(model_type: str) -> dict[str, Any]:
    """`small_config`, once."""
    return small_config(model_type)


@cache
def architecture(model_type: str, task: str | None = None) -> Architecture:
    """Ours."""
    return load(config_of(model_type), task_type=task)


@cache
def real(model_type: str, task: str | None = None, device: str = "meta") -> Any:
    """transformers' own, on the meta device, or with real numbers for what peft computes on values."""
    model = meta.build(config_of(model_type), architecture(model_type, task).model_class)
    if device == "meta":
        return model
    # A deep copy whose tensors are already known: ties stay ties.
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(torch.zeros(p.shape), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): torch.zeros(b.shape, dtype=b.dtype) for b in model.buffers()})


def tasks_of(model_type: str) -> tuple[str, ...]:
    """The tasks beside the usual one that the type's reader has; none for types that transformers reads."""
    if model_type not in READERS:
        return ()
    tasks = []
    for task in AUTO_TASKS:
        try:
            if architecture(model_type, task).task_type != architecture(model_type).task_type:
                tasks.append(task)
        except PeftplanError:
            continue
    return tuple(tasks)


@dataclass(frozen=True)
class Case:
    """One cell: a model type, a method, options by peft's names, and the task (None: the type's usual one)."""

    model_type: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    task: str | None = None

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.model_type}{'/' + self.task if self.task else ''} {self.method}({shown})"


def difference(case: Case) -> str | None:
    """What differs between the two sides, in one line with both numbers; None where they agree."""
    arch = architecture(case.model_type, case.task)
    ours = _outcome(lambda: _ours(arch, case))
    config = _outcome(lambda: _peft_config(arch, case))
    base = real(case.model_type, case.task, _device(case))
    theirs = config if isinstance(config, Exception) else _outcome(lambda: _adapted(base, config, case))
    if isinstance(ours, NeedsPeftError) and not isinstance(theirs, Exception):
        ours = _outcome(lambda: _handed_over(arch, config, case))
    if isinstance(theirs, Exception):
        if isinstance(ours, PeftplanError):
            return None
        what = f"{type(ours).__name__} {ours}" if isinstance(ours, Exception) else f"counts {ours.num_trainable}"
        return f"{case}: peft refuses ({type(theirs).__name__}: {_line(theirs)}); peftplan {what}"
    trainable, total = theirs.get_nb_trainable_parameters()
    if isinstance(ours, Exception):
        return f"{case}: peft counts {trainable} of {total}; peftplan {type(ours).__name__}: {_line(ours)}"
    numbers = (ours.num_trainable, arch.num_parameters + ours.num_added)
    named = _named(ours, base, theirs)
    if numbers != (trainable, total) or named:
        return f"{case}: peftplan {numbers[0]} of {numbers[1]}, peft {trainable} of {total}; {named}"
    return _door(arch, config, ours, case)


def trained(case: Case) -> tuple[set[str], int]:
    """Names of the base parameters that a method of ours trains, and how many elements they have; it adds none."""
    adaptation = _ours(architecture(case.model_type, case.task), case)
    assert adaptation.num_added == 0
    names = {f"{p.module}.{p.param}".lstrip(".").replace("{}", str(i)) for p in adaptation.trained for i in p.layers or (0,)}
    return names, adaptation.num_trainable


DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""Fields that say how deep a model is."""


def wide_config(name: str, *, layers: int = 8) -> dict[str, Any]:
    """The config of a built-in model with its own widths in at most so many layers."""
    config = load_config(name)
    if "attention_types" in config:  # GPT-Neo counts its layers there, in nested lists
        return config
    deep = {config[key] for key in DEPTH if isinstance(config.get(key), int) and config[key] > layers}
    for key, value in config.items():
        if key in DEPTH and value in deep:
            config[key] = layers
        elif isinstance(value, list | str) and len(value) in deep:  # one entry for each layer
            config[key] = value[:layers]
    return config


@lru_cache(maxsize=1)
def _at_real_size(name: str, model_class: str) -> Any:
    """transformers' own built-in model in a few layers, on the meta device."""
    return meta.build(wide_config(name), model_class)


def counts_at_real_size(case: Case) -> tuple[tuple[int, int] | Exception, tuple[int, int] | Exception]:
    """Our (trainable, total) and peft's, on `wide_config` of the built-in model; an error where a side refuses."""
    name = MODELS[case.model_type]
    arch = load(wide_config(name))

    def ours() -> tuple[int, int]:
        adaptation = _ours(arch, case)
        return adaptation.num_trainable, arch.num_parameters + adaptation.num_added

    def pefts() -> tuple[int, int]:
        with torch.device("meta"), meta.without_values():
            adapted = peft.get_peft_model(copied(_at_real_size(name, arch.model_class), {}), _peft_config(arch, case))
        counts: tuple[int, int] = adapted.get_nb_trainable_parameters()
        return counts

    return _outcome(ours), _outcome(pefts)


def _ours(arch: Architecture, case: Case) -> Adaptation:
    return adapt(arch, *configure(case.method, case.options))


def _handed_over(arch: Architecture, config: Any, case: Case) -> Adaptation:
    """What `libraries.count` says, to which a NeedsPeftError hands over."""
    fields = config.to_dict() | ({"freeze_a": True} if case.method == "lora-fa" else {})
    return count_with_peft(config_of(case.model_type), fields, task_type=arch.task_type or None)


def _outcome(function: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()
    except Exception as error:  # peft raises whatever its code meets
        return error


def _peft_config(arch: Architecture, case: Case) -> Any:
    """peft's config of the case; our two words become the names that they stand for."""
    method = METHODS[case.method]
    options = {**method.defaults, **case.options}
    options.pop("freeze_a", None)
    targets = options.get("target_modules")
    if targets in ("attention", "mlp"):
        options["target_modules"] = _word(arch, targets, lora=method.peft_type == "LORA")
    elif targets == "peft-default" or "target_modules" not in options:
        options.pop("target_modules", None)
    assert method.peft_type is not None
    cls = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method.peft_type)]
    task_type = arch.task_type if arch.task_type in PEFT_TASKS else None
    if task_type is None and "num_virtual_tokens" in options:
        task_type = "FEATURE_EXTRACTION"  # virtual tokens need one of peft's tasks, and a masked LM has none
    return cls(task_type=task_type, **copy.deepcopy(options))


def _word(arch: Architecture, word: str, *, lora: bool) -> list[str]:
    """The names that our word stands for, as a user of peft would write them; for LoRA on fused experts their old names."""
    if lora and word == "mlp" and arch.model_type in CONVERSIONS:
        return [name for name in RENAMED[CONVERSIONS[arch.model_type]] if name != ROUTER]
    full = {m.name: list(m.names()) for m in arch.modules}
    return [name for template in part(arch, attention=word == "attention") for name in full.get(template, [template])]


def _device(case: Case) -> str:
    """AdaLoRA counts a scalar too many without values, and BOFT's butterflies permute by them; OFT's indices take a sixth of the
    time on a CPU.
    """
    return "cpu" if case.method in ("adalora", "oft") or case.options.get("boft_n_butterfly_factor", 1) > 1 else "meta"


def _adapted(base: Any, config: Any, case: Case) -> Any:
    """`get_peft_model` on copies: peft wraps the model and resolves the config in place."""
    with stand_ins(config.peft_type.value), torch.device(_device(case)), meta.without_values():
        adapted = peft.get_peft_model(copied(base, {}), copy.deepcopy(config))
    if case.method == "lora-fa":
        peft.optimizers.create_lorafa_optimizer(adapted, r=config.r, lora_alpha=config.lora_alpha, lr=1e-4)
    return adapted


def copied(base: Any, known: dict[int, Any]) -> Any:
    """A copy whose modules, parameters and hooks are its own, and whose numbers, config and other attributes are those of `base`.

    `copy.deepcopy` took a third of the time of the whole matrix. `known`: id of a module or parameter → its copy, so that ties
    stay ties.
    """
    if id(base) in known:
        return known[id(base)]
    module = known[id(base)] = base.__new__(type(base))
    for name, value in vars(base).items():  # most dicts are of hooks, and empty: to copy those took a tenth of the time
        vars(module)[name] = value if not isinstance(value, dict) else copy.copy(value) if value else type(value)()
    for name, parameter in base._parameters.items():
        if parameter is not None and id(parameter) not in known:
            known[id(parameter)] = torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
        module._parameters[name] = known.get(id(parameter))
    for name, child in base._modules.items():
        module._modules[name] = None if child is None else copied(child, known)
    return module


def _named(ours: Adaptation, base: Any, adapted: Any) -> str:
    """The first names that only one side has, or that have another shape or train on one side only."""
    added, trained = split(base, adapted)
    mine: set[Any] = {(name, t.shape, t.trainable) for t in ours.added for name in t.names()}
    mine |= {f"{p.module}.{p.param}".lstrip(".").replace("{}", str(i)) for p in ours.trained for i in p.layers or (0,)}
    # A tied head that is saved and whose embedding has trainable tokens is wrapped twice; ours is named after the outer wrap.
    shorter = {re.sub(r"\.token_adapter\.base_layer(?=\.modules_to_save)", "", name): facts for name, facts in added.items()}
    real_ones: set[Any] = {(name, *facts) for name, facts in shorter.items()} | trained
    only_mine, only_real = sorted(map(str, mine - real_ones)), sorted(map(str, real_ones - mine))
    if not only_mine and not only_real:
        return ""
    return f"only peftplan has {len(only_mine)} {only_mine[:3]}, only peft has {len(only_real)} {only_real[:3]}"


def _door(arch: Architecture, config: Any, ours: Adaptation, case: Case) -> str | None:
    """The same case through the other door, the dict of peft's adapter_config.json."""
    if case.method == "lora-fa" or case.options.get("target_modules") in ("attention", "mlp"):
        return None
    read = _outcome(lambda: adapt(arch, *from_peft_config(config.to_dict())))
    if isinstance(read, NeedsPeftError):
        return None
    if isinstance(read, Exception):
        return f"{case}: counted by its options, but its adapter_config.json gives {type(read).__name__}: {_line(read)}"
    if (read.num_trainable, read.num_added) != (ours.num_trainable, ours.num_added):
        return f"{case}: {ours.num_trainable} by its options, {read.num_trainable} by its adapter_config.json"
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""The readers: one function per `model_type` turns strictly checked config fields into an `Architecture`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from peftplan.arch.fields import Fields
from peftplan.arch.heads import TASK_TYPES
from peftplan.arch.modules import Architecture
from peftplan.errors import UnknownNameError

Reader = Callable[[Fields, str], Architecture]

READERS: dict[str, tuple[str, str, str]] = {
    # model_type: (module, function, default task type)
    "llama": ("llama", "llama", "CAUSAL_LM"),
    "mistral": ("llama", "mistral", "CAUSAL_LM"),
    "qwen2": ("llama", "qwen2", "CAUSAL_LM"),
    "qwen3": ("llama", "qwen3", "CAUSAL_LM"),
    "gemma": ("gemma", "gemma", "CAUSAL_LM"),
    "gemma2": ("gemma", "gemma2", "CAUSAL_LM"),
    "gemma3_text": ("gemma", "gemma3_text", "CAUSAL_LM"),
    "gemma4_text": ("gemma4", "gemma4_text", "CAUSAL_LM"),
    "gemma4_unified_text": ("gemma4", "gemma4_unified_text", "CAUSAL_LM"),
    "phi3": ("llama", "phi3", "CAUSAL_LM"),
    "starcoder2": ("stablelm", "starcoder2", "CAUSAL_LM"),
    "stablelm": ("stablelm", "stablelm", "CAUSAL_LM"),
    "cohere": ("cohere", "cohere", "CAUSAL_LM"),
    "cohere2": ("cohere", "cohere2", "CAUSAL_LM"),
    "olmo": ("llama", "olmo", "CAUSAL_LM"),
    "olmo2": ("llama", "olmo2", "CAUSAL_LM"),
    "olmo3": ("llama", "olmo3", "CAUSAL_LM"),
    "granite": ("llama", "granite", "CAUSAL_LM"),
    "smollm3": ("llama", "smollm3", "CAUSAL_LM"),
    "glm": ("llama", "glm", "CAUSAL_LM"),
    "glm4": ("llama", "glm4", "CAUSAL_LM"),
    "ministral3": ("llama_later", "ministral3", "CAUSAL_LM"),
    "seed_oss": ("llama_later", "seed_oss", "CAUSAL_LM"),
    "hunyuan_v1_dense": ("llama_later", "hunyuan_v1_dense", "CAUSAL_LM"),
    "exaone4": ("llama_later", "exaone4", "CAUSAL_LM"),
    "nemotron": ("llama_later", "nemotron", "CAUSAL_LM"),
    "arcee": ("llama_later", "arcee", "CAUSAL_LM"),
    "apertus": ("llama_later", "apertus", "CAUSAL_LM"),
    "ernie4_5": ("llama_later", "ernie4_5", "CAUSAL_LM"),
    "lfm2": ("lfm2", "lfm2", "CAUSAL_LM"),
    "falcon_h1": ("falcon_h1", "falcon_h1", "CAUSAL_LM"),
    "nemotron_h": ("nemotron_h", "nemotron_h", "CAUSAL_LM"),
    "qwen3_5_text": ("qwen3_5", "qwen3_5_text", "CAUSAL_LM"),
    "qwen3_5_moe_text": ("qwen3_5", "qwen3_5_moe_text", "CAUSAL_LM"),
    "qwen3_next": ("qwen3_5", "qwen3_next", "CAUSAL_LM"),
    "mixtral": ("moe", "mixtral", "CAUSAL_LM"),
    "qwen2_moe": ("moe", "qwen2_moe", "CAUSAL_LM"),
    "qwen3_moe": ("moe", "qwen3_moe", "CAUSAL_LM"),
    "olmoe": ("moe", "olmoe", "CAUSAL_LM"),
    "granitemoe": ("moe", "granitemoe", "CAUSAL_LM"),
    "glm4_moe": ("moe", "glm4_moe", "CAUSAL_LM"),
    "granitemoehybrid": ("granite_hybrid", "granitemoehybrid", "CAUSAL_LM"),
    "gpt_oss": ("moe", "gpt_oss", "CAUSAL_LM"),
    "deepseek_v2": ("mla", "deepseek_v2", "CAUSAL_LM"),
    "deepseek_v3": ("mla", "deepseek_v3", "CAUSAL_LM"),
    "glm4_moe_lite": ("mla", "glm4_moe_lite", "CAUSAL_LM"),
    "gpt2": ("gpt2", "gpt2", "CAUSAL_LM"),
    "gpt_bigcode": ("gpt2", "gpt_bigcode", "CAUSAL_LM"),
    "gptj": ("gptj", "gptj", "CAUSAL_LM"),
    "gpt_neox": ("gptj", "gpt_neox", "CAUSAL_LM"),
    "phi": ("gptj", "phi", "CAUSAL_LM"),
    "opt": ("opt", "opt", "CAUSAL_LM"),
    "bloom": ("bloom", "bloom", "CAUSAL_LM"),
    "mpt": ("bloom", "mpt", "CAUSAL_LM"),
    "falcon": ("falcon", "falcon", "CAUSAL_LM"),
    "bert": ("bert", "bert", "MASKED_LM"),
    "roberta": ("bert", "roberta", "MASKED_LM"),
    "xlm-roberta": ("bert", "xlm_roberta", "MASKED_LM"),
    "distilbert": ("distilbert", "distilbert", "MASKED_LM"),
    "deberta-v2": ("deberta", "deberta_v2", "MASKED_LM"),
    "modernbert": ("modernbert", "modernbert", "MASKED_LM"),
    "t5": ("t5", "t5", "SEQ_2_SEQ_LM"),
    "mt5": ("t5", "t5", "SEQ_2_SEQ_LM"),
    "bart": ("bart", "bart", "SEQ_2_SEQ_LM"),
    "whisper": ("bart", "whisper", "SEQ_2_SEQ_LM"),
    "vit": ("vit", "vit", "IMAGE_CLS"),
}


def read_config(config: Mapping[str, object], *, name: str, task_type: str | None = None) -> Architecture:
    """The `Architecture` of a parsed config.json whose `model_type` has a reader.

    `task_type` is one of `heads.TASK_TYPES`; None takes the task that the config's `architectures` names if the reader has
    it, else the model type's usual one. Raises UnknownNameError for a model type without a reader or a task that it does not
    have, InputError for a missing, mistyped or absurd field.
    """
    model_type = config["model_type"]
    if model_type not in READERS:
        raise UnknownNameError(f"{name}: model_type", model_type, READERS)
    module, function, default_task = READERS[model_type]
    reader: Reader = getattr(import_module(f"peftplan.arch.{module}"), function)
    fields = Fields(config, name=name)
    if task_type is not None:
        return reader(fields, task_type)
    return reader(fields, _stated_task(config) or default_task)


def _stated_task(config: Mapping[str, object]) -> str | None:
    """The task of the class that `architectures` names, longest suffix first, or None if it names none we know."""
    class_names = config.get("architectures")
    name = class_names[0] if isinstance(class_names, list) and class_names and isinstance(class_names[0], str) else ""
    suffixes = {suffix: task for task, suffix in TASK_TYPES.items()}
    suffixes |= {"LMHeadModel": "CAUSAL_LM", "DoubleHeadsModel": "CAUSAL_LM"}
    for suffix, task in sorted(suffixes.items(), key=lambda item: -len(item[0])):
        if name.endswith(suffix):
            return task
    return None

"""The forward pass of each model type, written on the tape as transformers' modeling file has it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from peftplan.memory.model import Model
from peftplan.tape.tensors import Tensor

Forward = Callable[[Model], Tensor]

FORWARDS: dict[str, tuple[str, str]] = {
    "bart": ("bart", "bart"),
    "bert": ("bert", "bert"),
    "deberta-v2": ("deberta", "deberta"),
    "distilbert": ("distilbert", "distilbert"),
    "modernbert": ("modernbert", "modernbert"),
    "roberta": ("bert", "bert"),
    "t5": ("t5", "t5"),
    "mt5": ("t5", "t5"),
    "vit": ("vit", "vit"),
    "whisper": ("bart", "bart"),
    "xlm-roberta": ("bert", "bert"),
    "llama": ("llama", "llama"),
    "mistral": ("llama", "llama"),
    "qwen2": ("llama", "llama"),
    "qwen3": ("llama", "llama"),
    "smollm3": ("llama", "llama"),
    "granite": ("llama", "granite"),
    "olmo": ("llama", "olmo"),
    "olmo2": ("llama", "olmo2"),
    "olmo3": ("llama", "olmo3"),
    "phi3": ("llama", "phi3"),
    "glm": ("llama", "glm"),
    "glm4": ("llama", "glm4"),
    "ministral3": ("llama", "llama"),
    "seed_oss": ("llama", "seed_oss"),
    "hunyuan_v1_dense": ("llama", "hunyuan"),
    "exaone4": ("llama", "exaone4"),
    "nemotron": ("llama", "nemotron"),
    "arcee": ("llama", "arcee"),
    "apertus": ("llama", "apertus"),
    "ernie4_5": ("llama", "ernie4_5"),
    "starcoder2": ("llama", "starcoder2"),
    "lfm2": ("lfm2", "lfm2"),
    "gemma": ("gemma", "gemma"),
    "gemma2": ("gemma", "gemma2"),
    "gemma3_text": ("gemma", "gemma3"),
    "gemma4_text": ("gemma4", "gemma4_text"),
    "gemma4_unified_text": ("gemma4", "gemma4_text"),
    "cohere": ("parallel", "cohere"),
    "cohere2": ("parallel", "cohere2"),
    "stablelm": ("parallel", "stablelm"),
    "phi": ("parallel", "phi"),
    "gptj": ("parallel", "gptj"),
    "gpt_neox": ("parallel", "gpt_neox"),
    "gpt2": ("gpt2", "gpt2"),
    "gpt_bigcode": ("gpt2", "gpt_bigcode"),
    "opt": ("opt", "opt"),
    "bloom": ("alibi", "bloom"),
    "mpt": ("alibi", "mpt"),
    "falcon": ("falcon", "falcon"),
    "falcon_h1": ("falcon_h1", "falcon_h1"),
    "nemotron_h": ("nemotron_h", "nemotron_h"),
    "qwen3_5_text": ("qwen3_5", "qwen3_5_text"),
    "qwen3_5_moe_text": ("qwen3_5", "qwen3_5_moe_text"),
    "qwen3_next": ("qwen3_5", "qwen3_next"),
    "mixtral": ("moe", "mixtral"),
    "qwen2_moe": ("moe", "qwen2_moe"),
    "qwen3_moe": ("moe", "qwen3_moe"),
    "olmoe": ("moe", "olmoe"),
    "granitemoe": ("moe", "granitemoe"),
    "glm4_moe": ("moe", "glm4_moe"),
    "granitemoehybrid": ("granite_hybrid", "granitemoehybrid"),
    "deepseek_v2": ("mla", "deepseek_v2"),
    "deepseek_v3": ("mla", "deepseek_v3"),
    "glm4_moe_lite": ("mla", "deepseek_v3"),
    "gpt_oss": ("gpt_oss", "gpt_oss"),
}
"""model type → module of this folder and its function: from token ids to the last hidden states."""
OF_TEXT_PARTS: dict[str, tuple[str, str]] = {
    "qwen2_vl": ("vision_language", "qwen2_vl"),
    "qwen2_5_vl": ("vision_language", "qwen2_vl"),
    "qwen3_vl": ("vision_language", "qwen3_vl"),
    "qwen3_vl_moe": ("vision_language", "qwen3_vl_moe"),
    "qwen3_5": ("qwen3_5", "qwen3_5"),
    "qwen3_5_moe": ("qwen3_5", "qwen3_5_moe"),
    "idefics3": ("vision_language", "idefics3"),
    "smolvlm": ("vision_language", "idefics3"),
    "mistral3": ("vision_language", "mistral3"),
    "gemma3": ("vision_language", "gemma3"),
    "llava": ("vision_language", "mistral3"),
    "internvl": ("vision_language", "mistral3"),
    "lfm2_vl": ("lfm2", "lfm2_vl"),
    "mllama": ("vision_language", "mistral3"),
    "gemma4": ("gemma4", "gemma4_with_towers"),
    "gemma4_unified": ("gemma4", "gemma4_with_towers"),
}
"""The same of vision-language models, for samples without images."""


def forward_of(model_type: str, *, own_modules: bool = False, own_decoders: bool = False, compiled: bool = False) -> Forward:
    """The forward of a model type in `FORWARDS` or `OF_TEXT_PARTS`, of one that torchtune or NeMo Automodel builds, or one that
    torch compiles."""
    if compiled:
        from peftplan.memory.models.compiled import compiled_layers

        return compiled_layers
    if own_modules:
        from peftplan.memory.models.torchtune import BUILT

        return BUILT[model_type]
    if own_decoders:
        from peftplan.memory.models.automodel import FORWARDS as OF_AUTOMODEL
        from peftplan.memory.models.automodel_deepep import FORWARDS as DIVIDED

        if model_type == "nemotron_h":
            from peftplan.memory.models.automodel_nemotron import nemotron_h

            return nemotron_h
        if model_type == "gemma4":
            from peftplan.memory.models.automodel_gemma4 import gemma4

            return gemma4
        if model_type in ("qwen3_next", "qwen3_5"):
            from peftplan.memory.models import automodel_next

            return automodel_next.qwen3_next if model_type == "qwen3_next" else automodel_next.qwen3_5
        if model_type in ("qwen3_vl_moe", "qwen3_5_moe"):
            from peftplan.memory.models import automodel_vision

            return automodel_vision.qwen3_vl_moe if model_type == "qwen3_vl_moe" else automodel_vision.qwen3_5_moe
        own: dict[str, Forward] = {**OF_AUTOMODEL, **DIVIDED}
        return own[model_type]
    module, function = FORWARDS.get(model_type) or OF_TEXT_PARTS[model_type]
    forward: Forward = getattr(import_module(f"peftplan.memory.models.{module}"), function)
    return forward

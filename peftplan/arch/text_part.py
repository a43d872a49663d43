"""The text part of vision-language models: the decoder that runs alone where a sample has no image.

Sources: transformers, models/{qwen2_vl,qwen2_5_vl,qwen3_vl,qwen3_vl_moe,idefics3,smolvlm,mistral3,gemma3,gemma4,gemma4_unified,
llava,internvl,lfm2_vl,mllama}/modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peftplan.arch.blocks import Block
from peftplan.arch.modules import Architecture, linear
from peftplan.arch.readers import READERS, read_config

TEXT_PARTS: dict[str, str | None] = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "idefics3": None,
    "smolvlm": None,
    "mistral3": None,
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "llava": None,
    "internvl": None,
    "lfm2_vl": None,
    "mllama": "llama",
}
"""Model type → that of a text model with the same layers; None: the one that its `text_config` names."""
LIKE_LLAMA = ("llama", "mistral", "ministral3", "qwen2", "qwen3")
NAMED = {"lfm2_vl": ("lfm2",)}
"""Model type → text models that its `text_config` may name and that have a formula there; of others `LIKE_LLAMA`."""
DEFAULTS: dict[str, dict[str, object]] = {
    "gemma3_text": {"vocab_size": 262_208, "num_attention_heads": 8},
    "llama": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""What a published `text_config` leaves to its class (transformers, models/<type>/configuration_<type>.py)."""

CAPPED = ("gemma4", "gemma4_unified")
"""Types that do to logits what their text model does; others do nothing to them."""

CACHE_TURNED_OFF = ("idefics3", "smolvlm", "gemma4", "gemma4_unified")
"""Types whose own config has the `use_cache` that Trainer turns off; in others it leaves that of `text_config`, which is on."""


def with_text_part(architecture: Architecture, config: Mapping[str, object]) -> Architecture:
    """The architecture with the blocks of its text part, if these are those of a model that is read here."""
    if architecture.model_type not in TEXT_PARTS or architecture.task_type != "CAUSAL_LM":
        return architecture
    stated = config.get("text_config")
    text = stated if isinstance(stated, Mapping) else config
    model_type = TEXT_PARTS[architecture.model_type] or text.get("model_type")
    named = NAMED.get(architecture.model_type, LIKE_LLAMA)
    if model_type not in READERS or (TEXT_PARTS[architecture.model_type] is None and model_type not in named):
        return architecture
    of_text = {**DEFAULTS.get(str(model_type), {}), **text, "model_type": model_type, "architectures": None}
    read = read_config(of_text, name=architecture.model_type, task_type="CAUSAL_LM")
    logits_ops = read.logits_ops if architecture.model_type in CAPPED else architecture.logits_ops
    blocks = _but_layers(read.blocks, text.get("cross_attention_layers"))
    return replace(architecture, blocks=blocks, logits_ops=logits_ops)


def _but_layers(blocks: tuple[Block, ...], skipped: object) -> tuple[Block, ...]:
    """The layers that run without images: Llama 3.2 skips those that attend to one (`MllamaTextModel.forward`)."""
    if not isinstance(skipped, list):
        return blocks
    return tuple(block._replace(layers=tuple(i for i in block.layers if i not in skipped)) for block in blocks)


def layers_of_images(architecture: Architecture) -> frozenset[int]:
    """The layers of a decoder that run with images alone: Llama 3.2's that attend to one."""
    if architecture.model_type != "mllama" or not architecture.blocks:
        return frozenset()
    decoder = f"{architecture.decoder}."
    of_decoder = (m.layers for m in architecture.modules if m.name.startswith(decoder) and m.layers is not None)
    return frozenset().union(*of_decoder).difference(*(block.layers for block in architecture.blocks))


SCORED = ("qwen2_5_vl", "qwen3_vl")
"""Types of which transformers has no class that scores a sequence: ms-swift makes one (model/patcher.py,
`_patch_sequence_classification`)."""
SCORE = "score"
OF_SCORE = (
    "transformers has no class of this model that scores a sequence: a score stands where its head is, as ms-swift makes it"
)


def with_score(architecture: Architecture, labels: int) -> Architecture:
    """The model with a score in place of its head."""
    head = architecture.output_embedding
    modules = (*(m for m in architecture.modules if m.name != head), linear(SCORE, architecture.hidden_size, labels))
    return replace(
        architecture,
        task_type="SEQ_CLS",
        modules=modules,
        ties=(),
        output_embedding=None,
        notes=(*architecture.notes, OF_SCORE),
        asides=(*architecture.asides, OF_SCORE),
    )


def keeps_its_cache(architecture: Architecture) -> bool:
    """Whether the trainer's `use_cache` does not reach the text part, which then makes a cache where no layer is a checkpoint."""
    return architecture.model_type in TEXT_PARTS.keys() - set(CACHE_TURNED_OFF)


def is_in_text_part(architecture: Architecture, module: str) -> bool:
    """Whether a module, or a parameter by its name, runs without images."""
    return f"{module}.".startswith((f"{architecture.decoder}.", f"{architecture.output_embedding or SCORE}."))

"""The units that FSDP makes of towers beside a text part, by the classes that the wrap policy names; the root has what is left.

Where samples have no images, no unit of a tower is gathered; the root is, with what it has of them.

Source: transformers, `_no_split_modules` of each model; accelerate, utils/fsdp_utils.py (`fsdp2_prepare_auto_wrap_policy`).
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import NamedTuple

from peftplan.arch.modules import Architecture
from peftplan.distributed.layout import Layout
from peftplan.distributed.strategy import Distributed
from peftplan.parameters import Parameter

ROOT = "root"
BESIDE_TEXT = re.compile(
    r"^model\.(?:visual|vision_tower|vision_model|audio_tower|multi_modal_projector|connector|embed_vision|embed_audio)\."
)
ENCODER = "model.vision_tower.encoder.layers.{}."
VISUAL = "model.visual.blocks.{}."
EMBEDDINGS = tuple(f"model.vision_tower.embeddings.{of}" for of in ("class_embedding", "patch_embedding.", "position_embedding."))
OF_VISION_MODEL = ("model.vision_model.transformer.layers.{}.", "model.vision_model.global_transformer.layers.{}.")
TOWERS: dict[str, str | tuple[str, ...]] = {
    "Qwen2VLVisionBlock": VISUAL,
    "Qwen2_5_VLVisionBlock": VISUAL,
    "Qwen3VLVisionBlock": VISUAL,
    "Qwen3_5VisionBlock": VISUAL,
    "SiglipEncoderLayer": ENCODER,
    "CLIPEncoderLayer": ENCODER,
    "PixtralAttentionLayer": "model.vision_tower.transformer.layers.{}.",
    "InternVLVisionLayer": "model.vision_tower.encoder.layer.{}.",
    "Idefics3VisionAttention": "model.vision_model.encoder.layers.{}.self_attn.",
    "MllamaVisionEncoderLayer": OF_VISION_MODEL,
    "Qwen3VLMoeVisionBlock": VISUAL,
    "Gemma4VisionEncoderLayer": ENCODER,
    "Gemma4VisionPatchEmbedder": "model.vision_tower.patch_embedder.",
    "Gemma4AudioLayer": "model.audio_tower.layers.{}.",
    "SiglipVisionEmbeddings": EMBEDDINGS,
    "CLIPVisionEmbeddings": EMBEDDINGS,
    "PaliGemmaMultiModalProjector": "model.multi_modal_projector.linear.",
}
"""Class of a tower's modules → how the names of their parameters begin."""
NOT_IN_MODEL = {
    "gemma3": ("SiglipTextEmbeddings", None, "Gemma3DecoderLayer,SiglipEncoderLayer"),
    "gemma4": ("Gemma4AudioLayer", "audio_tower", "Gemma4TextDecoderLayer,Gemma4VisionEncoderLayer"),
    "lfm2_vl": ("Siglip2TextEmbeddings", None, "Lfm2DecoderLayer,Siglip2EncoderLayer"),
    "llava": ("CLIPTextEmbeddings", None, "LlamaDecoderLayer,CLIPEncoderLayer"),
    "paligemma": ("SiglipTextEmbeddings", None, "GemmaDecoderLayer,SiglipEncoderLayer"),
}
"""Model type → a class in the `_no_split_modules` that transformers collects of its parts, what of a model has it (None: nothing
has), and classes of layers as they are usual."""


class Absent(NamedTuple):
    """A class that the default wrap policy names and a model lacks."""

    name: str
    accepted: str
    """What to type instead."""


def absent_class(distributed: Distributed, architecture: Architecture) -> Absent | None:
    """The class that the default wrap policy of FSDP does not find in a model; None where it finds all, or classes are named."""
    default = distributed.wrap_policy in (None, "transformer") and distributed.transformer_cls_names_to_wrap is None
    if distributed.strategy not in ("fsdp1", "fsdp2") or not default or architecture.model_type not in NOT_IN_MODEL:
        return None
    name, part, layers = NOT_IN_MODEL[architecture.model_type]
    if part is not None and any(part in module.name.split(".") for module in architecture.modules):
        return None
    return Absent(name, f"--transformer-cls-names-to-wrap {layers} or the classes of this model's layers")


def is_beside_text(name: str) -> bool:
    """Whether a tower has a parameter of this name, or what maps its outputs to the text part."""
    return BESIDE_TEXT.match(name) is not None


def family_of(p: Parameter, distributed: Distributed) -> str | None:
    """Which family of units has a parameter of a tower, the root for one; None of other parameters."""
    if not is_beside_text(p.name):
        return None
    classes = distributed.transformer_cls_names_to_wrap
    named = (of for name, of in TOWERS.items() if classes is None or name in classes)
    begins = (prefix for of in named for prefix in ((of,) if isinstance(of, str) else of))
    return next((prefix.removesuffix(".") for prefix in begins if p.name.startswith(prefix)), ROOT)


def units_of_tower(p: Parameter, distributed: Distributed, layout: Layout, trained: Container[str]) -> tuple[str, ...] | None:
    """The unit of each tensor of a tower, by the name of its module or the root's; None for tensors of no tower, and for those
    outside layers that the root has. NeMo Automodel gives the root each stack of layers in which nothing trains, and other stacks
    units that no row of text runs. `trained`: the beginnings of the names of stacks in which something trains."""
    family = family_of(p, distributed)
    if family is None or (p.layers is None and (family == ROOT or layout.tower_in_root)):
        return None
    if layout.tower_in_root:
        return () if p.name.partition("{}")[0] in trained else (ROOT,) * p.copies
    layers = sorted(p.layers or (0,)) if "{}" in family else [0] * p.copies
    return tuple(family.format(number) for number in layers for _ in range(p.copies // len(layers)))

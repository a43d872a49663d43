"""The units that FSDP makes of towers beside a text part, by the classes that the wrap policy names; the root has what is left.

Where samples have no images, no unit of a tower is gathered; the root is, with what it has of them.

Source: transformers, `_no_split_modules` of each model; accelerate, utils/fsdp_utils.py (`fsdp2_prepare_auto_wrap_policy`).
"""

from __future__ import annotations

import re
from collections.abc import Container

from peftplan.distributed.layout import Layout
from peftplan.distributed.strategy import Distributed
from peftplan.parameters import Parameter

ROOT = "root"
BESIDE_TEXT = re.compile(
    r"^model\.(?:visual|vision_tower|vision_model|audio_tower|multi_modal_projector|connector|embed_vision|embed_audio)\."
)
ENCODER = "model.vision_tower.encoder.layers.{}."
VISUAL = "model.visual.blocks.{}."
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
}
"""Class of a tower's modules → how the names of their parameters begin."""


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

"""The images of a batch: how many, of which size, and the other inputs of a model with a vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from peftplan.errors import InputError
from peftplan.job.setup import Setup

IMAGE_SIZE = 224
"""Image size for networks whose config states none (ResNet, ConvNeXt): the ImageNet crop that they were trained on."""
CHANNELS = 3


@dataclass
class Pictures:
    """Tensors of the batch, and a description in words."""

    batch: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, int | str] = field(default_factory=dict)


def picture_inputs(model: Any, takes: frozenset[str], setup: Setup) -> Pictures:
    """One picture per sample; none where the forward takes none, or wants more about a picture than is known here."""
    if "pixel_values" not in takes:
        return Pictures()
    if "input_ids" not in takes or "return_loss" in takes:
        return _plain(model, setup)
    rule = BESIDE_TEXT.get(model.config.model_type)
    return Pictures({}, {"images_per_sample": 0}) if rule is None else rule(model, setup)


def _plain(model: Any, setup: Setup) -> Pictures:
    """The picture of a vision model, or each frame of a clip."""
    config = getattr(model.config, "vision_config", model.config)
    height, width = _size(config)
    channels = getattr(config, "num_channels", CHANNELS)
    frames = getattr(config, "num_frames", None)
    shape = (setup.batch_size, channels, height, width) if frames is None else (setup.batch_size, frames, channels, height, width)
    count = {"images_per_sample": 1} if frames is None else {"frames_per_sample": int(frames)}
    return Pictures({"pixel_values": _pixels(model, setup, shape)}, {**count, "image_size": f"{height}x{width}"})


def _size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or IMAGE_SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _pixels(model: Any, setup: Setup, shape: tuple[int, ...]) -> torch.Tensor:
    """Processors give fp32, which only autocast takes beside weights of 16 bits."""
    return torch.zeros(shape, dtype=torch.float32 if setup.autocast != "none" else model.dtype)


def _with_text(tokens: Callable[[Any], int], *, token_types: bool = False) -> Callable[[Any, Setup], Pictures]:
    """A rule for a model whose picture takes places of the text: `tokens` of them, which `seq_len` includes."""

    def rule(model: Any, setup: Setup) -> Pictures:
        pictures = _plain(model, setup)
        needed = tokens(model.config)
        if setup.seq_len <= needed:
            raise InputError("seq_len", setup.seq_len, f"accepted: more than {needed}, the tokens of one image")
        if token_types:
            pictures.batch["token_type_ids"] = torch.zeros((setup.batch_size, setup.seq_len), dtype=torch.int64)
        pictures.facts["image_tokens"] = needed
        return pictures

    return rule


def _patches(config: Any) -> int:
    height, width = _size(config.vision_config)
    size = config.vision_config.patch_size
    return int(height // size) * int(width // size)


def _llava_tokens(config: Any) -> int:
    return _patches(config) + (1 if config.vision_feature_select_strategy == "full" else 0)


def _mllama(model: Any, setup: Setup) -> Pictures:
    """One picture of one tile; its tokens are attended to from beside the text."""
    vision = model.config.vision_config
    height, width = _size(vision)
    b, tiles = setup.batch_size, vision.max_num_tiles
    batch = {
        "pixel_values": _pixels(model, setup, (b, 1, tiles, vision.num_channels, height, width)),
        "aspect_ratio_ids": torch.zeros((b, 1), dtype=torch.int64),
        "aspect_ratio_mask": torch.ones((b, 1, tiles), dtype=torch.int64),
        "cross_attention_mask": torch.ones((b, setup.seq_len, 1, tiles), dtype=torch.int64),
    }
    return Pictures(batch, {"images_per_sample": 1, "image_tiles": tiles, "image_size": f"{height}x{width}"})


BESIDE_TEXT: dict[str, Callable[[Any, Setup], Pictures]] = {
    "llava": _with_text(_llava_tokens),
    "paligemma": _with_text(_patches, token_types=True),
    "gemma3": _with_text(lambda config: int(config.mm_tokens_per_image), token_types=True),
    "mllama": _mllama,
}
"""Model types whose images are traced beside text. For all others only text is traced, and `images_per_sample` is 0."""

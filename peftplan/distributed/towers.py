"""Frozen towers beside a text part that every rank of FSDP2 holds whole (`distributed.multimodal.frozen_sharding: replicate`).

Source: nemo_automodel 0.7.0, components/distributed/multimodal_fsdp.py (`MULTIMODAL_MODULE_NAMES`) and
components/moe/parallelizer.py (`apply_fsdp`), which leaves their parameters out of every unit.
"""

import re

from peftplan.distributed.strategy import Distributed
from peftplan.parameters import Parameter

NAMES = (
    *("visual", "vision", "vision_tower", "vision_model", "vit_model", "image_encoder", "vision_encoder"),
    *("audio_tower", "audio_encoder", "audio_model", "embed_vision", "embed_audio", "mm_projector", "aligner"),
    *("multi_modal_projector", "multimodal_projector", "vision_projector", "vit_large_projector", "audio_projector"),
)
"""Names of modules that are towers, or that map what these compute to the text part."""
OF_TOWERS = re.compile(rf"(?:^|\.)(?:{'|'.join(NAMES)})\.")


def of_tower(p: Parameter) -> bool:
    """Whether a parameter is one of a tower, or maps what a tower computes to the text part."""
    return OF_TOWERS.search(p.name) is not None


def is_whole(p: Parameter, distributed: Distributed) -> bool:
    """Whether every rank holds all of a parameter, which is of no unit."""
    return bool(distributed.whole_tower) and not p.trainable and of_tower(p)

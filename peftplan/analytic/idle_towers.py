"""Which vision-language models were rehearsed on rows without images where towers train too, and so get no gradient
(tests/rehearse/idle_towers.jsonl)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.analytic.shown import FLAT
from peftplan.arch.text_part import is_in_text_part, layers_of_images
from peftplan.errors import NoEngineError

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job

SHARED_TEXT_PARTS = ("ddp", "zero1", "zero2", "zero3")
"""Strategies under which text parts of vision-language models were rehearsed (tests/distributed/rank_jobs.jsonl)."""
MIXTURE = "qwen3_vl_moe"
"""The type with experts, of which LoRA was rehearsed under ZeRO-2."""
TRAINERS = ("transformers", "trl")
METHODS = ("full", "lora", "rslora", "qlora")


def knows_base(job: Job, strategy: str) -> bool:
    """Whether a text part was rehearsed there over such a base, in 16 bits or in 4."""
    if job.architecture.model_type == MIXTURE and (job.quant is not None or strategy != "ddp"):
        plain_lora = job.method_name in ("lora", "rslora") and job.quant is None
        return plain_lora and strategy in FLAT and job.setup.by.name in TRAINERS
    in_4_bits = job.method_name == "qlora" and job.setup.by.name in TRAINERS
    return strategy in SHARED_TEXT_PARTS and (job.quant is None or in_4_bits)


def knows_idle(job: Job, distributed: Distributed, names: tuple[str, ...]) -> bool:
    """Whether a job was rehearsed so. Raise NoEngineError where DDP does not look for what gets no gradient.

    `names`: of what trains.
    """
    images = layers_of_images(job.architecture)
    beside = [tensor.name for tensor in job.adaptation.added if images.intersection(tensor.layers or ())]
    outside = next((name for name in names if name in beside or not is_in_text_part(job.architecture, name)), None)
    expected = bool(distributed.find_unused_parameters) or bool(distributed.static_graph)
    if distributed.strategy == "ddp" and outside is not None and not expected:
        raise NoEngineError(
            f"a step without images, in which {outside} gets no gradient: DDP raises RuntimeError: Expected to have finished "
            "reduction in the prior iteration (reducer.cpp; add --find-unused-parameters, or train the text part alone)"
        )
    shared = distributed.strategy in SHARED_TEXT_PARTS and not distributed.static_graph
    return shared and job.setup.by.name in TRAINERS and job.method_name in METHODS

"""Which text parts of vision-language models have a formula, and what the others lack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.analytic.idle_towers import knows_base, knows_idle
from peftplan.analytic.running import SHOWN_PICTURES
from peftplan.analytic.shown import ZERO
from peftplan.analytic.text_parts import LORA, knows_wrapped
from peftplan.arch.text_part import SCORED, is_in_text_part, layers_of_images
from peftplan.errors import NeedsTraceError, NoEngineError, NoRankFormulaError
from peftplan.job import loss_sizes
from peftplan.job.beside_towers import knows_tower, trains_tower
from peftplan.job.further_tokens import STACK
from peftplan.job.kernels import kernels_of

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job

TRAINERS_OF_TEXT_PARTS = {
    "trl-dpo": "",
    "trl-grpo": "qwen2_5_vl",
    "swift-text-part": "qwen",
    "swift-dpo": "qwen",
    "swift-dpo-packed": "qwen2_5_vl",
    "swift-kto": "qwen2_5_vl",
    "swift-grpo": "qwen",
    "swift-grpo-reloading": "qwen2_5_vl",
    "llamafactory": "qwen",
    "llamafactory-partial": "qwen",
    "llamafactory-v1": "qwen",
}
"""Trainer → how the model types begin that it may train: of preferences those that were rehearsed (tests/rehearse/
preferences.jsonl, swift.jsonl); of others Qwen's alone where samples without images are changed. ms-swift embeds the tokens of
InternVL itself (template/templates/internvl.py), and LLaMA-Factory appends those of a picture of 64 x 64 to a batch's first row:
few of Qwen's, 256 and more of Gemma 3, InternVL and LLaVA (data/collator.py, `fake_images`)."""
TEXT_ALONE = ("plain", "transformers", "trl", "trl-dpo")
"""Trainers that give a model no image of their own where a sample has none: weights outside the text part get no gradient, but
for AdaLoRA's, whose loss reads each of its matrices."""
ALONE_ON_ONE_GPU = (*TEXT_ALONE, "axolotl")
"""Those of one GPU (tests/rehearse/axolotl_text_parts.jsonl)."""
PROJECTOR = ".multi_modal_projector"
"""A part of a model that gets no gradient where samples have no images."""


def check_text_part(job: Job) -> None:
    """Raise for what of a vision-language model does not run, or was not compared, where samples have no images."""
    adaptation, architecture = job.adaptation, job.architecture
    names = (*(tensor.name for tensor in adaptation.added), *(param.module for param in adaptation.trained))
    images_alone = job.distributed is not None and layers_of_images(architecture) and not _knows_layers(job, job.distributed)
    if job.distributed is not None and (images_alone or not _knows_shared(job, job.distributed)):
        raise NoRankFormulaError(f"a step with {job.distributed.called} and model type {architecture.model_type}")
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    if divided and job.setup.by.shows_picture and architecture.model_type not in SHOWN_PICTURES:
        raise NoRankFormulaError(f"a tower that {job.setup.by.called} shows a picture, of model type {architecture.model_type}")
    if job.setup.by.reloads_weights and job.distributed is not None and job.distributed.strategy != "zero1":
        raise NoRankFormulaError(f"weights that wait on the host, of model type {architecture.model_type}")
    if job.setup.loss in loss_sizes.OF_SHARED_ROWS:
        raise NoEngineError(f"rows that ranks share, of model type {architecture.model_type} (no formula yet)")
    compiled = kernels_of(job.setup.kernels or ()).layers is not None
    recorded = compiled and job.setup.packs_completions  # of this model, or its step has no formula
    known = "" if recorded else TRAINERS_OF_TEXT_PARTS.get(job.setup.by.name, None if job.setup.by.of_preferences else "")
    unlike = bool(layers_of_images(architecture)) and job.setup.by.of_preferences  # rehearsed: 4 % less than a formula says
    if known is None or unlike or not architecture.model_type.startswith(known):
        raise NoEngineError(f"model type {architecture.model_type} and {job.setup.by.called} (no formula yet)")
    if architecture.task_type == "SEQ_CLS" and architecture.model_type in SCORED:
        from peftplan.analytic.shown import scores_text  # which few jobs need

        if not scores_text(job):
            raise NoEngineError(f"a score of model type {architecture.model_type} with {job.setup.by.called} (no formula yet)")
        if not all(is_in_text_part(architecture, name) for name in names):  # a trace builds what transformers has
            raise NoEngineError(f"a score of {architecture.model_type} and weights outside its text part (no formula yet)")
    if not architecture.blocks:
        raise NeedsTraceError(f"activations of the text part of model type {architecture.model_type}")
    if job.script.transformers is not None:
        raise NoEngineError(f"model type {architecture.model_type} with another release of transformers (no formula yet)")
    if getattr(job.config, "num_virtual_tokens", None):
        raise NeedsTraceError(f"virtual tokens in model type {architecture.model_type}")
    if compiled:
        return
    alone = ALONE_ON_ONE_GPU if job.distributed is None else TEXT_ALONE
    if _knows_idle(job, names) and job.setup.by.name in alone and job.method_name != "adalora":
        return
    head, by_tool = f"{architecture.output_embedding}.", job.setup.by.own_lora
    if by_tool and job.method_name == "full":  # where `knows_tower` says so
        return
    if by_tool:  # a projector gets no gradient without images, and neither does a tower
        names = tuple(n for n in names if not (PROJECTOR in n or n.startswith(STACK) or trains_tower(job)))
    if not all(is_in_text_part(architecture, name) and (by_tool or not name.startswith(head)) for name in names):
        raise NeedsTraceError(f"weights that train outside the text part of model type {architecture.model_type}")


def _knows_layers(job: Job, distributed: Distributed) -> bool:
    """Whether layers that no row of text runs were rehearsed there: in full fine-tuning under FSDP2 a formula is 5 % above."""
    return distributed.strategy in ("ddp", *ZERO) or (distributed.strategy == "fsdp2" and job.method_name in LORA)


def _knows_idle(job: Job, names: tuple[str, ...]) -> bool:
    """Whether weights that train outside a text part were rehearsed, on one GPU or on a rank like this one."""
    if job.distributed is None:
        return True
    return knows_wrapped(job) or knows_idle(job, job.distributed, names)


def _knows_shared(job: Job, distributed: Distributed) -> bool:
    """Whether a text part was rehearsed on a rank like this one."""
    by_tool = job.setup.by.own_lora and knows_tower(job)
    return by_tool or knows_base(job, distributed.strategy) or knows_wrapped(job)

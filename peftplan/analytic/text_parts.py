"""Which text parts of vision-language models were rehearsed under FSDP (tests/rehearse/text_parts.jsonl)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.analytic.shown import FSDP, SHOWN_METHODS, is_bare
from peftplan.distributed.wrapped import TOWERS
from peftplan.dtypes import SIXTEEN_BITS

if TYPE_CHECKING:
    from peftplan.job.job import Job

UNDER_FSDP = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3", "internvl", "llava", "qwen3_5")
UNDER_FSDP2 = ("gemma4", "gemma4_unified")
"""The same under FSDP2 in full and with LoRA, under FSDP1 with LoRA."""
LORA = ("lora", "rslora")
ALONE = {"idefics3": (*LORA, "full"), "mllama": LORA, "qwen3_vl_moe": LORA}
"""The same under FSDP2 alone, with these methods."""
METHODS = (*SHOWN_METHODS, "partial")
LOSSES = ("full", "trl-chunked")
"""Liger's reads the shard of the head, a unit of its own where accelerate finds no final norm (`_find_final_norm`)."""
TEXT_LAYER = "DecoderLayer"
"""How the class of a text part's layers ends."""


def knows_wrapped(job: Job) -> bool:
    """Whether a text part was rehearsed so: by Trainer or SFTTrainer in 16 bits, with units of its towers' layers, or with towers
    in the root's."""
    setup, distributed = job.setup, job.distributed
    if distributed is None or distributed.strategy not in FSDP:
        return False
    model_type, divided = job.architecture.model_type, distributed.strategy == "fsdp2"
    unquantized = job.method_name in (*LORA, *(("full",) if divided else ()))
    alone = divided and job.method_name in ALONE.get(model_type, ()) and job.quant is None
    if not ((model_type in UNDER_FSDP2 and unquantized) or model_type in UNDER_FSDP or alone):
        return False
    classes = distributed.transformer_cls_names_to_wrap
    of_text = classes is None or any(name.endswith(TEXT_LAYER) for name in classes)
    known = of_text and all(name in TOWERS or name.endswith(TEXT_LAYER) for name in classes or ())
    plain = setup.by.traced_on_ranks and not (setup.by.of_preferences or setup.kernels) and setup.loss in LOSSES
    narrow = setup.dtype == setup.autocast and setup.dtype in SIXTEEN_BITS
    return known and plain and narrow and job.method_name in METHODS and is_bare(job)

"""Which vision-language models with a tower that does not train were rehearsed with NeMo Automodel's recipes
(tests/rehearse/automodel.jsonl)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftplan.job.job import Job

WITH_TOWERS: dict[tuple[str, str], tuple[bool, ...]] = {
    ("mistral3", "lora"): (False,),
    ("mistral3", "full"): (False,),
    ("qwen2_5_vl", "partial"): (False,),
    ("gemma3", "partial"): (False,),
    ("gemma3", "lora"): (False,),
    ("gemma4", "partial"): (False, True),
    ("gemma4", "lora"): (False, True),
    ("gemma4_unified", "full"): (False,),
    ("qwen3_vl", "partial"): (False,),
}
"""Model type with a tower beside its text part, and method → whether layers were checkpoints in its rehearsals. Two layers of
Ministral 3 that were, held 1.1 % more than was counted."""
ATTENTION_OF_GEMMA4 = {"partial": "eager", "full": "eager", "lora": "sdpa"}
"""Method → the attention with which Gemma 4 was rehearsed."""


def knows_tower(job: Job) -> bool:
    """Whether a model with a frozen tower beside its text part was rehearsed so."""
    architecture, model_type = job.architecture, job.architecture.model_type
    checkpoints = WITH_TOWERS.get((model_type, job.method_name), ())
    rehearsed = job.quant is None and bool(job.setup.gradient_checkpointing) in checkpoints
    if model_type in ("gemma4", "gemma4_unified"):
        return rehearsed and _knows_gemma4(job)
    scaled = all(a.scaled_queries for block in architecture.blocks for a in block.attentions)
    return rehearsed and (scaled or model_type != "mistral3")


def _knows_gemma4(job: Job) -> bool:
    """Whether Gemma 4 was rehearsed so: in bf16, a micro batch a step; with checkpoints where no layer borrows keys."""
    setup, blocks, distributed = job.setup, job.architecture.blocks, job.distributed
    borrows = any(a.borrows for block in blocks for a in block.attentions)
    plain = setup.dtype == "bf16" and setup.loss == "full" and setup.gradient_accumulation_steps == 1 and not setup.padding
    whole = distributed is not None and {distributed.tp_size, distributed.cp_size, distributed.pp_size} <= {None, 1}
    attends = setup.attn_implementation == ATTENTION_OF_GEMMA4[job.method_name]
    return plain and whole and attends and not (setup.gradient_checkpointing and (borrows or is_mixture(job)))


def hands_keys_on(job: Job) -> bool:
    """Whether no cache of keys and values is made, whatever `use_cache` says: layers of Gemma 4 that borrow them find them in
    what stands for a cache, and its mixture takes none (components/models/gemma4_moe/model.py, `_Gemma4KVShareHolder`)."""
    borrows = any(a.borrows for block in job.architecture.blocks for a in block.attentions)
    return job.setup.by.own_lora and job.architecture.model_type == "gemma4" and (borrows or is_mixture(job))


def is_mixture(job: Job) -> bool:
    """Whether a layer has experts."""
    return any(block.mlp.num_experts for block in job.architecture.blocks)

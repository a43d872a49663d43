"""Which trainers have a formula for a job: those that were rehearsed so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.errors import NoEngineError
from peftplan.job.requirements import rows_apart, writes_in_unequal_parts
from peftplan.storage.config import FOUR_BIT

if TYPE_CHECKING:
    from peftplan.job.job import Job

WRITING_ALONE = ("llama", "qwen2", "qwen3")
"""Model types whose completions of one prompt each were rehearsed, or that differ from these by norms of heads alone."""
REWARDED = ("gpt_neox", "qwen2")
"""Model types that trl's older online trainers were rehearsed with."""
REWARDED_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")
"""Optimizers that were."""
PACKED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose packed rows were rehearsed, or have the same masks."""
IN_TORCH = ("adamw_torch", "adamw_torch_fused")
"""Optimizers with which passages were read."""
EMBEDDED = ("bert", "xlm-roberta", "roberta", "distilbert", "modernbert", "llama", "qwen3", "gemma3_text")
"""Model types whose steps with embeddings of pairs were rehearsed, and RoBERTa, which runs XLM-RoBERTa's code."""


def check_trainer(job: Job) -> None:
    """Raise NoEngineError where a trainer was not rehearsed with such a job."""
    by = job.setup.by
    known = by.scoring in (None, "rows") or by.generates or by.beside_copy
    shared = job.distributed is not None and job.distributed.strategy == "fsdp2"  # where `under_fsdp2` says so
    if job.reference == "copy" and not known and not shared:
        raise NoEngineError(f"a second model under {by.called} (no formula yet)")
    if by.leaves_temperature and not _writes_alone(job):
        raise NoEngineError(f"a step of {by.called} but of Llama, Qwen 2 and 3 in full under sdpa in bf16 (no formula yet)")
    if (by.scoring == "rows of completions") and not _scores_as_rehearsed(job):
        raise NoEngineError(
            f"a step of {by.called} but of GPT-NeoX and Qwen 2 in full, loaded in fp32, as its script runs it (no formula yet)"
        )
    if (apart := rows_apart(job.setup)) is not None:
        raise NoEngineError(apart)
    if writes_in_unequal_parts(job.setup):
        raise NoEngineError("completions that PPO writes in unequal parts (no formula yet)")
    if by.packs and not _packs_as_rehearsed(job):
        raise NoEngineError(f"a step of {by.called} with this model, method, attention or strategy (no formula yet)")
    if by.reads_features and (job.method_name != "lora" or job.quant is not None):
        raise NoEngineError(f"a step of {by.called} but of LoRA on a base in 16 bits (no formula yet)")
    if by.block and not _writes_as_rehearsed(job):
        raise NoEngineError(f"a step of {by.called} with these options or this model type (no formula yet)")
    by_kernel = by.scoring == "kernel" and not job.setup.of_hidden_pairs
    if job.quant is not None and (by_kernel or by.teaches or by.rewards):
        raise NoEngineError(f"a quantized base under {by.called} (no formula yet)")
    merges = job.setup.merges_for_vllm and bool(job.method and job.method.peft_type)
    beside_tower = job.architecture.has_towers and not (by.reloads_weights or _merges_beside_tower(job))
    if merges and ((job.quant is not None and not _merges_into(job)) or beside_tower):
        raise NoEngineError(f"an adapter that {by.called} merges for vLLM, of this base (no formula yet)")


def _writes_alone(job: Job) -> bool:
    """Whether completions of one prompt each are learned as they were rehearsed."""
    setup = job.setup
    plain = setup.attn_implementation == "sdpa" and setup.kernels is None and setup.autocast == "bf16"
    return plain and job.method_name == "full" and job.architecture.model_type in WRITING_ALONE


def _scores_as_rehearsed(job: Job) -> bool:
    """Whether trl's older online trainers run models, of which the reward model is one too, as they were rehearsed."""
    from peftplan.job.teacher import reward_of

    setup, reward = job.setup, reward_of(job)
    assert reward is not None
    values, types = setup.by.values, (job.architecture.model_type, reward.architecture.model_type)
    cast = not values or job.distributed is not None  # PPO's `Accelerator` casts as DeepSpeed's alone
    loaded = setup.dtype == "fp32" and setup.autocast == ("bf16" if cast else "none") and job.script.transformers is None
    plain = bool(setup.gradient_checkpointing) and not setup.use_reentrant and not setup.padding  # else models keep their cache
    plain = setup.use_cache is not False if values else plain
    plain &= setup.attn_implementation == "sdpa" and setup.kernels is None and setup.optim in REWARDED_OPTIMIZERS
    alike = set(types) <= set(REWARDED) and (not values or types[0] == types[1])
    return loaded and plain and alike and job.method_name == "full"


def _packs_as_rehearsed(job: Job) -> bool:
    """Whether packed rows were rehearsed so: of a dense decoder in 16 bits or more, under sdpa without windows."""
    setup, shared = job.setup, job.distributed is not None and job.distributed.strategy != "ddp"
    whole = all(attention.window is None for block in job.architecture.blocks for attention in block.attentions)
    plain = setup.attn_implementation == "sdpa" and not setup.padding and setup.kernels is None and job.quant is None
    return plain and whole and not shared and job.method_name in ("full", "lora") and job.architecture.model_type in PACKED


def check_embedding(job: Job) -> None:
    """Raise NoEngineError for embeddings of pairs that no rehearsal was compared with."""
    name, model_type = "" if job.method is None else job.method.name, job.architecture.model_type
    if name not in ("full", "lora") or job.quant is not None or model_type not in EMBEDDED:
        base = "" if job.quant is None else f" on a base in {job.quant.name}"
        raise NoEngineError(f"{name}{base} of model type {model_type} with {job.setup.by.called} (no formula yet)")


def check_passages(job: Job) -> None:
    """Raise NoEngineError for a recipe for retrieval that was not rehearsed so (tests/rehearse/automodel_passages.jsonl): of
    Llama, in full, over ranks that share nothing but shards."""
    setup, distributed = job.setup, job.distributed
    plain = job.quant is None and setup.dtype == "bf16" and setup.attn_implementation == "sdpa" and not setup.padding
    whole = job.method_name == "full" and job.architecture.model_type == "llama" and not setup.gradient_checkpointing
    as_made = distributed is not None and (
        distributed.strategy == "fsdp2"
        and distributed.shards == distributed.world_size
        and distributed.reshard_after_forward is None
        and not distributed.forward_prefetch
        and distributed.offload_params in (None, "none")
    )
    if not (plain and whole and as_made) or setup.optim not in (*IN_TORCH, "te_fused_adam"):
        raise NoEngineError(f"a step of {setup.by.called} with this model, method, optimizer or strategy (no formula yet)")


def _writes_as_rehearsed(job: Job) -> bool:
    """Whether blocks behind anchors are written as was rehearsed (tests/rehearse/axolotl_strided.jsonl): by a Llama in 16 bits
    with checkpoints."""
    setup = job.setup
    alike = bool(setup.gradient_checkpointing) and job.quant is None and job.architecture.model_type == "llama"
    loaded = setup.attn_implementation in ("sdpa", "eager")
    return alike and loaded and job.method_name == ("lora" if setup.by.rows == 1 else "full")


def _merges_beside_tower(job: Job) -> bool:
    """Whether a merge beside a tower was rehearsed (tests/rehearse/swift.jsonl): of LoRA of Qwen2.5-VL and Qwen3.5 under DDP."""
    shared = job.distributed is not None and job.distributed.strategy == "ddp" and job.setup.vllm_mode != "server"
    return shared and job.method_name == "lora" and job.architecture.model_type in ("qwen2_5_vl", "qwen3_5")


def _merges_into(job: Job) -> bool:
    """Whether a merge into such a base was rehearsed (tests/rehearse/swift.jsonl)."""
    of_4_bits = job.quant is not None and job.quant.layout in FOUR_BIT and job.setup.vllm_mode != "server"
    return of_4_bits and job.is_full_or_lora and job.distributed is not None and job.distributed.strategy == "zero2"

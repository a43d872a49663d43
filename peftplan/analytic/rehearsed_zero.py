"""Which steps by DeepSpeed have a formula: those that were rehearsed (docs/reference/several-gpus.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peftplan.versions as versions
from peftplan.analytic.shown import FLAT, adapts_leaves, is_like_traced, is_plain, knows_methods, knows_optimizers
from peftplan.job.loss_sizes import CUT, SHARED, SHARED_CHUNKS
from peftplan.memory.zero3_modules import LEAVES, has_unlisted_leaves, waits_by_address

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job

APART = f"experts as before {versions.EXPERTS_FUSED.named}"
PREFETCHED = "prefetched experts of gpt-oss, for whose parameters DeepSpeed waits in the order of their addresses"
SHARING_ROWS = ("llama", "qwen2", "qwen3")
"""Model types whose rows were rehearsed shared by ranks (tests/distributed/shared_rows.jsonl, rank_jobs.jsonl)."""
LOSSES_OVER_FLAT = (CUT, "per-token")
"""Losses of functions of their own that were rehearsed under ZeRO-1 or ZeRO-2."""


def unknown_to_zero(job: Job, distributed: Distributed) -> dict[str, bool]:
    """What of a job by DeepSpeed was not rehearsed."""
    unknown = {
        "contiguous_gradients": distributed.contiguous_gradients is False,
        "deepspeed_optimizer": bool(distributed.deepspeed_optimizer) and distributed.strategy == "zero0",
        "offload_optimizer": distributed.offload_optimizer == "nvme",
        "autocast": job.setup.autocast != "bf16" and not _in_fp16(job, distributed) and not _in_fp32(job, distributed),
        "sp_size": distributed.sp_size not in (None, 1) and not _knows_ulysses(job, distributed),
        "loss": job.setup.loss
        not in ("full", "trl-chunked", "liger", *(LOSSES_OVER_FLAT if distributed.strategy in FLAT else (SHARED, SHARED_CHUNKS))),
    }
    if distributed.strategy == "zero0":
        return unknown | {"a quantized base": job.quant is not None}
    if distributed.strategy != "zero3":
        return unknown
    tables = (job.architecture.input_embedding, job.architecture.output_embedding)
    leaf = LEAVES.get(job.architecture.model_type)
    return unknown | {
        f"experts that {job.setup.by.called} makes a leaf module": has_unlisted_leaves(job.architecture)
        and not job.setup.by.traced_on_ranks,
        PREFETCHED: waits_by_address(job.architecture, distributed),
        "loss": unknown["loss"] or (job.quant is not None and job.setup.loss == "liger"),
        "deepspeed_version": distributed.keeps_leftovers
        and distributed.deepspeed_version != job.setup.by.deepspeed
        and not _knows_earlier_release(job),
        "reduce_scatter": distributed.reduce_scatter is False,
        APART: has_experts_apart(job),
        "offload_params": distributed.offload_params == "nvme",
        "modules_to_save": bool(getattr(job.config, "modules_to_save", None)),
        "bias": getattr(job.config, "bias", "none") != "none",
        "target_modules": any(module.name in tables for module in job.adaptation.matched)
        or (leaf is not None and any(t.name.startswith(leaf) for t in job.adaptation.added) and not adapts_leaves(job)),
    }


def _knows_ulysses(job: Job, distributed: Distributed) -> bool:
    """Whether rows were rehearsed that ranks share by Ulysses: by Trainer with torch's attention, of a dense model without
    windows, with gradients that are summed as they are reduced; several rows where each rank has more than one head."""
    setup, blocks = job.setup, job.architecture.blocks
    return (
        distributed.strategy in (*FLAT, "zero3")
        and (is_like_traced(job) or _divides_nf4(job))
        and job.architecture.model_type in SHARING_ROWS
        and not any(a.window for block in blocks for a in block.attentions)
        and (setup.rows == 1 or all(a.num_attention_heads > (distributed.sp_size or 1) for b in blocks for a in b.attentions))
        and (job.is_full_or_lora or job.method_name == "qlora")
        and (setup.attn_implementation, setup.loss) == ("sdpa", "full")
        and not (setup.padding or setup.by.sums_tokens or (setup.use_reentrant and setup.gradient_checkpointing))
        and distributed.reduce_scatter is not False
        and job.script.checkpoints_forward  # older releases of transformers were not rehearsed
    )


def _divides_nf4(job: Job) -> bool:
    """Whether a job is QLoRA over nf4 as Trainer runs it in bf16, three of which were rehearsed with shared rows."""
    alike = knows_methods(job) and knows_optimizers(job) and is_plain(job)
    return alike and job.method_name == "qlora" and job.quant is not None and job.quant.name == "nf4"


def _knows_earlier_release(job: Job) -> bool:
    """Whether a job by an earlier DeepSpeed is of a kind that was rehearsed (tests/rehearse/llamafactory.jsonl)."""
    return job.quant is None and job.is_full_or_lora and not (job.setup.by.of_preferences or job.setup.by.taught)


def has_experts_apart(job: Job) -> bool:
    """Whether each expert of a mixture is a module of its own."""
    return any(block.mlp.apart for block in job.architecture.blocks)


def _in_fp16(job: Job, distributed: Distributed) -> bool:
    """Whether the job is in fp16 as it was rehearsed, on the GPU."""
    return job.setup.autocast == "fp16" and distributed.offload_optimizer in (None, "none")


def _in_fp32(job: Job, distributed: Distributed) -> bool:
    """Whether the job is in fp32 as it was rehearsed: of another model DeepSpeed's engine refuses the dtype."""
    return distributed.strategy == "zero0" and job.setup.autocast == "none" and job.setup.dtype == "fp32"

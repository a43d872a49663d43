"""How models with Mamba 2 were rehearsed with NeMo Automodel's recipe (tests/rehearse/automodel.jsonl)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftplan.job.job import Job


def has_own_code(job: Job) -> bool:
    """Whether the published code of a model runs in place of that of transformers, which has the same tensors."""
    return job.setup.trust_remote_code and job.architecture.model_type == "nemotron_h"


def knows_scan(job: Job, *, built: bool) -> bool:
    """Whether Mamba 2 was rehearsed so, in bf16: of published code without checkpoints, of which attention gets none; of the
    tool's modules (`built`) LoRA on one GPU, with them, and dense models under FSDP2 without (automodel_vl.jsonl)."""
    setup = job.setup
    alone = built and job.distributed is None and job.method_name == "lora" and setup.kernels == ("mamba-ssm.scan",)
    rehearsed = alone if setup.gradient_checkpointing else has_own_code(job) or (built and _is_dense_of_ranks(job))
    return rehearsed and setup.dtype == "bf16" and setup.loss == "full"


def _is_dense_of_ranks(job: Job) -> bool:
    """Whether ranks of FSDP2 share a model without experts, and nothing else."""
    distributed, blocks = job.distributed, job.architecture.blocks
    if distributed is None or distributed.strategy != "fsdp2" or any(block.mlp.num_experts for block in blocks):
        return False
    others = {distributed.tp_size, distributed.cp_size, distributed.pp_size, distributed.dp_shard_size}
    here = distributed.offload_params in (None, "none") and distributed.reshard_after_forward is None
    known = job.method_name in ("full", "lora") and job.quant is None and job.setup.attn_implementation == "sdpa"
    return known and here and others <= {None, 1} and job.setup.kernels == ("mamba-ssm.scan",)


def knows_recorded(job: Job) -> bool:
    """Whether Mamba 2 was rehearsed in operations of torch: of Falcon-H1 in bf16 over several GPUs, without checkpoints, fully
    trained, or with LoRA where its mixer has a norm."""
    setup, distributed = job.setup, job.distributed
    if not setup.by.own_lora or distributed is None or job.architecture.model_type != "falcon_h1" or setup.kernels:
        return False
    alone = {distributed.cp_size, distributed.pp_size, distributed.ep_size} <= {None, 1}
    here = distributed.offload_params in (None, "none") and distributed.reshard_after_forward is distributed.dp_shard_size is None
    shared = distributed.tp_size not in (None, 1)
    normed = any(module.name.endswith("mamba.norm") for module in job.architecture.modules)
    as_rehearsed = (job.method_name == "full" and not shared) or (job.method_name == "lora" and normed)
    plain = as_rehearsed and setup.dtype == "bf16" and setup.loss == "full" and job.quant is None
    return alone and here and plain and not setup.gradient_checkpointing

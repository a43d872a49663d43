"""What a trace follows of a job, and what it leaves to the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peftplan.versions as versions
from peftplan.distributed.layout import ACCELERATE
from peftplan.errors import RefusedError
from peftplan.job.job import Job
from peftplan.job.loss_sizes import OF_FUNCTION, cut_scales
from peftplan.job.requirements import rows_apart
from peftplan.memory.recast import is_recast
from peftplan.memory.zero3_modules import has_unlisted_leaves, waits_by_address
from peftplan.optim import parse_optim
from peftplan.optim.torchao import is_matrix
from peftplan.storage.config import FOUR_BIT
from peftplan.versions import EXPERTS_FUSED, FORWARD_CHECKPOINTED

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed

RANKS = {
    "ddp": "ddp.Ddp",
    "fsdp1": "fsdp1.Fsdp1",
    "fsdp2": "fsdp2.Fsdp2",
    "zero1": "zero.Zero",
    "zero2": "zero.Zero",
    "zero3": "zero.Zero",
    "tp": "tp.Tp",
    "device-map": "device_map.DeviceMap",
}
"""The strategies that a trace follows → what it does of each, in a module of `trace.ranks`."""


def is_followed(job: Job) -> bool:
    """Whether a trace follows a job and its optimizer."""
    try:
        check_followed(job)
    except RefusedError:
        return False
    return not parse_optim(str(job.setup.optim)).untraced


def check_followed(job: Job) -> None:
    """Raise RefusedError for a job that no trace follows."""
    by, distributed = job.setup.by, job.distributed
    if by.own_modules:
        raise RefusedError(f"engine: trace runs models of transformers, not those of {by.called}; accepted: analytic")
    if by.own_lora and distributed is None:
        raise RefusedError(f"engine: trace runs peft's LoRA and loads as transformers does, not {by.called}; accepted: analytic")
    if by.of_preferences:
        raise RefusedError(f"engine: trace follows a step of one forward, not that of {by.called}; accepted: analytic")
    if (apart := rows_apart(job.setup)) is not None:
        raise RefusedError(f"batch_size: {apart}")
    if by.weighs_tokens or job.setup.loss in OF_FUNCTION:
        raise RefusedError(f"engine: trace follows losses of models, not one that {by.called} makes; accepted: analytic")
    if cut_scales(job.setup.loss, job.architecture):
        raise RefusedError("engine: trace scales no logits of cut cross entropy; accepted: analytic")
    if job.setup.noisy_embeddings:
        raise RefusedError("engine: trace adds no noise to embeddings; accepted: analytic")
    if job.adaptation.rests:
        raise RefusedError("engine: trace trains the same layers in each step, and method lisa others; accepted: analytic")
    if any(block.mlp.apart for block in job.architecture.blocks):
        raise RefusedError(f"engine: trace runs fused experts, not those before {EXPERTS_FUSED.named}; accepted: analytic")
    if job.quant is not None and job.quant.experts:
        raise RefusedError("engine: trace leaves stacks of experts in 16 bits; accepted: analytic")
    optimizer = parse_optim(str(job.setup.optim))
    whole = distributed is None or distributed.strategy == "ddp"
    if optimizer.temporaries is not None and whole and any(is_matrix(p.shape) for p in job.adaptation.trained):
        raise RefusedError(
            f"optim: {optimizer.name} over matrices of the base: a trace does not know what its first step holds while it times "
            "its kernels; accepted: analytic, an adapter, fsdp2 or ZeRO"
        )
    if distributed is not None and (unknown := _unknown_to_rank(job, distributed)):
        followed = "one GPU, DDP, FSDP1, FSDP2, ZeRO-1, ZeRO-2, ZeRO-3, tensor parallelism and device_map"
        raise RefusedError(f"engine: trace follows {followed}, not {unknown}; accepted: analytic")


def _unknown_to_rank(job: Job, distributed: Distributed) -> str | None:
    """What of a job over several GPUs no trace follows, in words; None if it follows all."""
    flat, divided = distributed.strategy == "fsdp1", distributed.strategy == "tp"
    in_parts = distributed.facts.splits_weights
    by_map = distributed.strategy == "device-map"
    by_deepspeed = distributed.strategy in ("zero1", "zero2", "zero3")
    sharded = in_parts and not divided and not by_map and not by_deepspeed
    unknown = {
        distributed.called: distributed.strategy not in RANKS,
        f"FSDP2 as {job.setup.by.called} runs it": distributed.strategy == "fsdp2" and job.setup.by.own_fsdp2,
        f"an adapter as {job.setup.by.called} loads it": is_recast(
            job.setup, job.quant, distributed, adapted=job.method_name != "full"
        ),
        "its tp_size": distributed.tp_size not in (None, distributed.world_size if divided else 1),
        "its ep_size": distributed.ep_size not in (None, 1),
        "its pp_size": distributed.pp_size not in (None, 1),
        "its cp_size": distributed.cp_size not in (None, 1),
        "its sp_size": distributed.sp_size not in (None, 1),
        "its custom_sharded_layers": distributed.custom_sharded_layers is not None,
        "its dp_shard_size": flat and distributed.shards != distributed.world_size,
        "4-bit weights on the host": job.setup.device_map == "cpu",
        "its offload_params": (flat or by_deepspeed) and distributed.offload_params not in (None, "none"),
        f"its wrap_policy {distributed.wrap_policy}": flat and distributed.wrap_policy not in (None, "transformer"),
        f"its reshard_after_forward {distributed.reshard_after_forward}": flat and type(distributed.reshard_after_forward) is int,
        "its transformer_cls_names_to_wrap": flat and distributed.transformer_cls_names_to_wrap is not None,
        "prefetched experts of gpt-oss": waits_by_address(job.architecture, distributed),
        f"experts that {job.setup.by.called} makes a leaf module": distributed.strategy == "zero3"
        and has_unlisted_leaves(job.architecture)
        and not job.setup.by.traced_on_ranks,
        # a rehearsed peak under FSDP2 was 9.5 % above the traced one, a rehearsed step under ZeRO-3 4.7 %
        f"adagrad under {distributed.called}": distributed.strategy in ("fsdp2", "zero3") and job.setup.optim == "adagrad",
        # its permutations stay on the host, or are moved with a quantized base
        f"boft under {distributed.called}": job.method_name == "boft"
        and (divided or by_deepspeed)
        and (distributed.strategy == "zero3" or job.quant is not None),
        f"quantized weights under {distributed.called}": (flat or divided or by_map) and job.quant is not None,
        f"reentrant checkpoints over quantized weights under {distributed.called}": distributed.strategy == "zero3"
        and job.quant is not None
        and bool(job.setup.gradient_checkpointing and job.setup.use_reentrant),
        f"reentrant checkpoints before {FORWARD_CHECKPOINTED.named}": distributed.strategy in ("fsdp2", "zero3")
        and not job.script.checkpoints_forward
        and bool(job.setup.gradient_checkpointing and job.setup.use_reentrant),
        f"its weights before {versions.LEFTOVERS_RELEASED.named}": distributed.keeps_leftovers,
        f"its autocast {job.setup.autocast}": by_deepspeed and job.setup.autocast not in ("bf16", "fp16"),
        f"its weights in {job.setup.dtype}": by_deepspeed and job.setup.dtype != job.setup.autocast,
        "its offload_optimizer": by_deepspeed and distributed.offload_optimizer not in (None, "none"),
        "its deepspeed_optimizer": by_deepspeed and bool(distributed.deepspeed_optimizer),
        "a loop without Trainer": by_deepspeed and not job.setup.by.prepares_model,
        f"its units before {versions.FSDP2_TAIL_APART.named}": distributed.strategy == "fsdp2"
        and versions.FSDP2_TAIL_APART.after(distributed.accelerate),
        f"its units under {job.setup.by.called}": sharded and job.setup.by.layout is not ACCELERATE,
        f"its shards in {job.quant.name if job.quant else None}": (sharded or by_deepspeed)
        and job.quant is not None
        and job.quant.name not in FOUR_BIT,
        f"its {job.setup.optim}": (in_parts or by_deepspeed)
        and parse_optim(str(job.setup.optim)).step_implementation == "kernel",
    }
    return next((what for what, is_so in unknown.items() if is_so), None)

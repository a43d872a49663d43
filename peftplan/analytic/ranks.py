"""A job's step on one rank of several GPUs: the differences from one GPU, and the cases without a formula."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import peftplan.versions as versions
from peftplan.job.setup import Setup
from peftplan.ledger import Ledger, Line
from peftplan.memory.load import Memory
from peftplan.memory.model import Model
from peftplan.memory.models import FORWARDS
from peftplan.memory.sharded import (
    Loader,
    Loading,
    computing,
    computing_dtype,
    grouped,
    peak_of,
    sync_buckets,
    units_of,
    whole_sizes,
)
from peftplan.memory.step import Program
from peftplan.parameters import Parameters

if TYPE_CHECKING:
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job

SHOWN_METHODS = ("full", "lora", "qlora")
"""Methods whose steps were rehearsed under FSDP2 (docs/how-to/several-gpus.md)."""


SHOWN_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")


def without_formula(job: Job) -> str | None:
    """Why a job over several GPUs has no peak formula, as a suffix for a message; None if it has one."""
    distributed = job.distributed
    assert distributed is not None
    if distributed.strategy == "ddp":
        views = bool(distributed.gradient_as_bucket_view or distributed.static_graph or distributed.find_unused_parameters)
        return " and gradient_as_bucket_view, static_graph or find_unused_parameters" if views else None
    if distributed.strategy != "fsdp2":
        return ""
    setup, method = job.setup, job.method.name if job.method else "this adapter config"
    unknown = {
        "dp_shard_size": distributed.dp_shard_size not in (None, distributed.world_size),
        "reshard_after_forward": type(distributed.reshard_after_forward) is int,
        "sync_each_batch": bool(distributed.sync_each_batch),
        "param_dtype": distributed.param_dtype not in (None, setup.autocast),
        "reduce_dtype": distributed.reduce_dtype not in (None, setup.autocast),
        "offload_params": distributed.offload_params not in (None, "none"),
        "wrap_policy": distributed.wrap_policy not in (None, "transformer"),
        "transformer_cls_names_to_wrap": distributed.transformer_cls_names_to_wrap is not None
        and distributed.transformer_cls_names_to_wrap != _layer_classes(job),
        "tp_size": distributed.tp_size not in (None, 1),
        "cp_size": distributed.cp_size not in (None, 1),
        "accelerate": versions.FSDP2_TAIL_APART.after(distributed.accelerate),
        "use_reentrant": setup.use_reentrant and bool(setup.gradient_checkpointing),
        "autocast": setup.autocast == "fp16",
        "loss": setup.loss != "full",
        f"optim {setup.optim}": setup.optim not in SHOWN_OPTIMIZERS,
        "trainer": not setup.by.prepares_model,
        f"method {method}": method not in SHOWN_METHODS or bool(getattr(job.config, "use_dora", False)),
        f"quant {setup.quant}": job.quant is not None and job.quant.name not in ("nf4", "fp4"),
        f"task {job.architecture.task_type}": job.architecture.task_type != "CAUSAL_LM",
        f"model type {job.architecture.model_type}": not _is_decoder(job),
    }
    names = [name for name, is_unknown in unknown.items() if is_unknown]
    return f" and {', '.join(names)}" if names else None


def _layer_classes(job: Job) -> tuple[str, ...]:
    """The name of the class of the model's layers."""
    return (f"{job.architecture.model_class.removesuffix('ForCausalLM')}DecoderLayer",)


def _is_decoder(job: Job) -> bool:
    """Whether the model is a plain decoder of `DECODERS`: embedding, layers, final norm, head."""
    architecture = job.architecture
    forward = FORWARDS.get(architecture.model_type)
    decoders = architecture.blocks and all(block.stack == "decoder" for block in architecture.blocks)
    return bool(forward and decoders and architecture.input_embedding and architecture.model_type in DECODERS)


DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose steps were rehearsed; Mistral runs Llama's operations."""


def setup_on_rank(job: Job) -> Setup:
    """The setup that the model runs under. FSDP2 runs without autocast: its mixed-precision policy casts the weights."""
    if job.distributed is None or job.distributed.strategy != "fsdp2":
        return job.setup
    return job.setup.model_copy(update={"autocast": "none"})


def parameters_on_rank(job: Job, parameters: Parameters) -> Parameters:
    """The parameters that operations compute with: under FSDP2, gathered."""
    if job.distributed is None or job.distributed.strategy != "fsdp2":
        return parameters
    return computing(parameters, computing_dtype(job.distributed, str(job.setup.autocast)))


def divided(inventory: Inventory, model: Model, program: Program) -> Program:
    """The program of the step on this rank. Under FSDP2 it also sets `model.units`, the groups that are gathered together."""
    job, parameters, _, holding = inventory
    if job.distributed is None or holding is None or job.distributed.strategy != "fsdp2":
        return program
    dtype = computing_dtype(job.distributed, str(job.setup.autocast))
    model.units = units_of(model, parameters, holding.parameters, job.distributed, dtype=dtype)
    return program._replace(shards=holding.parameters.all, syncs_each_batch=bool(job.distributed.sync_each_batch))


def loaded_on_rank(inventory: Inventory, buffers: Ledger, of_one_gpu: Loader) -> Loader:
    """How a rank loads the model; `of_one_gpu` unless FSDP2 shards it."""
    job, parameters, _, holding = inventory
    distributed = job.distributed
    if distributed is None or holding is None or distributed.strategy != "fsdp2":
        return of_one_gpu
    return Loading(
        grouped(job.architecture, parameters, holding.parameters, distributed),
        buffers,
        of_one_gpu if job.quant is not None else None,
        bool(distributed.cpu_ram_efficient_loading),
        whole_sizes(parameters, holding.parameters),
        not versions.FSDP2_TAIL_APART.after(distributed.accelerate),
    ).into


def synced(parameters: Parameters, load: Loader) -> Loader:
    """Loading under DDP. Its constructor broadcasts all weights from rank 0, in flat tensors of at least 250 MiB in turn."""
    return partial(_synced, flats=sync_buckets(parameters), load=load)


def _synced(memory: Memory[Any], *, flats: tuple[int, ...], load: Loader) -> None:
    load(memory)
    for nbytes in flats:
        memory.release(memory.allocate(nbytes))


def passing_on_rank(load: Loader, loaded: Ledger) -> tuple[Line, ...]:
    """What the peak of loading holds beyond the tensors that last; empty if nothing."""
    passing = peak_of(load) - loaded.bytes()
    source = "accelerate: fsdp2_prepare_model"
    return (Line("whole weights while shards are made", "temporaries", "uint8", (passing,), 1, source),) if passing > 0 else ()

"""Combinations of a strategy and a job that the libraries refuse, each with the line that raises."""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.arch.modules import Architecture
from peftplan.distributed.strategy import Distributed
from peftplan.errors import InputError, RefusedError
from peftplan.job.setup import Setup
from peftplan.methods.adaptation import Adaptation
from peftplan.storage import QuantConfig

FLOATS = ("fp16", "bf16", "fp32", "fp64")
FOREACH = ("adamw_torch", "sgd", "adagrad", "rmsprop")
"""Optimizers that step over lists of tensors (`foreach`)."""


def check_distributed(distributed: Distributed, setup: Setup, architecture: Architecture, quant: QuantConfig | None) -> None:
    """Raise RefusedError or InputError for what torch, accelerate, transformers or bitsandbytes refuse under a strategy."""
    strategy = distributed.strategy
    if strategy == "fsdp1" and quant is not None and (quant.name == "int8" or quant.quant_storage not in FLOATS):
        raise RefusedError(
            f"quant_storage: FSDP1 cannot flatten integer dtype tensors (torch, _flat_param.py), and {quant.name} stores "
            f"{quant.quant_storage if quant.name != 'int8' else 'int8'}; accepted: --quant-storage bf16 with nf4 or fp4"
        )
    if strategy == "fsdp1" and setup.autocast == "fp16" and setup.optim == "adamw_torch_fused":
        raise RefusedError(
            "optim: adamw_torch_fused fails in the first step of FSDP1 in fp16 (torch, sharded_grad_scaler.py: its found_inf has "
            "the shape [1], AdamW's step counts have none); accepted: --optim adamw_torch, or --autocast bf16"
        )
    if strategy == "device-map" and distributed.nodes > 1:
        raise InputError("nodes", distributed.nodes, "device_map is one process, which sees the GPUs of one machine; accepted: 1")
    if strategy == "tp" and setup.optim in FOREACH:
        raise RefusedError(
            f"optim: {setup.optim} steps over lists of tensors, and fails on a model in tensor parallel: mixed torch.Tensor and "
            "DTensor (the norms stay whole); accepted: one that steps tensor by tensor, such as adafactor"
        )
    if distributed.sync_each_batch is not None and setup.gradient_accumulation_steps == 1:
        raise InputError(
            "sync_each_batch", distributed.sync_each_batch, "accepted: with gradient_accumulation_steps of 2 or more"
        )
    _check_heads(distributed.tp_size or (distributed.world_size if strategy == "tp" else 1), architecture)


def _check_heads(tp_size: int, architecture: Architecture) -> None:
    """Raise InputError if attention heads cannot be divided (transformers, distributed/tensor_parallel.py: colwise)."""
    for block in architecture.blocks if tp_size > 1 else ():
        for attention in block.attentions:
            heads = attention.num_attention_heads
            if heads % tp_size:
                raise InputError("tp_size", tp_size, f"accepted: a divisor of the model's {heads} attention heads")


def traps(distributed: Distributed, setup: Setup, quant: QuantConfig | None, adaptation: Adaptation) -> Iterator[str]:
    """A warning for each choice that wastes memory without an error."""
    called = distributed.facts.called
    if (
        distributed.strategy == "fsdp2"
        and quant is not None
        and quant.name in ("nf4", "fp4")
        and quant.quant_storage not in FLOATS
    ):
        yield "quant_storage: FSDP2 shards packed weights only if they are stored as floats (bf16); each rank holds all"
    if distributed.strategy in ("fsdp1", "fsdp2") and distributed.wrap_policy in ("none", "size"):
        yield f"wrap_policy: {distributed.wrap_policy} may make no layer a unit; {called} then gathers the whole model at once"
    rows = min((tensor.shape[0] for tensor in adaptation.added if tensor.trainable and len(tensor.shape) > 1), default=None)
    if distributed.strategy == "fsdp2" and rows is not None and rows < distributed.shards:
        yield f"gpus: {distributed.shards} ranks share tensors of {rows} rows, of which each rank still holds one"
    if distributed.facts.splits_weights and str(setup.optim).startswith("paged_"):
        yield f"optim: {setup.optim} has not been tested under {called}; its states are counted as if they followed the shards"
    if distributed.strategy == "tp" and setup.optim == "adamw_torch_fused" and not adaptation.added:
        yield "optim: adamw_torch_fused fails in the first step of tensor parallelism: norms are no DTensor, matrices are"
    if distributed.find_unused_parameters and setup.gradient_checkpointing and setup.use_reentrant:
        yield "find_unused_parameters: with reentrant checkpointing DDP marks parameters ready twice and raises"

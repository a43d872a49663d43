"""Combinations of a strategy and a job that the libraries refuse, each with the line that raises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peftplan.arch.modules import Architecture
from peftplan.distributed.layout import ACCELERATE, AUTOMODEL
from peftplan.distributed.pipeline import check_schedule
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.tensor_parallel import ATTENTION_ALONE, UNPLANNED, divides_heads
from peftplan.distributed.wrapped import absent_class
from peftplan.errors import InputError, RefusedError
from peftplan.job.automodel import BUILT
from peftplan.job.script import Script
from peftplan.job.setup import Setup
from peftplan.job.shared_bases import FLOATS, check_flat_dtypes
from peftplan.job.trainers import OLDER, TRAINERS
from peftplan.storage import QuantConfig
from peftplan.versions import FSDP2_TAIL_APART, FSDP_SKIPS_ABSENT_CLASSES, MESH_OF_ALL_RANKS, PINNED_ACCELERATE, named

ONE_TABLE = ("t5", "mt5", "bart")
"""Model types whose encoder and decoder have each a module around one table of tokens."""
HOW_TO_CHECKPOINT = {"use_reentrant", "every_n_layers", "offload_checkpoints"}
"""What `activation_checkpointing_kwargs` states."""
MIXED = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that step over lists of tensors (`foreach`, `fused`), which may not be of several kinds."""


def check_distributed(
    distributed: Distributed,
    setup: Setup,
    architecture: Architecture,
    quant: QuantConfig | None,
    model_config: Mapping[str, object],
    script: Script,
) -> None:
    """Raise RefusedError or InputError for what torch, accelerate, transformers or bitsandbytes refuse under a strategy."""
    strategy = distributed.strategy
    if strategy == "fsdp1" and quant is not None and (quant.name == "int8" or quant.quant_storage not in FLOATS):
        raise RefusedError(
            f"quant_storage: FSDP1 cannot flatten integer dtype tensors (torch, _flat_param.py), and {quant.name} stores "
            f"{quant.quant_storage if quant.name != 'int8' else 'int8'}; accepted: --quant-storage bf16 with nf4 or fp4"
        )
    if strategy == "fsdp1" and setup.trainer in OLDER and setup.by is TRAINERS[setup.trainer]:
        raise RefusedError(
            "strategy: axolotl 0.21.0 has no FSDP1: ValueError (utils/schemas/validation.py:1442); accepted: ddp, fsdp2, zero1, "
            "zero2 or zero3, or --tool-version 0.19.0"
        )
    check_flat_dtypes(distributed, setup, architecture)
    if distributed.static_graph and setup.gradient_accumulation_steps > 1 and not distributed.sync_each_batch:
        raise RefusedError(
            "static_graph: DDP fails in the first backward that reduces no gradients (`no_sync`): RuntimeError: "
            "expect_autograd_hooks_ INTERNAL ASSERT FAILED (torch, reducer.cpp:1732); accepted: --sync-each-batch, or "
            "gradient_accumulation_steps 1"
        )
    if strategy == "fsdp1" and setup.autocast == "fp16" and setup.optim == "adamw_torch_fused":
        raise RefusedError(
            "optim: adamw_torch_fused fails in the first step of FSDP1 in fp16 (torch, sharded_grad_scaler.py: its found_inf has "
            "the shape [1], AdamW's step counts have none); accepted: --optim adamw_torch, or --autocast bf16"
        )
    tail_apart = setup.by.layout is ACCELERATE and not FSDP2_TAIL_APART.after(distributed.accelerate)
    if strategy == "fsdp2" and architecture.model_type in ONE_TABLE and tail_apart:
        raise RefusedError(
            f"strategy: {named('accelerate')} makes a unit of the table that encoder and decoder share, and torch refuses the "
            "model around it: ValueError: its parameter is shared with a parameter already managed by another FSDP group; "
            "accepted: ddp, zero2 or zero3"
        )
    _check_wrapped(distributed, setup, architecture)
    if setup.clip_gradients is not None and strategy.startswith("zero"):
        raise RefusedError("clip_gradients: DeepSpeed clips by itself, as `gradient_clipping` of its file says; leave it out")
    if strategy == "device-map" and distributed.nodes > 1:
        raise InputError("nodes", distributed.nodes, "one process sees the GPUs of one machine alone; accepted: 1")
    if strategy == "tp":
        _check_tensor_parallel(setup, architecture)
    if distributed.sync_each_batch is not None and setup.gradient_accumulation_steps * distributed.chunks == 1:
        raise InputError(
            "sync_each_batch", distributed.sync_each_batch, "accepted: with gradient_accumulation_steps of 2 or more"
        )
    if distributed.forward_prefetch and strategy == "fsdp2" and setup.by.layout is not AUTOMODEL:
        raise InputError("forward_prefetch", True, "accepted: with FSDP1, or with trainer automodel")
    if distributed.whole_tower and setup.by.layout is not AUTOMODEL:
        accepted = f"{setup.by.called} shards towers too; accepted: with trainer automodel or automodel-vlm"
        raise InputError("whole_tower", distributed.whole_tower, accepted)
    if strategy == "fsdp2" and (distributed.pp_size or 1) > 1:
        _check_pipeline(distributed, setup, architecture)
    if strategy == "fsdp2" and (distributed.cp_size or 1) > 1 and setup.by.traced_on_ranks:
        _check_shared_rows(distributed.cp_size or 1, setup, architecture)
    if strategy == "fsdp2" and distributed.ep_size not in (None, 1):
        _check_experts(distributed, setup, architecture)
    if strategy == "fsdp2" and 1 < distributed.divided < distributed.world_size and setup.by.traced_on_ranks:
        _check_divided(distributed, script)
    for_experts = distributed.tp_size is None and distributed.ep_size not in (None, 1)
    try:
        _check_heads(1 if for_experts else distributed.divided, architecture, model_config)
    except InputError as error:
        if distributed.tp_size is not None:
            raise
        raise InputError("gpus", distributed.gpus, f"strategy tp divides matrices by {error.value}; {error.accepted}") from None


def _check_experts(distributed: Distributed, setup: Setup, architecture: Architecture) -> None:
    """Raise InputError or RefusedError for experts that ranks do not divide beside FSDP2."""
    size = distributed.ep_size or 1
    if setup.by.layout is not AUTOMODEL:
        raise InputError("ep_size", size, f"{setup.by.called} divides no experts beside FSDP2; accepted: with trainer automodel")
    experts = {block.mlp.num_experts for block in architecture.blocks if block.mlp.variant == "moe"}
    if architecture.blocks and not experts:
        raise RefusedError(
            f"ep_size: nemo_automodel 0.7.0 refuses {architecture.model_type}: ValueError: Expert parallelism requires a MoE "
            "model (_transformers/capabilities.py:514); accepted: 1"
        )
    if (number := next((e for e in experts if e % size), None)) is not None:
        raise InputError("ep_size", size, f"accepted: a divisor of the model's {number} experts")
    if distributed.shards % size:
        raise InputError("ep_size", size, f"accepted: a divisor of the {distributed.shards} GPUs that share the weights")


def _check_shared_rows(ranks: int, setup: Setup, architecture: Architecture) -> None:
    """Raise RefusedError or InputError for rows that torch's `context_parallel` does not divide between ranks."""
    if setup.attn_implementation not in (None, "sdpa"):
        raise RefusedError(
            f"attn_implementation: {named('transformers')} refuses {setup.attn_implementation} with cp_size: ValueError: Context "
            "parallelism is supported only with SDPA attention; accepted: sdpa"
        )
    if any(a.window for block in architecture.blocks for a in block.attentions):
        raise RefusedError(
            f"cp_size: {named('accelerate')} refuses {architecture.model_type}: ValueError: Context parallelism does not support "
            "attention layers of type ['sliding_attention']"
        )
    if setup.seq_len % (2 * ranks):
        why = "torch divides a row into twice as many parts as ranks share it (_load_balancer.py asserts it)"
        raise InputError("seq_len", setup.seq_len, f"{why}; accepted: a multiple of {2 * ranks}")


def _check_wrapped(distributed: Distributed, setup: Setup, architecture: Architecture) -> None:
    """Raise RefusedError for a model of which an older accelerate's default wrap policy does not find all classes
    (`set_auto_wrap_policy`; `versions.FSDP_SKIPS_ABSENT_CLASSES`)."""
    if setup.by.layout is not ACCELERATE or not FSDP_SKIPS_ABSENT_CLASSES.after(distributed.accelerate):
        return
    if (absent := absent_class(distributed, architecture)) is not None:
        raise RefusedError(
            f"accelerate: {distributed.accelerate} refuses it: ValueError: Could not find the transformer layer class "
            f"{absent.name} in the model (transformers names it as one not to split); accepted: "
            f"{absent.accepted}, {FSDP_SKIPS_ABSENT_CLASSES.named} or later, or zero3"
        )


def changed_by_trainer(setup: Setup, distributed: Distributed) -> Setup:
    """The setup as its trainer makes it under a strategy, where peft would cast an adapter to fp32
    (`Trainer.narrow_under_zero3`)."""
    narrow = distributed.strategy == "zero3" and setup.by.narrow_under_zero3
    return setup.model_copy(update={"adapter_dtype": setup.dtype}) if narrow else setup


def asked_checkpoints(setup: Setup, distributed: Distributed, script: Script) -> Setup:
    """The setup of an adapter with the checkpoints that its trainer asks for (`Trainer.reentrant_under_zero3`).

    A trainer that generates turns checkpoints off and on again, with its arguments (trl, models/utils.py,
    `unwrap_model_for_generation`).
    """
    asks = distributed.strategy == "zero3" and setup.by.reentrant_under_zero3 and setup.gradient_checkpointing
    heard = setup.by.generates or not script.checkpoints_forward or not setup.model_fields_set.isdisjoint(HOW_TO_CHECKPOINT)
    return setup.model_copy(update={"use_reentrant": True}) if asks and heard else setup


def _check_pipeline(distributed: Distributed, setup: Setup, architecture: Architecture) -> None:
    """Raise InputError for stages that the model does not have, and RefusedError for a head that is the embedding of a model that
    NeMo Automodel builds; it may know another way with other models."""
    if layers := sum(len(block.layers) for block in architecture.blocks):
        check_schedule(distributed, layers)
    if setup.by.layout is AUTOMODEL and architecture.model_type in BUILT and architecture.ties:
        raise RefusedError(
            "pp_size: nemo_automodel refuses it: ValueError: Pipeline parallelism does not support tie_word_embeddings=True "
            "(components/distributed/pipelining/hf_utils.py:755), and this model's head is its embedding; accepted: 1"
        )


def _check_tensor_parallel(setup: Setup, architecture: Architecture) -> None:
    """Raise RefusedError for what transformers cannot run in tensor parallel."""
    if architecture.model_type in UNPLANNED:
        raise RefusedError(
            f"strategy: tp divides a model by its tp_plan, and {architecture.model_class} has none in {named('transformers')}; "
            "accepted: fsdp2 or zero3"
        )
    if setup.optim in MIXED and not setup.by.makes_optimizer:
        raise RefusedError(
            f"optim: {setup.optim} steps over lists of tensors, and a loop that passes it all parameters fails in tensor "
            "parallel: mixed torch.Tensor and DTensor (the norms stay whole); accepted: one that steps tensor by tensor, such as "
            "adafactor, or trainer transformers, which makes a group for each"
        )


def _check_divided(distributed: Distributed, script: Script) -> None:
    """Raise RefusedError for matrices that a part of the ranks shares beside accelerate's FSDP2."""
    if not MESH_OF_ALL_RANKS.after(script.transformers):
        size = distributed.divided
        raise RefusedError(
            f"tp_size: {named('transformers')} refuses {size} beside accelerate's FSDP2: RuntimeError: The parallel mesh "
            f"requires {size} processes, but world_size is {distributed.world_size} (distributed/utils.py:315); accepted: 1, "
            f"trainer automodel, or strategy tp over {size} GPUs; transformers shards over the others by its own "
            "DistributedConfig, without fsdp: `peftplan rehearse` counts such a program"
        )


def _check_heads(tp_size: int, architecture: Architecture, model_config: Mapping[str, object]) -> None:
    """Raise InputError if attention heads cannot be divided: a rank views its part of a projection as whole heads."""
    if tp_size == 1 or not (divides_heads(architecture) or architecture.model_type in ATTENTION_ALONE):
        return
    for heads, pairs in _heads(architecture, model_config):
        if heads % tp_size:
            raise InputError("tp_size", tp_size, f"accepted: a divisor of the model's {heads} attention heads")
        if pairs % tp_size:
            raise InputError("tp_size", tp_size, f"accepted: a divisor of the model's {pairs} heads of keys and values")


def _heads(architecture: Architecture, model_config: Mapping[str, object]) -> Iterator[tuple[int, int]]:
    """Heads of queries, and of keys and values: of each attention; of a model without blocks here as its config states them."""
    for block in architecture.blocks:
        for attention in block.attentions:
            yield attention.num_attention_heads, attention.num_key_value_heads
    text = model_config.get("text_config")
    stated = text if isinstance(text, Mapping) else model_config
    heads, pairs = stated.get("num_attention_heads"), stated.get("num_key_value_heads")
    if not architecture.blocks and isinstance(heads, int):
        yield heads, pairs if isinstance(pairs, int) else heads


def with_trainers_deepspeed(distributed: Distributed, setup: Setup) -> Distributed:
    """The strategy with the release of DeepSpeed that the trainer's package asks for, unless the option names one."""
    if distributed.strategy != "zero3" or distributed.deepspeed_version is not None:
        return distributed
    return distributed.model_copy(update={"deepspeed_version": setup.by.deepspeed or None})


def as_trainers_run(
    distributed: Distributed, setup: Setup, script: Script, *, adapts: bool, architecture: Architecture
) -> Distributed:
    """The strategy with what a tool or its trainer tells DDP unless the option does: whether to look for parameters without
    gradients, whether a step's graph never changes, and how large its buckets are; under FSDP2 the accelerate it needs."""
    if distributed.strategy == "fsdp2" and distributed.accelerate is None:
        pinned = setup.by.pins_accelerate or script.units_of_layers
        return distributed.model_copy(update={"accelerate": PINNED_ACCELERATE} if pinned else {})
    if distributed.strategy != "ddp":
        return distributed
    told = {name: getattr(script, name) for name in ("static_graph", "bucket_cap_mb") if getattr(distributed, name) is None}
    distributed = distributed.model_copy(update=told)
    if distributed.find_unused_parameters is not None:
        return distributed
    searches = script.finds_unused
    if searches is None:
        searches = setup.by.searches(
            adapts=adapts,
            checkpoints=bool(setup.gradient_checkpointing),
            reentrant=bool(setup.use_reentrant),
            towers=architecture.has_towers,
        )
    return distributed.model_copy(update={} if searches is None else {"find_unused_parameters": searches})

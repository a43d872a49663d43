"""A job's step on one rank of several GPUs: the differences from one GPU, and the cases without a formula."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import peftplan.versions as versions
from peftplan.distributed.device_map import places_of
from peftplan.distributed.fsdp1 import Fsdp1, Lag
from peftplan.distributed.shards import cast_on_rank
from peftplan.distributed.tensor_parallel import PLANS, architecture_on_rank, ranks_of
from peftplan.distributed.zero import groups_of, partition
from peftplan.job.setup import Setup
from peftplan.ledger import Ledger, Line
from peftplan.memory.flat_load import FlatUnits
from peftplan.memory.load import Loader, Memory, peak_of
from peftplan.memory.model import Model
from peftplan.memory.models import FORWARDS
from peftplan.memory.sharded import computing, computing_dtype, flat_units, grouped, tied, units_of
from peftplan.memory.sharded_load import Loading, whole_sizes
from peftplan.memory.step import Program, steady_step
from peftplan.memory.synced import of_model, send
from peftplan.memory.tensor_parallel import TensorParallel
from peftplan.memory.zero import Zero
from peftplan.memory.zero3 import Zero3
from peftplan.memory.zero_load import FlatLoading, PartLoading
from peftplan.parameters import Parameters
from peftplan.tape.tape import Tape

if TYPE_CHECKING:
    from peftplan.arch.modules import Architecture
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job

SHOWN_METHODS = ("full", "lora", "qlora")
"""Methods whose steps were rehearsed under FSDP and ZeRO (docs/how-to/several-gpus.md)."""


SHOWN_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")


def without_formula(job: Job) -> str | None:
    """Why a job over several GPUs has no peak formula, as a suffix for a message; None if it has one."""
    distributed = job.distributed
    assert distributed is not None
    by = job.setup.by
    rehearsed = {"ddp": by.under_ddp, "zero2": by.under_zero2}.get(distributed.strategy, ())
    if by.of_preferences and job.reference not in rehearsed:
        return f" and {by.called}"
    if distributed.strategy == "ddp":
        views = bool(distributed.gradient_as_bucket_view or distributed.static_graph or distributed.find_unused_parameters)
        return " and gradient_as_bucket_view, static_graph or find_unused_parameters" if views else None
    if distributed.strategy == "tp":
        return _listed(_unknown_to_tp(job, distributed))
    if distributed.strategy == "device-map":
        return _listed(_unknown_to_device_map(job))
    if distributed.strategy not in MODELLED:
        return ""
    unknown = (_unknown_to_zero(job, distributed) if distributed.strategy in ZERO else _unknown_to_fsdp(job, distributed)) | {
        "use_reentrant": job.setup.use_reentrant
        and bool(job.setup.gradient_checkpointing)
        and not (distributed.strategy == "fsdp1" and job.script.checkpoints_units),
        **_unrehearsed(job),
    }
    return _listed(unknown)


def _listed(unknown: dict[str, bool]) -> str | None:
    names = [name for name, is_unknown in unknown.items() if is_unknown]
    return f" and {', '.join(names)}" if names else None


def _unknown_to_tp(job: Job, distributed: Distributed) -> dict[str, bool]:
    """Parameters under transformers' tensor parallelism whose values were not rehearsed, and whether the job sets them so."""
    setup, architecture = job.setup, job.architecture
    tables = (architecture.input_embedding, architecture.output_embedding)
    method = job.method.name if job.method else "this adapter config"
    return {
        "tp_size": ranks_of(distributed) != distributed.world_size,
        "ep_size": distributed.ep_size not in (None, 1),
        "pp_size": distributed.pp_size not in (None, 1),
        f"a vocabulary of {architecture.vocab_size:,}": bool((architecture.vocab_size or 0) % ranks_of(distributed)),
        f"model type {architecture.model_type}": architecture.model_type not in PLANS,
        f"task {architecture.task_type}": architecture.task_type != "CAUSAL_LM",
        f"method {method}": method not in ("full", "lora") or bool(getattr(job.config, "use_dora", False)),
        "target_modules": any(module.name in tables for module in job.adaptation.matched),
        "modules_to_save": bool(getattr(job.config, "modules_to_save", None)),
        f"quant {job.quant and job.quant.name}": job.quant is not None,
        "loss": setup.loss != "full",
        "use_reentrant": bool(setup.use_reentrant and setup.gradient_checkpointing),
        "keep_gradients": bool(setup.keep_gradients),
        f"optim {setup.optim}": setup.optim not in SHOWN_OPTIMIZERS,
    }


def _unknown_to_fsdp(job: Job, distributed: Distributed) -> dict[str, bool]:
    """Parameters whose values were not rehearsed, and whether the job sets them so."""
    autocast = job.setup.autocast
    classes = distributed.transformer_cls_names_to_wrap
    flat = distributed.strategy == "fsdp1"
    of_fsdp2 = {
        "dp_shard_size": distributed.shards != distributed.world_size,
        "reshard_after_forward": distributed.reshard_after_forward is False,
        "sync_each_batch": bool(distributed.sync_each_batch),
        "reduce_dtype": distributed.reduce_dtype not in (None, autocast),
    }
    return {
        "reshard_after_forward": type(distributed.reshard_after_forward) is int,
        "param_dtype": distributed.param_dtype not in (None, autocast),
        "wrap_policy": distributed.wrap_policy not in (None, "transformer"),
        "transformer_cls_names_to_wrap": classes is not None and classes != _layer_classes(job),
        "tp_size": distributed.tp_size not in (None, 1),
        "cp_size": distributed.cp_size not in (None, 1),
        "accelerate": versions.FSDP2_TAIL_APART.after(distributed.accelerate) and not flat,
        "loss": job.setup.loss != "full" and not job.setup.by.own_modules,
        "custom_sharded_layers": bool(distributed.custom_sharded_layers),
        "offload_params": distributed.offload_params == "cpu" and job.setup.by.own_modules,
        "forward_prefetch": bool(distributed.forward_prefetch),
        "use_orig_params": distributed.use_orig_params is False,
        **{f"{name} under FSDP1": flat and is_set for name, is_set in of_fsdp2.items()},
    }


def _unknown_to_zero(job: Job, distributed: Distributed) -> dict[str, bool]:
    """The same under DeepSpeed."""
    unknown = {
        "contiguous_gradients": distributed.contiguous_gradients is False,
        "deepspeed_optimizer": bool(distributed.deepspeed_optimizer),
        "offload_optimizer": distributed.offload_optimizer == "nvme",
        "autocast": job.setup.autocast != "bf16" and not _in_fp16(job, distributed),
        "loss": job.setup.loss not in ("full", "trl-chunked"),
    }
    if distributed.strategy != "zero3":
        return unknown
    tables = (job.architecture.input_embedding, job.architecture.output_embedding)
    return unknown | {
        "reduce_scatter": distributed.reduce_scatter is False,
        "zero3_init": bool(distributed.zero3_init) and job.quant is not None,
        "offload_params": distributed.offload_params == "nvme",
        "loss": job.setup.loss != "full",
        "modules_to_save": bool(getattr(job.config, "modules_to_save", None)),
        "bias": getattr(job.config, "bias", "none") != "none",
        "target_modules": any(module.name in tables for module in job.adaptation.matched),
    }


def _in_fp16(job: Job, distributed: Distributed) -> bool:
    """Whether the job is in fp16 as it was rehearsed: under ZeRO-2 and ZeRO-3, on the GPU."""
    on_gpu = distributed.offload_optimizer in (None, "none")
    return job.setup.autocast == "fp16" and distributed.strategy in ("zero2", "zero3") and on_gpu


def _unknown_to_device_map(job: Job) -> dict[str, bool]:
    """What of a job was not rehearsed over several GPUs of one process, and whether it is so."""
    setup, method = job.setup, job.method.name if job.method else "this adapter config"
    return {
        f"model type {job.architecture.model_type}": job.architecture.model_type not in LLAMAS,
        f"task {job.architecture.task_type}": job.architecture.task_type != "CAUSAL_LM",
        f"method {method}": method not in ("full", "lora") or bool(getattr(job.config, "use_dora", False)),
        f"quant {job.quant and job.quant.name}": job.quant is not None,
        "trainer": not setup.by.prepares_model,
        "loss": setup.loss != "full",
        "use_reentrant": bool(setup.use_reentrant and setup.gradient_checkpointing),
        "keep_gradients": bool(setup.keep_gradients),
        f"optim {setup.optim}": setup.optim != "adamw_torch_fused",
    }


def _unrehearsed(job: Job) -> dict[str, bool]:
    """What of a job was rehearsed under no sharding strategy, and whether it is so."""
    assert job.distributed is not None
    setup, method = job.setup, job.method.name if job.method else "this adapter config"
    return {
        f"optim {setup.optim}": setup.optim not in SHOWN_OPTIMIZERS,
        "trainer": not (setup.by.prepares_model or (setup.by.own_modules and job.distributed.strategy == "fsdp2")),
        "keep_gradients": bool(setup.keep_gradients),
        f"method {method}": method not in SHOWN_METHODS or bool(getattr(job.config, "use_dora", False)),
        f"quant {setup.quant}": job.quant is not None and job.quant.name not in ("nf4", "fp4"),
        f"task {job.architecture.task_type}": job.architecture.task_type not in ("CAUSAL_LM", setup.by.task),
        f"model type {job.architecture.model_type}": not _is_decoder(job),
    }


def _layer_classes(job: Job) -> tuple[str, ...]:
    """The name of the class of the model's layers."""
    return (f"{job.architecture.model_class.removesuffix('ForCausalLM')}DecoderLayer",)


def _is_decoder(job: Job) -> bool:
    """Whether the model is a plain decoder whose steps were rehearsed: embedding, layers, final norm, head."""
    architecture = job.architecture
    forward = FORWARDS.get(architecture.model_type)
    decoders = architecture.blocks and all(block.stack == "decoder" for block in architecture.blocks)
    strategy = job.distributed.strategy if job.distributed else ""
    rehearsed = architecture.model_type in REHEARSED.get(strategy, (architecture.model_type,))
    return bool(forward and decoders and architecture.input_embedding and rehearsed)


FLAT = ("zero1", "zero2")
"""Strategies whose ranks hold all weights in 16 bits, and flat groups of what trains."""
ZERO = (*FLAT, "zero3")
FSDP = ("fsdp1", "fsdp2")
MODELLED = (*FSDP, *ZERO)
"""Sharding strategies whose steps have a formula."""
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
REHEARSED = {
    **dict.fromkeys(FLAT, (*LLAMAS, "gemma3_text", "gpt_neox", "gpt2", "opt", "bloom")),
    "zero3": (*LLAMAS, "gpt2", "opt", "gemma3_text", "gpt_neox", "bloom"),
}
"""Model types whose steps were rehearsed under DeepSpeed; Mistral runs Llama's operations."""


def setup_on_rank(job: Job) -> Setup:
    """The setup that the model runs under. FSDP2 and DeepSpeed run without autocast: they cast the weights."""
    if job.distributed is None or job.distributed.strategy not in ("fsdp2", *ZERO):  # FSDP1 runs under autocast
        return job.setup
    return job.setup.model_copy(update={"autocast": "none"})


def tape_of(job: Job) -> type[Tape]:
    """The kind of tape that a step runs on."""
    if job.distributed is None or job.distributed.strategy != "device-map":
        return Tape
    from peftplan.tape.devices import DeviceTape

    return DeviceTape


def seen(inventory: Inventory, tape: Tape) -> Tape:
    """What one GPU sees of a tape."""
    device = inventory.holding and inventory.holding.device
    if device is None:
        return tape
    from peftplan.tape.devices import DeviceTape

    assert isinstance(tape, DeviceTape)
    return tape.seen_on(device)


def architecture_of(job: Job) -> Architecture:
    """The architecture that a rank computes."""
    if job.distributed is None or job.distributed.strategy != "tp":
        return job.architecture
    return architecture_on_rank(job.architecture, ranks_of(job.distributed))


def parameters_on_rank(inventory: Inventory) -> Parameters:
    """The parameters that operations compute with: under FSDP gathered, under DeepSpeed in 16 bits."""
    job, parameters, _, holding = inventory
    if job.distributed is None or holding is None:
        return parameters
    if job.distributed.strategy == "tp":
        return holding.parameters
    if job.distributed.strategy not in MODELLED:
        return parameters
    if job.distributed.strategy in ZERO:
        return _cast(job, parameters)
    return computing(parameters, computing_dtype(job.distributed, str(job.setup.autocast)))


def _cast(job: Job, parameters: Parameters) -> Parameters:
    """The parameters as DeepSpeed leaves them."""
    assert job.distributed is not None
    return parameters._replace(all=cast_on_rank(parameters, job.distributed, autocast=str(job.setup.autocast)))


def first_step(inventory: Inventory, recording: Callable[[], Model], program: Program) -> Model | None:
    """The model after its first step under ZeRO-3, whose coordinator then knows no order; None elsewhere.

    `recording`: makes the model.
    """
    if inventory.job.distributed is None or inventory.job.distributed.strategy != "zero3":
        return None
    model = recording()
    steady_step(model, divided(inventory, model, program, None))
    return model


def divided(inventory: Inventory, model: Model, program: Program, before: Model | None, *, late: bool = False) -> Program:
    """The program of the step on this rank. It also sets `model.units`, which gathers and reduces around its parts.

    `before`: the model after the first step, where there is one. `late`: the GPU is as late as FSDP1 lets it be.
    """
    job, parameters, _, holding = inventory
    if job.distributed is not None and job.distributed.strategy == "tp":
        model.units = TensorParallel(model, job.distributed, parameters.all)
    if job.distributed is not None and job.distributed.strategy == "device-map":
        from peftplan.memory.devices import Devices

        model.units = Devices(model, places_of(parameters, job.distributed.world_size))
    if job.distributed is None or holding is None or job.distributed.strategy not in MODELLED:
        return program
    if job.distributed.strategy in FSDP:
        dtype = computing_dtype(job.distributed, str(job.setup.autocast))
        model.units = units_of(model, parameters, holding.each or holding.parameters, job.distributed, dtype=dtype)
        if late and isinstance(model.units, Fsdp1):
            model.units.lag = Lag()
        if job.distributed.strategy == "fsdp1" and dtype not in (None, str(job.setup.adapter_dtype)):
            model.running = model.running._replace(adapter_shards=str(job.setup.adapter_dtype))
        return program._replace(
            shards=holding.parameters.all, syncs_each_batch=bool(job.distributed.sync_each_batch) or job.setup.by.own_modules
        )
    masters, dtype = holding.states_of.all if holding.states_of else (), str(job.setup.autocast)
    if job.distributed.strategy in FLAT:
        model.units = Zero(model, masters, job.distributed, dtype=dtype)
    else:
        order = before.units.order if before is not None and isinstance(before.units, Zero3) else None
        model.units = Zero3(model, job.distributed, dtype=dtype, order=order)
    return program._replace(shards=masters, steps_in_backward=True)


def loaded_on_rank(inventory: Inventory, model: Model, buffers: Ledger, of_one_gpu: Loader) -> Loader:
    """How a rank loads the model. `of_one_gpu`: how one GPU loads what is not divided."""
    job, parameters, _, holding = inventory
    distributed = job.distributed
    if distributed is None or holding is None or distributed.facts.loads_on_device:
        return of_one_gpu
    if distributed.strategy == "ddp":
        return synced(parameters, buffers, holding.beside, of_one_gpu)
    if distributed.strategy == "fsdp1":
        accumulates = job.setup.gradient_accumulation_steps > 1 and not distributed.sync_each_batch
        return flat_units(model, buffers, accumulates=accumulates)
    whole = of_one_gpu if job.quant is not None else None
    if distributed.strategy == "zero3":
        table = next((p.numel for p in parameters.all if p.name == f"{job.architecture.input_embedding}.weight"), 0)
        return PartLoading(
            parameters,
            _cast(job, parameters),
            distributed,
            job.architecture.hidden_size or 0,
            str(job.setup.autocast),
            whole,
            table if tied(job.architecture) else 0,
        )
    if distributed.strategy in FLAT:
        cast, world = _cast(job, parameters), distributed.world_size
        groups = tuple((frozenset(p.name for p in group), partition(group, world)) for group in groups_of(cast.all))
        return FlatLoading(parameters, cast, groups, world, distributed.offload_optimizer == "cpu", whole)
    return Loading(
        grouped(job.architecture, parameters, holding.parameters, distributed, ends_apart=True),
        buffers,
        whole,
        bool(distributed.cpu_ram_efficient_loading) or job.setup.by.own_modules,
        whole_sizes(parameters, holding.parameters),
        not versions.FSDP2_TAIL_APART.after(distributed.accelerate),
        job.setup.by.own_modules,
    )


def first_run(load: Loader) -> Loader | None:
    """What the first forward alone makes and frees."""
    return load.first_run if isinstance(load, FlatUnits) and not load.accumulates else None


def loaded_if_full(load: Loader) -> Loader | None:
    """How a rank loads where the card has no room for `load`; None if it fails then."""
    return load._replace(on_host=True) if isinstance(load, FlatLoading) else None


def synced(parameters: Parameters, buffers: Ledger, beside: Iterable[Line], load: Loader) -> Loader:
    """Loading under DDP. Its constructor broadcasts all weights from rank 0, in flat tensors of at least 250 MiB, two at a time.
    Then it makes one bucket of all gradients, which it divides when it has seen their order (`_ddp_init_helper`).
    """
    return partial(_synced, flats=of_model(parameters, buffers), bucket=Ledger(tuple(beside)).bytes(), load=load)


def _synced(memory: Memory[Any], *, flats: tuple[int, ...], bucket: int, load: Loader) -> None:
    load(memory)
    send(memory, flats)
    memory.release(memory.allocate(bucket))


def passing_on_rank(load: Loader, loaded: Ledger) -> tuple[Line, ...]:
    """What the peak of loading holds beyond the tensors that last; empty if nothing."""
    passing = peak_of(load) - loaded.bytes()
    source = "shards and flat copies while they are made"
    return (Line("weights while they are divided", "temporaries", "uint8", (passing,), 1, source),) if passing > 0 else ()

"""DeepSpeed's config file.

Sources: DeepSpeed 0.19.8, runtime/config.py, runtime/zero/config.py, runtime/zero/offload_config.py; transformers,
integrations/deepspeed.py (what `auto` stands for).
"""

from __future__ import annotations

from collections.abc import Mapping

from peftplan.errors import InputError, OptionError, UnknownNameError, nearest
from peftplan.job.launch.content import OFF, ON, asks, block, content, switch, whole

DEEPSPEED = "deepspeed"
Options = dict[str, object]

ZERO_SILENT = frozenset(
    {
        "stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save", "load_from_fp32_weights",
        "elastic_checkpoint", "legacy_stage1", "memory_efficient_linear", "allgather_partitions",
    }
)  # fmt: skip
"""Fields of `zero_optimization` that change no peak."""
ZERO_FIELDS = {
    "overlap_comm": "overlap_comm",
    "contiguous_gradients": "contiguous_gradients",
    "reduce_scatter": "reduce_scatter",
    "round_robin_gradients": "round_robin_gradients",
    "reduce_bucket_size": "reduce_bucket_size",
    "allgather_bucket_size": "allgather_bucket_size",
    "sub_group_size": "sub_group_size",
    "stage3_prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold": "stage3_param_persistence_threshold",
    "stage3_max_live_parameters": "stage3_max_live_parameters",
    "max_live_parameters": "stage3_max_live_parameters",
    "stage3_max_reuse_distance": "stage3_max_reuse_distance",
    "max_reuse_distance": "stage3_max_reuse_distance",
}
SHARED = (
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "round_robin_gradients", "reduce_bucket_size"),
    *("allgather_bucket_size", "offload_optimizer", "zero_force_ds_cpu_optimizer"),
)
TOP_SILENT = frozenset(
    {
        "train_batch_size", "steps_per_print", "wall_clock_breakdown", "gradient_clipping", "scheduler",
        "zero_allow_untested_optimizer", "prescale_gradients", "comms_config", "comms_logger",
        "monitor_config", "tensorboard", "wandb", "csv_monitor", "flops_profiler", "dump_state", "checkpoint", "aio",
        "cuda_visible_devices", "_comment", "gradient_predivide_factor", "memory_breakdown",
    }
)  # fmt: skip
"""Fields that change no byte of a GPU."""
OFFLOAD_SILENT = frozenset(
    {
        "device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "pipeline_read", "pipeline_write",
        "pipeline", "fast_init", "cpuadam_cores_perc",
    }
)  # fmt: skip
PRECISION_SILENT = frozenset(
    {
        "enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
        "min_loss_scale", "check_grad_overflow", "immediate_grad_update",
    }
)  # fmt: skip
"""Fields of an offload, and of `bf16` and `fp16`, that change no byte of a GPU (runtime/precision_config.py). `BF16_Optimizer`
alone reads `immediate_grad_update`: of pipelines, and of ZeRO-1 whose gradients are summed in fp32 (runtime/engine.py,
`_do_optimizer_sanity_check`), neither of which is counted."""
OFFLOAD_COUNTED: Options = {"ratio": 1.0, "super_offload": False}
PRECISION_COUNTED: Options = dict.fromkeys(
    ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads"), False
)
"""Fields of these that change some, and their only value that is counted, the default."""
TOP_FIELDS = {"train_micro_batch_size_per_gpu": "batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps"}
REDUCED = "seq_parallel_communication_data_type"
TOP = (REDUCED, "zero_optimization", "fp16", "bf16", "optimizer", "data_types", "zero_force_ds_cpu_optimizer", *TOP_FIELDS)


def options(source: object) -> Options:
    """What a DeepSpeed config says as options; `auto` sets nothing, but sizes that follow the model's hidden size."""
    raw = content(source, field=DEEPSPEED)
    for name, value in raw.items():
        if name not in (*TOP_SILENT, *TOP) and asks(_enabled(value)):
            near = nearest(name, TOP)
            raise InputError(DEEPSPEED, name, f"what it changes is not counted{f'; did you mean {near[0]}?' if near else ''}")
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, Mapping) or not raw:
        raise OptionError(DEEPSPEED, source, "accepted: a config with zero_optimization and its stage")
    read: Options = {"strategy": strategy_of(zero.get("stage", 0))}
    read |= {ours: raw[name] for name, ours in TOP_FIELDS.items() if raw.get(name) not in (None, "auto")}
    if raw.get(REDUCED) is not None:
        read[REDUCED] = raw[REDUCED]
    if raw.get("optimizer") is not None:
        read["deepspeed_optimizer"] = _own_adam(raw["optimizer"])
    if raw.get("zero_force_ds_cpu_optimizer") is False:
        read["zero_force_ds_cpu_optimizer"] = False
    _check_gradients(block(raw.get("data_types") or {}, f"{DEEPSPEED}: data_types"))
    for dtype in ("bf16", "fp16"):
        enabled = _enabled(raw.get(dtype) or {})
        if not asks(enabled):
            continue
        _check_block(dtype, raw[dtype], PRECISION_SILENT, PRECISION_COUNTED)
        if enabled == "auto":
            continue
        if "autocast" in read:
            raise OptionError(DEEPSPEED, source, "bf16 and fp16 are both enabled, which DeepSpeed refuses (config.py:512)")
        read["autocast"] = dtype
    for name, value in zero.items():
        if name == "stage" or name in ZERO_SILENT or value is None:
            continue
        if name in ("offload_optimizer", "offload_param"):
            device = str(block(value, f"{DEEPSPEED}: {name}").get("device", "none"))
            if device != "none":
                _check_block(f"zero_optimization: {name}", value, OFFLOAD_SILENT, OFFLOAD_COUNTED)
            read["offload_params" if name == "offload_param" else name] = device
        elif name in ZERO_FIELDS:
            read[ZERO_FIELDS[name]] = _zero_value(name, value)
        else:
            raise UnknownNameError(
                f"{DEEPSPEED}: zero_optimization", name, (*ZERO_FIELDS, "stage", "offload_optimizer", "offload_param")
            )
    return of_stage(read)


def _own_adam(block: object) -> bool:
    """Whether the optimizer of a DeepSpeed config is its own Adam. Raises InputError for others, which are not counted."""
    kind = block.get("type") if isinstance(block, Mapping) else block
    if str(kind).lower() not in ("adam", "adamw"):
        raise InputError(f"{DEEPSPEED}: optimizer", kind, "accepted: Adam, AdamW, or none; Trainer's --optim then steps")
    params = block.get("params") if isinstance(block, Mapping) else None
    if isinstance(params, Mapping) and params.get("torch_adam"):
        raise InputError(f"{DEEPSPEED}: optimizer", "torch_adam", "torch's AdamW is not counted there; accepted: false")
    return True


def _check_gradients(dtypes: Mapping[str, object]) -> None:
    """Raise InputError for gradients that are summed in another dtype than the weights'."""
    dtype = dtypes.get("grad_accum_dtype")
    if dtype is not None and str(dtype).lower() not in ("bf16", "bfloat16", "fp16", "float16"):
        raise InputError(f"{DEEPSPEED}: data_types", dtype, "wider sums of gradients are not counted; accepted: null, bf16, fp16")


def _check_block(name: str, value: object, silent: frozenset[str], counted: Options) -> None:
    """Raise an error for a field of a block that is not known, or whose value is not counted."""
    field = f"{DEEPSPEED}: {name}"
    for key, stated in value.items() if isinstance(value, Mapping) else ():
        if key not in silent and key not in counted:
            raise UnknownNameError(field, key, (*silent, *counted))
        if key in counted and stated not in (None, counted[key]):
            raise InputError(f"{field}: {key}", stated, f"no other value than {str(counted[key]).lower()} is counted")


def _enabled(value: object) -> object:
    """Whether a block of DeepSpeed's file is on; a block that does not say is."""
    return value.get("enabled", bool(value)) if isinstance(value, Mapping) else value


def strategy_of(value: object) -> str:
    """The strategy of a stage; 0 is DeepSpeed's own engine without ZeRO."""
    if str(value) not in ("0", "1", "2", "3"):
        raise InputError(f"{DEEPSPEED}: stage", value, "accepted: 0, 1, 2, 3")
    return f"zero{value}"


def of_stage(fields: Options) -> Options:
    """Without the fields that a stage does not read. Raises InputError for an offload without ZeRO, which is not counted."""
    stage = fields["strategy"]
    if stage == "zero0" and (place := fields.get("offload_optimizer", "none")) != "none":
        raise InputError(f"{DEEPSPEED}: offload_optimizer", place, "not counted at stage 0; accepted: none, or stage 1, 2 or 3")
    others = SHARED if stage == "zero0" else ()
    return {name: value for name, value in fields.items() if name not in others and (stage == "zero3" or not _of_3(name))}


def _of_3(name: str) -> bool:
    return name.startswith("stage3_") or name in ("offload_params", "sub_group_size", "zero3_init")


def _zero_value(name: str, value: object) -> object:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in (*ON, *OFF)):
        return switch(value, f"{DEEPSPEED}: {name}")
    return whole(value, f"{DEEPSPEED}: {name}")

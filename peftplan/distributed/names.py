"""Names of the strategies and of their parameters, for whom needs no more: a job on one GPU has no strategy to check."""

from typing import Literal, NamedTuple

StrategyName = Literal["ddp", "fsdp2", "fsdp1", "zero0", "zero1", "zero2", "zero3", "tp", "device-map"]
Place = Literal["none", "cpu", "nvme"]
WrapPolicy = Literal["transformer", "size", "none"]
Prefetch = Literal["pre", "post", "none"]
Schedule = Literal["1f1b", "interleaved1f1b"]
DEFAULT: StrategyName = "ddp"
"""What Trainer under torchrun or accelerate does on several GPUs if no strategy is set."""
MOST_RANKS = 2**17
"""The most ranks that are accepted, far above any published run."""

SHARDING = ("reshard_after_forward", "dp_shard_size", "offload_params", "wrap_policy", "transformer_cls_names_to_wrap")
OF_FSDP = (*SHARDING, "min_num_params", "cpu_ram_efficient_loading", "param_dtype", "reduce_dtype", "sync_each_batch", "cp_size")
OF_PIPELINE = ("pp_schedule", "pp_microbatches", "pp_layers_per_stage", "pp_round_stages")
OF_AUTOMODEL = ("pp_stage_is_unit", "whole_tower", "routing", "forward_prefetch")
OF_ZERO = (
    *("offload_optimizer", "overlap_comm", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size"),
    *("reduce_scatter", "round_robin_gradients", "deepspeed_optimizer", "zero_force_ds_cpu_optimizer"),
    *("sp_size", "seq_parallel_communication_data_type"),
)
OF_ZERO_3 = (
    *("offload_params", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "zero3_init", "deepspeed_version"),
)


class Facts(NamedTuple):
    """What a strategy is called, and the parameters that it takes beside `gpus`, `nodes` and `accelerate`."""

    called: str
    takes: tuple[str, ...] = ()
    splits_weights: bool = False
    """Whether a rank holds only a part of the weights between steps."""
    loads_on_device: bool = False
    """Whether `from_pretrained` loads each weight, or a rank's part of it, straight to its device."""


STRATEGIES: dict[StrategyName, Facts] = {
    "ddp": Facts(
        "DDP",
        ("bucket_cap_mb", "gradient_as_bucket_view", "find_unused_parameters", "static_graph", "sync_each_batch"),
    ),
    "fsdp2": Facts(
        "FSDP2",
        (*OF_FSDP, "tp_size", "ep_size", "custom_sharded_layers", "checkpoints_parts", "pp_size", *OF_PIPELINE, *OF_AUTOMODEL),
        splits_weights=True,
    ),
    "fsdp1": Facts("FSDP1", (*OF_FSDP, "backward_prefetch", "forward_prefetch", "use_orig_params"), splits_weights=True),
    "zero0": Facts("DeepSpeed without ZeRO", ("deepspeed_optimizer", "sp_size", "seq_parallel_communication_data_type")),
    "zero1": Facts("ZeRO-1", OF_ZERO),
    "zero2": Facts("ZeRO-2", OF_ZERO),
    "zero3": Facts("ZeRO-3", (*OF_ZERO, *OF_ZERO_3), splits_weights=True),
    "tp": Facts("tensor parallelism", ("tp_size", "ep_size", "pp_size"), splits_weights=True, loads_on_device=True),
    "device-map": Facts("device_map", splits_weights=True, loads_on_device=True),
}
ALWAYS = ("strategy", "gpus", "nodes", "accelerate")
"""Fields that every strategy has."""
OPTIONS = frozenset((*ALWAYS, *(name for facts in STRATEGIES.values() for name in facts.takes)))
"""The fields of `Distributed`."""

"""A strategy as the launch files of other tools: the tables of `accelerate` and `deepspeed`, read backwards."""

from __future__ import annotations

from collections.abc import Mapping

from peftplan.distributed.strategy import Distributed
from peftplan.job.launch import accelerate, deepspeed

Fields = dict[str, object]

OF_FSDP: Mapping[str, object] = {
    "reshard_after_forward": True,
    "wrap_policy": "transformer",
    "cpu_ram_efficient_loading": False,
}
"""What is counted where FSDP's options are unset; accelerate's own defaults differ, so a file states them."""
PLACES = ("offload_params", "offload_optimizer")
"""Options of which `none` is what they are unset."""
SHARDING_STRATEGIES = {True: "FULL_SHARD", False: "SHARD_GRAD_OP"}
"""`reshard_after_forward` as FSDP1 calls it."""
PRECISIONS = {"none": "no", "bf16": "bf16", "fp16": "fp16"}
LARGE = ("transformer_based_wrap", "size_based_wrap", "no_wrap", "backward_pre", "backward_post", "no_prefetch")
"""Words that accelerate writes in capitals."""


OF_ARGUMENTS = {"offload_params": "cpu_offload"}
"""Where TrainingArguments' `fsdp_config` has another word than accelerate's file."""


def stated(distributed: Distributed) -> Fields:
    """The options of a strategy that decide what a rank holds, those that are unset included."""
    options = distributed.model_dump(exclude={"accelerate", "deepspeed_version"})
    unset = OF_FSDP if distributed.strategy.startswith("fsdp") else {}
    options |= {name: value for name, value in unset.items() if options[name] is None}
    return {**options, "gpus": distributed.gpus or 1} | {name: None for name in PLACES if options[name] == "none"}


def fsdp_fields(distributed: Distributed, *, prefix: str = "fsdp_") -> Fields:
    """`fsdp_config`: the options of FSDP under accelerate's names, which begin with `prefix`."""
    first = {option: name for name, option in reversed(accelerate.FSDP_FIELDS.items())}
    if not prefix:
        first |= OF_ARGUMENTS
    version = int(distributed.strategy[-1])
    fields: Fields = {f"{prefix}version": version}
    for option, value in stated(distributed).items():
        if option not in first or value is None:
            continue
        if option == "reshard_after_forward" and version == 1:
            fields[f"{prefix}sharding_strategy"] = SHARDING_STRATEGIES[bool(value)]
        elif option == "reshard_after_forward":
            fields[f"{prefix}reshard_after_forward"] = value
        elif option == "transformer_cls_names_to_wrap":
            fields[f"{prefix}transformer_layer_cls_to_wrap"] = ",".join(value) if isinstance(value, tuple) else value
        else:
            fields[prefix + first[option]] = _word(option, value)
    return fields


def _word(option: str, value: object) -> object:
    """Their word for one of our values."""
    for theirs, ours in accelerate.WORDS.get(option, {}).items():
        if ours == value:
            return theirs.upper() if theirs in LARGE else {"true": True, "false": False}.get(theirs, theirs)
    return value


def accelerate_file(distributed: Distributed | None, autocast: str) -> Fields:
    """accelerate's YAML for a strategy; None is one GPU."""
    if distributed is None:
        return {"distributed_type": "NO", "mixed_precision": PRECISIONS[autocast], "num_machines": 1, "num_processes": 1}
    kinds = {"ddp": "MULTI_GPU", "fsdp1": "FSDP", "fsdp2": "FSDP"}
    fields: Fields = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kinds.get(distributed.strategy, "DEEPSPEED"),
        "mixed_precision": PRECISIONS[autocast],
        "num_machines": distributed.nodes,
        "num_processes": distributed.world_size,
    }
    if distributed.strategy.startswith("fsdp"):
        fields["fsdp_config"] = fsdp_fields(distributed)
    elif distributed.strategy.startswith("zero"):
        options = stated(distributed)
        plugin = {"offload_optimizer": "offload_optimizer_device", "offload_params": "offload_param_device"}
        plugin["zero3_init"] = "zero3_init_flag"
        fields["deepspeed_config"] = {
            "zero_stage": int(distributed.strategy[-1]),
            **{theirs: options[ours] for ours, theirs in plugin.items() if options[ours] is not None},
        }
    sizes = {name: getattr(distributed, ours) for name, ours in accelerate.PARALLELISM.items()}
    if parallel := {f"parallelism_config_{name}": size for name, size in sizes.items() if size is not None}:
        if distributed.sp_size is not None:  # DeepSpeed checks the product of all
            parallel["parallelism_config_dp_replicate_size"] = distributed.replicas
        fields["parallelism_config"] = parallel
    return fields


def deepspeed_file(distributed: Distributed) -> Fields:
    """DeepSpeed's JSON for a stage of ZeRO; what Trainer fills in by its arguments is `auto`."""
    options = stated(distributed)
    first = {option: name for name, option in reversed(deepspeed.ZERO_FIELDS.items())}
    zero: Fields = {"stage": int(distributed.strategy[-1])}
    zero |= {theirs: options[option] for option, theirs in first.items() if options[option] is not None}
    zero |= {option.removesuffix("s"): {"device": options[option]} for option in PLACES if options[option] is not None}
    fields: Fields = {
        "train_batch_size": "auto",
        **dict.fromkeys(deepspeed.TOP_FIELDS, "auto"),
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
    }
    if options.get("deepspeed_optimizer"):
        auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        fields["optimizer"] = {"type": "AdamW", "params": auto}
    if (reduced := options.get(deepspeed.REDUCED)) is not None:
        fields[deepspeed.REDUCED] = reduced
    if options.get("zero_force_ds_cpu_optimizer") is False:
        fields["zero_force_ds_cpu_optimizer"] = False
    return fields

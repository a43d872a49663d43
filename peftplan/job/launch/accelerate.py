"""accelerate's config file.

Sources: accelerate, commands/config/config_args.py (`ClusterConfig`), utils/dataclasses.py (`FullyShardedDataParallelPlugin`,
`DeepSpeedPlugin`), parallelism_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from peftplan.errors import InputError, OptionError, RefusedError, UnknownNameError
from peftplan.job.launch import OF_FSDP, deepspeed
from peftplan.job.launch.content import asks, block, content, switch, whole
from peftplan.versions import FSDP_BY_PLUGIN, FSDP_OF_VERSION_2, STRATEGY_BY_RESHARD, named

ACCELERATE = "accelerate_config"
Options = dict[str, object]

SILENT = frozenset(
    {
        "compute_environment", "machine_rank", "gpu_ids", "main_process_ip", "main_process_port", "rdzv_backend", "same_network",
        "main_training_function", "enable_cpu_affinity", "mpirun_config", "downcast_bf16", "tpu_name", "tpu_zone",
        "tpu_use_cluster", "tpu_use_sudo", "command_file", "commands", "tpu_vm", "tpu_env", "debug", "use_cpu",
    }
)  # fmt: skip
"""Fields of accelerate's file that change no byte of a GPU's: how processes find each other, and other machines than GPUs."""
REFUSED = ("fp8_config", "megatron_lm_config", "dynamo_config")
"""Fields that change what a step holds, in ways that are not counted."""
KINDS = {"NO": None, "MULTI_GPU": "ddp", "FSDP": "fsdp1", "DEEPSPEED": "deepspeed"}
"""`distributed_type` → the strategy."""
FSDP_SILENT = frozenset(
    {"state_dict_type", "limit_all_gathers", "sync_module_states", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"}
)
"""Fields of `fsdp_config` that change no peak: how checkpoints are written, and what waits on the host."""
FSDP_FIELDS = {
    "offload_params": "offload_params",
    "cpu_offload": "offload_params",
    "reshard_after_forward": "reshard_after_forward",
    "sharding_strategy": "reshard_after_forward",
    "auto_wrap_policy": "wrap_policy",
    "transformer_layer_cls_to_wrap": "transformer_cls_names_to_wrap",
    "transformer_cls_names_to_wrap": "transformer_cls_names_to_wrap",
    "min_num_params": "min_num_params",
    "backward_prefetch": "backward_prefetch",
    "forward_prefetch": "forward_prefetch",
    "use_orig_params": "use_orig_params",
    "cpu_ram_efficient_loading": "cpu_ram_efficient_loading",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_offload": "offload_checkpoints",
}
"""Field of `fsdp_config`, without its prefix `fsdp_` → our option."""
WORD, UNREAD, PASSED, UNSTATED, IGNORED = OF_FSDP
"""FSDP1's strategy that a word of TrainingArguments asks for, that `reshard_after_forward` of accelerate's file does, and that
of `fsdp_config`; what `fsdp_config` leaves to transformers; a `sharding_strategy` that nobody reads (`of_release`)."""
ONLY_FSDP_1 = ("backward_prefetch", "forward_prefetch", "use_orig_params")
"""What FSDP2 ignores."""
WORDS: dict[str, dict[str, object]] = {
    "wrap_policy": {"transformer_based_wrap": "transformer", "size_based_wrap": "size", "no_wrap": "none"},
    "backward_prefetch": {"backward_pre": "pre", "backward_post": "post", "no_prefetch": "none", "none": "none"},
    "reshard_after_forward": {"full_shard": True, "1": True, "shard_grad_op": False, "2": False, "true": True, "false": False},
    "offload_params": {"true": "cpu", "false": "none"},
}
"""Option → their values for ours."""
PARALLELISM = {"dp_shard_size": "dp_shard_size", "tp_size": "tp_size", "cp_size": "cp_size", "sp_size": "sp_size"}
ULYSSES_ATTENTION = "parallelism_config_sp_attn_implementation"
OF_ULYSSES = ("sp_attn_implementation", "sp_seq_length", "sp_seq_length_is_variable")
"""What its file says of rows that ranks share by Ulysses besides how many they are; the lengths change no byte."""
GATHERED = "allgather"
"""How ranks that share rows get the keys and values of the others, unless a config says otherwise."""


def options(source: object) -> Options:
    """What an accelerate config says as options."""
    raw = {name: value for name, value in content(source, field=ACCELERATE).items() if value is not None}
    for name, value in raw.items():
        known = (*SILENT, *REFUSED, "distributed_type", "num_processes", "num_machines", "mixed_precision")
        if name in REFUSED and asks(value):
            raise OptionError(f"{ACCELERATE}: {name}", value, "what it changes is not counted")
        if name not in (*known, "fsdp_config", "deepspeed_config", "parallelism_config"):
            raise UnknownNameError(ACCELERATE, name, (*known, "fsdp_config", "deepspeed_config", "parallelism_config"))
    kind = str(raw.get("distributed_type", "NO")).upper()
    if kind not in KINDS:
        raise UnknownNameError(f"{ACCELERATE}: distributed_type", kind, KINDS)
    nodes = whole(raw.get("num_machines", 1), f"{ACCELERATE}: num_machines")
    processes = whole(raw.get("num_processes", 1), f"{ACCELERATE}: num_processes")
    if nodes < 1 or processes < 1:
        name = "num_machines" if nodes < 1 else "num_processes"
        raise InputError(f"{ACCELERATE}: {name}", raw[name], "accepted: at least 1")
    if processes % nodes:
        raise InputError(f"{ACCELERATE}: num_processes", processes, f"accepted: a multiple of the {nodes} machines")
    settings: Options = {"autocast": _precision(raw)} if "mixed_precision" in raw else {}
    if kind == "NO":
        return settings
    settings |= {"gpus": processes // nodes} | ({"nodes": nodes} if nodes > 1 else {})
    if kind == "DEEPSPEED":
        plugin = _plugin(block(raw.get("deepspeed_config"), f"{ACCELERATE}: deepspeed_config"))
        shared = block(raw.get("parallelism_config"), f"{ACCELERATE}: parallelism_config")
        return settings | plugin | ulysses_options({ULYSSES_ATTENTION: "sdpa", **shared}, processes)
    settings["strategy"] = KINDS[kind]
    if kind == "FSDP":
        settings |= fsdp_options(block(raw.get("fsdp_config"), f"{ACCELERATE}: fsdp_config"))
    return settings | parallel_options(block(raw.get("parallelism_config"), f"{ACCELERATE}: parallelism_config"))


def _precision(raw: Mapping[str, object]) -> str:
    value = str(raw["mixed_precision"]).lower()
    autocast = {"no": "none", "false": "none", "bf16": "bf16", "fp16": "fp16"}
    if value not in autocast:
        raise UnknownNameError(f"{ACCELERATE}: mixed_precision", value, ("no", "bf16", "fp16"))
    return autocast[value]


def fsdp_options(fields: Mapping[str, object]) -> Options:
    """What `fsdp_config` says. FSDP1 is the default of accelerate's file."""
    plain = {name.removeprefix("fsdp_"): value for name, value in fields.items() if value is not None}
    version = str(plain.pop("version", 1))
    if version not in ("1", "2"):
        raise InputError(f"{ACCELERATE}: fsdp_version", version, "accepted: 1, 2")
    sharding: Options = {"strategy": f"fsdp{version}"}
    if version == "1":
        stated = {WORD: plain.pop("word", None), UNREAD: plain.pop("reshard_after_forward", None)}
        sharding |= {name: str(value) for name, value in stated.items() if value is not None}
    else:
        word = plain.pop("word", None)
        sharding |= _ignored(plain.pop("sharding_strategy", None))
        if word is not None and "reshard_after_forward" not in plain:
            sharding["reshard_after_forward"] = _resharding("sharding_strategy", word)
    for name, value in plain.items():
        if name == "limit_all_gathers" and version == "1" and not asks(value):
            why = "without it the host may free and gather any number of units ahead of the GPU, which is not counted"
            raise OptionError(f"{ACCELERATE}: fsdp_{name}", value, why)
        if name in FSDP_SILENT:
            continue
        if name not in FSDP_FIELDS:
            raise UnknownNameError(f"{ACCELERATE}: fsdp_config", f"fsdp_{name}", [f"fsdp_{known}" for known in FSDP_FIELDS])
        option = FSDP_FIELDS[name]
        if version == "2" and option in ONLY_FSDP_1:
            if option == "forward_prefetch" and asks(value):
                raise OptionError(f"{ACCELERATE}: fsdp_{name}", value, "forward_prefetch is not yet implemented in FSDP2")
            continue
        if option == "reshard_after_forward":  # of FSDP2 a switch (utils/dataclasses.py: "please set to a `bool`")
            field = f"{ACCELERATE}: fsdp_{name}"
            sharding[option] = switch(value, field) if version == "2" else _resharding(name, value)
            continue
        sharding[option] = _worded(option, value, f"{ACCELERATE}: fsdp_{name}")
    return {name: value for name, value in sharding.items() if not (name == "offload_checkpoints" and value is False)}


def _resharding(name: str, strategy: object) -> object:
    """Whether a strategy frees gathered weights after forward. Raises OptionError for one that is not counted."""
    field = f"{ACCELERATE}: fsdp_{name}"
    if (why := UNSHARDED.get(str(strategy).lower())) is not None:
        raise OptionError(field, strategy, why)
    return _worded("reshard_after_forward", strategy, field)


def _ignored(strategy: object) -> Options:
    return {} if strategy is None or str(strategy).lower() in FULL else {IGNORED: str(strategy).upper()}


UNSHARDED = {
    **dict.fromkeys(("no_shard", "3"), "FSDP1 without shards is not counted; accepted: MULTI_GPU, which is equivalent"),
    **dict.fromkeys(("hybrid_shard", "4"), "its groups are the GPUs of a node; accepted: FULL_SHARD, with dp_shard_size"),
    **dict.fromkeys(("hybrid_shard_zero2", "5"), "gathered weights that stay are not counted; accepted: FULL_SHARD"),
}
"""Sharding strategies of FSDP1 that are not counted."""


def of_words(value: object) -> Options:
    """Fields of `fsdp_config` that the words of TrainingArguments' `fsdp` stand for, such as `full_shard auto_wrap offload`."""
    words = value.split() if isinstance(value, str) else value if isinstance(value, (list, tuple)) else ()
    texts = [str(getattr(word, "value", word)) for word in words]
    options: Options = {}
    for word in texts:
        if word == "auto_wrap":
            options.setdefault("auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
        elif word == "offload":
            options["offload_params"] = True
        elif word.lower() in STRATEGIES[:5]:
            options[WORD] = word
        else:
            raise UnknownNameError("fsdp", word, (*STRATEGIES[:5], "auto_wrap", "offload"))
    return options


def passed_options(fields: Mapping[str, object]) -> Options:
    """What `fsdp_config` of TrainingArguments says, with the words of `fsdp`: FSDP2 by default. transformers does not read
    `sharding_strategy`, of accelerate's own file."""
    plain = {name.removeprefix("fsdp_"): value for name, value in fields.items() if value is not None}
    ignored = _ignored(plain.pop("sharding_strategy", None))
    options = fsdp_options({"version": 2, **plain}) | ignored
    if (passed := options.pop(UNREAD, None)) is not None:
        options[PASSED] = passed
    unstated = " ".join(name for name in ("version", "reshard_after_forward") if name not in plain)
    return options | ({UNSTATED: unstated} if unstated else {})


def of_release(sharding: Options, stated: Options, release: str | None) -> tuple[Options, tuple[str, ...]]:
    """The options with what this release of transformers runs of them, and a note where a strategy is asked for in vain.

    accelerate, utils/dataclasses.py: FSDP1's `sharding_strategy` is FULL_SHARD unless the caller, or `fsdp_sharding_strategy` of
    its own file, says otherwise; `reshard_after_forward` would count without one. Raises InputError where transformers or
    accelerate raises an error, and where the release runs another version of FSDP than is counted.
    """
    ignored = stated.pop(IGNORED, None)
    sharding, notes = _of_release(sharding, stated, release)
    if ignored is None:
        return sharding, notes
    read_by = "accelerate" if sharding.get("strategy") == "fsdp2" else "transformers"
    return sharding, (*notes, f"{named(read_by)} does not read sharding_strategy {ignored}, but reshard_after_forward")


def _of_release(sharding: Options, stated: Options, release: str | None) -> tuple[Options, tuple[str, ...]]:
    unstated = str(stated.pop(UNSTATED, ""))
    if unstated and sharding.get("strategy") == "fsdp2":
        if FSDP_BY_PLUGIN.after(release) or ("version" in unstated and FSDP_OF_VERSION_2.after(release)):
            why = f"transformers {release} runs FSDP1 there; accepted: 1"
            raise InputError("fsdp_config: version", "not stated" if "version" in unstated else 2, why)
        if "reshard_after_forward" in unstated and STRATEGY_BY_RESHARD.after(release):
            return {**sharding, "reshard_after_forward": False}, ()
    passed = stated.pop(PASSED, None)
    if passed is not None and not FSDP_BY_PLUGIN.after(release):
        if str(passed).lower() not in STRATEGIES:
            why = f"with FSDP1 {named('accelerate')} takes the name of a strategy; accepted: {', '.join(STRATEGIES[:5])}"
            raise InputError("fsdp_config: reshard_after_forward", passed, why)
        stated = {**stated, UNREAD: passed}
    if sharding.get("strategy") != "fsdp1" or sharding.get("reshard_after_forward") is not None:
        return sharding, ()
    if STRATEGY_BY_RESHARD.after(release) and WORD in stated:
        return sharding | fsdp_options({"version": 1, "sharding_strategy": stated[WORD]}), ()
    others = [str(value).upper() for value in stated.values() if str(value).lower() not in FULL]
    if not others:
        return sharding, ()
    note = (
        f"FSDP1 runs FULL_SHARD, not {others[0]}: {named('accelerate')} reads the strategy of FSDP1 from "
        "fsdp_sharding_strategy in its own file, not from reshard_after_forward, as which transformers passes it"
    )
    return {**sharding, "reshard_after_forward": True}, (note,)


STRATEGIES = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2", *"12345")
"""Names and numbers of FSDP1's strategies (accelerate, utils/constants.py: `FSDP_SHARDING_STRATEGY`)."""
FULL = ("full_shard", "true", "1")
"""What asks for no other strategy than the default."""


def parallel_options(fields: Mapping[str, object]) -> Options:
    """What `parallelism_config` says."""
    sharding: Options = {}
    for name, value in fields.items():
        plain = name.removeprefix("parallelism_config_")
        if value is None or plain in ("dp_replicate_size", *OF_ULYSSES) or plain.endswith("_backend"):
            continue
        if plain == "cp_comm_strategy":
            if value != GATHERED:
                raise InputError(f"{ACCELERATE}: {name}", value, f"accepted: {GATHERED}; another one is not counted")
            continue
        size = whole(value, f"{ACCELERATE}: {name}") if plain.endswith("_size") else value
        if plain in PARALLELISM and size != 1:
            sharding[PARALLELISM[plain]] = size
        elif plain not in PARALLELISM and size != 1:
            raise UnknownNameError(f"{ACCELERATE}: parallelism_config", name, PARALLELISM)
    return sharding


def ulysses_options(fields: Mapping[str, object], processes: int | None = None) -> Options:
    """What `parallelism_config` says beside DeepSpeed, which divides the weights over all ranks, whatever `dp_shard_size` is.
    Nothing where no ranks share rows. `processes`: ranks, where they are known.

    Raises RefusedError for numbers of ranks that DeepSpeed's check of batch sizes refuses, and for attention that is not named.
    """
    plain = {name.removeprefix("parallelism_config_"): value for name, value in fields.items()}
    if (ranks := parallel_options(plain).get("sp_size")) is None:
        return {}
    dp, sp = [whole(plain.get(f"dp_{kind}_size") or 1, ACCELERATE) for kind in ("replicate", "shard")], int(str(ranks))
    if processes is not None and prod(dp) * sp != processes:
        raise RefusedError(
            f"{ACCELERATE}: {named('deepspeed')} refuses it: AssertionError: Check batch related parameters; dp_replicate_size x "
            f"dp_shard_size x sp_size is {prod(dp) * sp}; accepted: {processes}, the number of processes"
        )
    if (attention := plain.get("sp_attn_implementation")) is None:
        raise RefusedError(
            f"{ACCELERATE}: {named('deepspeed')} refuses it: ValueError: core_attn_implementation='None' does not match "
            "model config (ulysses_sp.py:461); accepted: a DeepSpeedSequenceParallelConfig that names sp_attn_implementation"
        )
    return {name: value for name, value in parallel_options(plain).items() if name != "dp_shard_size"} | {
        "attn_implementation": attention
    }


def _worded(option: str, value: object, field: str) -> object:
    """Our value for one of accelerate's."""
    words = WORDS.get(option)
    text = str(value).lower()
    if words is not None:
        if text not in words:
            raise InputError(field, value, f"accepted: {', '.join(words)}")
        return words[text]
    if option in ("transformer_cls_names_to_wrap",):
        return tuple(str(value).split(",")) if not isinstance(value, (list, tuple)) else tuple(map(str, value))
    if option == "min_num_params":
        return whole(value, field)
    return switch(value, field)


PLUGIN_SILENT = frozenset(
    {
        "deepspeed_multinode_launcher", "deepspeed_hostfile", "zero3_save_16bit_model", "gradient_clipping",
        "seq_parallel_communication_data_type",
    }
)  # fmt: skip
"""Fields of `deepspeed_config` that change no byte of a GPU; the last one accelerate does not pass to DeepSpeed."""


def _plugin(fields: Mapping[str, object]) -> Options:
    """What `deepspeed_config` of accelerate's file says: a few fields, or the path of DeepSpeed's own file."""
    if (path := fields.get("deepspeed_config_file")) is not None:
        return deepspeed.options(path)
    sharding: Options = {"strategy": deepspeed.strategy_of(fields.get("zero_stage", 2))}
    known = (*PLUGIN_SILENT, "zero_stage", "gradient_accumulation_steps", "offload_optimizer_device", "offload_param_device")
    for name, value in fields.items():
        if name in PLUGIN_SILENT or name == "zero_stage" or value is None:
            continue
        if name == "gradient_accumulation_steps" and value != "auto":
            sharding[name] = value
        elif name == "offload_optimizer_device":
            sharding["offload_optimizer"] = str(value)
        elif name == "offload_param_device":
            sharding["offload_params"] = str(value)
        elif name == "zero3_init_flag":
            sharding["zero3_init"] = switch(value, f"{ACCELERATE}: {name}")
        elif name != "gradient_accumulation_steps":
            raise UnknownNameError(f"{ACCELERATE}: deepspeed_config", name, known)
    return deepspeed.of_stage(sharding)

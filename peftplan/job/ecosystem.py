"""Read the objects of other libraries by duck typing: peft's configs, `BitsAndBytesConfig`, `TrainingArguments`, `SFTConfig`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from peftplan import files
from peftplan.errors import InputError, MissingError, quoted
from peftplan.job.tasks import OF_VLLM
from peftplan.job.trainer import Trainer
from peftplan.job.trainer_words import TrainerName
from peftplan.job.trainers import DEFAULT, TRAINERS

MAX_ADAPTER_CONFIG_BYTES = 2**20
"""Far above any adapter_config.json: they have a few KB, also with a long list of targets."""

TRAINING_FIELDS = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "optim": "optim",
    "optim_args": "optim_args",
    "optim_target_modules": "optim_target_modules",
    "max_length": "seq_len",
    "use_cache": "use_cache",
    "save_total_limit": "save_total_limit",
}
"""Fields of transformers' TrainingArguments and of TRL's configs → ours. `activation_checkpointing` is 5.24's name."""


NOT_COUNTED = ("torch_compile", "label_smoothing_factor", "neftune_noise_alpha")
"""Fields of TrainingArguments that change the memory of a step and that no engine models: compiled kernels, another loss, noise
on the embeddings."""


def adapter_config(peft_config: object) -> dict[str, object]:
    """The fields of an adapter config given as a path to a JSON file, a dict, or a peft `PeftConfig`."""
    if isinstance(peft_config, (str, os.PathLike)):
        path = Path(os.fspath(peft_config))
        fields = _adapter_file(path / "adapter_config.json" if os.path.isdir(path) else path)
    elif (of_object := _fields(peft_config)) is not None:
        fields = {name: _plain(value) for name, value in of_object.items()}
    else:
        accepted = "accepted: a path to an adapter_config.json, its dict, or a peft PeftConfig"
        raise InputError("peft_config", peft_config, accepted)
    checked: dict[str, object] = {}
    for name, value in fields.items():
        if not isinstance(name, str) or not _is_finite(value):
            raise InputError(
                f"peft_config: {name if isinstance(name, str) else quoted(name)}",
                value,
                "accepted: string keys and finite numbers",
            )
        checked[name] = value
    if not isinstance(checked.get("peft_type"), (str, type(None))):
        raise InputError("peft_config: peft_type", checked["peft_type"], "accepted: the name of a peft type")
    return checked


def base_model(peft_config: object) -> str:
    """The model that an adapter config names as its base. Raises InputError if it names none."""
    accepted = "name a model, or a peft_config whose base_model_name_or_path names one"
    if peft_config is None:
        raise MissingError("model", accepted)
    name = adapter_config(peft_config).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError("peft_config: base_model_name_or_path", name, accepted)
    return name


def _fields(config: object) -> dict[object, object] | None:
    """A dict, or an object's own `to_dict()`; None for anything else."""
    to_dict = None if isinstance(config, type) else getattr(config, "to_dict", None)
    written = to_dict() if callable(to_dict) else config
    return dict(written) if isinstance(written, Mapping) else None


def _adapter_file(path: Path) -> dict[object, object]:
    """The object in an adapter_config.json. Raises InputError, one line, for anything else under that name."""
    try:
        raw = json.loads(files.content(path, field="peft_config", most=MAX_ADAPTER_CONFIG_BYTES).decode("utf-8"))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError("peft_config", str(path), f"not a JSON file: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("peft_type"), str):
        raise InputError("peft_config", str(path), "accepted: a JSON object with a peft_type")
    return raw


def _is_finite(value: object) -> bool:
    """Whether a value holds no infinity and no NaN. A list that occurs many times is checked once."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if isinstance(item, float) and not isfinite(item):
            return False
        if isinstance(item, (Mapping, list, tuple, set, frozenset)) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(item.values() if isinstance(item, Mapping) else item)
    return True


def quant_options(config: object) -> dict[str, object]:
    """Our options for a transformers `BitsAndBytesConfig` (or its dict)."""
    if config is None:
        return {}
    raw: dict[object, object] = _fields(config) or {}
    if raw.get("load_in_8bit"):
        return {"quant": "int8", "quant_skip_modules": _names(raw.get("llm_int8_skip_modules"))}
    if not raw.get("load_in_4bit"):
        raise InputError("quantization_config", config, "accepted: a BitsAndBytesConfig with load_in_4bit or load_in_8bit")
    return {
        "quant": raw.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": bool(raw.get("bnb_4bit_use_double_quant", False)),
        "compute_dtype": raw.get("bnb_4bit_compute_dtype") or "fp32",
        "quant_skip_modules": _names(raw.get("llm_int8_skip_modules")),
    }


def training_options(args: object) -> dict[str, object]:
    """Our options for a `TrainingArguments` or `SFTConfig`."""
    if args is None:
        return {}
    if not hasattr(args, "per_device_train_batch_size"):
        raise InputError("training_args", args, "accepted: a transformers TrainingArguments or a TRL SFTConfig")
    for name in NOT_COUNTED:
        if value := getattr(args, name, None):
            raise InputError(f"training_args.{name}", value, "accepted: unset; what it changes is not counted")
    options = {
        ours: _plain(getattr(args, name)) for name, ours in TRAINING_FIELDS.items() if getattr(args, name, None) is not None
    }
    trainer = TRAINERS[_trainer(args)]
    options["trainer"] = trainer.name
    unread = () if getattr(args, "use_vllm", False) else OF_VLLM
    for name in sorted(trainer.options.difference(unread)):
        if (value := getattr(args, name, None)) is not None:
            options[name] = ",".join(value) if isinstance(value, list) else value  # DPO's losses may be several
    if trainer.teaches and (teacher := getattr(args, "teacher_model_name_or_path", None)) is not None:
        options["teacher_model"] = teacher
    if trainer.rewards:
        if getattr(args, "use_vllm", False):
            raise InputError("training_args.use_vllm", True, f"accepted: unset; vLLM beside {trainer.called} is not counted")
        of_config = {"reward_model": "reward_model_path", "max_completion_length": "max_new_tokens"}
        options |= {ours: value for ours, name in of_config.items() if (value := getattr(args, name, None)) is not None}
    options |= _loading(args)
    _refuse_padding_free(args)
    _refuse_other_losses(args, trainer)
    options |= _checkpointing(args, on=bool(options.get("gradient_checkpointing")))
    options["autocast"] = "bf16" if getattr(args, "bf16", False) else "fp16" if getattr(args, "fp16", False) else "none"
    if _plain(getattr(args, "eval_strategy", "no")) != "no":
        options["eval_batch_size"] = getattr(args, "per_device_eval_batch_size", None)
    return options | _sharding(args) | _liger(args, trainer)


def _sharding(args: object) -> dict[str, object]:
    """Options for several GPUs from `fsdp`, `fsdp_config`, `deepspeed` and `parallelism_config`; not the number of GPUs."""
    from peftplan.job.launch import accelerate

    options: dict[str, object] = {}
    if fsdp := getattr(args, "fsdp", None):
        fields = {**_mapping(args, "fsdp_config"), **accelerate.of_words(fsdp)}
        read = accelerate.passed_options if fsdp is True else accelerate.fsdp_options  # transformers 5 moved the words there
        options |= read(fields)
    if parallel := getattr(args, "parallelism_config", None):
        sizes = {name: getattr(parallel, name, None) for name in PARALLELISM_FIELDS}
        ring, ulysses = (getattr(parallel, name, None) for name in ("cp_handler", "sp_handler"))
        sizes["cp_comm_strategy"] = getattr(ring, "cp_comm_strategy", None)
        sizes["sp_attn_implementation"] = getattr(ulysses, "sp_attn_implementation", None)
        read = accelerate.ulysses_options if getattr(args, "deepspeed", None) else accelerate.parallel_options
        options |= read(sizes)
    if deepspeed := getattr(args, "deepspeed", None):
        options["deepspeed"] = deepspeed
    return options


PARALLELISM_FIELDS = ("dp_shard_size", "tp_size", "cp_size", "sp_size")
"""Sizes of accelerate's `ParallelismConfig`."""


LOADING_FIELDS = ("dtype", "attn_implementation")
"""Fields of SFTConfig's `model_init_kwargs` that are options here too."""


def _loading(args: object) -> dict[str, object]:
    """Options that say how SFTTrainer loads a model by its name. `auto` sets nothing."""
    kwargs = _mapping(args, "model_init_kwargs")
    if kwargs.get("quantization_config") is not None:
        raise InputError("training_args.model_init_kwargs", "quantization_config", "accepted: as quantization_config=…")
    return {name: kwargs[name] for name in LOADING_FIELDS if kwargs.get(name) not in (None, "auto")}


def _refuse_padding_free(args: object) -> None:
    """Raises InputError if SFTTrainer puts a batch into one long sequence (trl, `SFTTrainer.__init__`)."""
    strategy = getattr(args, "packing_strategy", None)
    if getattr(args, "padding_free", False):
        raise InputError("training_args.padding_free", True, "accepted: False; one sequence without padding is not counted")
    if getattr(args, "packing", False) and strategy in PADDING_FREE:
        accepted = "accepted: wrapped, or no packing; the one sequence that it makes of a batch is not counted"
        raise InputError("training_args.packing_strategy", strategy, accepted)


PADDING_FREE = ("bfd", "bfd_split")
"""Strategies of packing that imply `padding_free` in trl."""

BETWEEN = "a number between 0 and 1; the divergence without a mixture"
OTHER_LOSSES: dict[TrainerName, dict[str, tuple[tuple[float, ...], str]]] = {
    "trl-gkd": {"beta": ((0, 1), BETWEEN)},
    "trl-gold": {"beta": ((0, 1), BETWEEN), "use_uld_loss": ((True,), "False; the loss of two vocabularies")},
    "trl-tpo": {"tpo_alpha": ((0,), "a number above 0; two rows of three")},
}
"""Trainer → argument → values at which a step holds something else, what is accepted, and what is not counted."""


def _refuse_other_losses(args: object, trainer: Trainer) -> None:
    """Raises InputError if a distillation or TPO keeps other tensors (trl, `generalized_jsd_loss`, `TPOTrainer`)."""
    for name, (values, accepted) in OTHER_LOSSES.get(trainer.name, {}).items():
        if (value := getattr(args, name, None)) in values:
            raise InputError(f"training_args.{name}", value, f"accepted: {accepted} is not counted")


CHECKPOINTING_FIELDS = {"every_n_layers": "every_n_layers", "offload": "offload_checkpoints"}
"""Names in `activation_checkpointing_kwargs` that Trainer takes out for transformers (5.24, trainer.py) → ours."""


def _checkpointing(args: object, *, on: bool) -> dict[str, object]:
    """Options from `gradient_checkpointing_kwargs` (5.24: `activation_checkpointing_kwargs`). None means non-reentrant.

    They set nothing if checkpointing is off. Raises InputError for TRL's `activation_offloading` and `selective`, which are not
    counted.
    """
    kwargs = _mapping(args, "activation_checkpointing_kwargs") or _mapping(args, "gradient_checkpointing_kwargs")
    if getattr(args, "activation_offloading", False):
        raise InputError("activation_offloading", True, "accepted: False; what TRL moves to the host is not counted")
    if kwargs.get("selective"):
        raise InputError("gradient_checkpointing_kwargs.selective", kwargs["selective"], "accepted: False")
    reentrant = {"use_reentrant": bool(kwargs["use_reentrant"])} if kwargs.get("use_reentrant") is not None else {}
    return reentrant | {ours: kwargs[name] for name, ours in CHECKPOINTING_FIELDS.items() if on and kwargs.get(name) is not None}


def _liger(args: object, trainer: Trainer) -> dict[str, str]:
    """The loss with `use_liger_kernel`: Liger's, unless its config turns that off. SFTTrainer only uses Liger's layer kernels."""
    kernels = _mapping(args, "liger_kernel_config")
    fused = getattr(args, "use_liger_kernel", False) and kernels.get("fused_linear_cross_entropy", True)
    return {"loss": "liger"} if fused and trainer.losses is None else {}


def _trainer(args: object) -> TrainerName:
    """The trainer of this class of arguments. TRL's other trainers run the model more than once per step and are refused."""
    classes = type(args).__mro__
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    by_arguments = {trainer.arguments: trainer.name for trainer in TRAINERS.values() if trainer.arguments}
    for cls in classes:  # GKDConfig is an SFTConfig
        if cls.__name__ in by_arguments:
            return by_arguments[cls.__name__]
    if any(trainer.package in packages for trainer in TRAINERS.values()):
        configs = ", ".join(trainer.arguments for trainer in TRAINERS.values() if trainer.arguments)
        accepted = f"accepted: a transformers TrainingArguments, or one of TRL's {configs}"
        raise InputError("training_args", type(args).__name__, accepted)
    return DEFAULT


def _mapping(args: object, field: str) -> dict[str, object]:
    """A field of keyword arguments, which may be JSON. Raises InputError for anything else."""
    value = getattr(args, field, None) or {}
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, Mapping):
        raise InputError(f"training_args.{field}", value, "accepted: a dict, or a JSON object")
    return dict(parsed)


def _names(value: object) -> tuple[str, ...] | None:
    if not value:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise InputError("quantization_config.llm_int8_skip_modules", value, "accepted: a list of names")
    return tuple(value)


def _plain(value: object) -> object:
    """Enums by value, sets as sorted lists."""
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, (set, frozenset)) else value

"""Read the objects of other libraries by duck typing: peft's configs, `BitsAndBytesConfig`, `TrainingArguments`, `SFTConfig`."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from dataclasses import MISSING, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peftplan import files
from peftplan.errors import InputError, MissingError, quoted
from peftplan.job.tasks import OF_VLLM
from peftplan.job.trainer_words import TrainerName
from peftplan.job.trainers import DEFAULT, TRAINERS
from peftplan.storage.config import FOUR_BIT

if TYPE_CHECKING:
    from dataclasses import Field

    from peftplan.job.configs.facts import Facts
    from peftplan.job.configs.plan import Unsupported
    from peftplan.results.config_documents import ConfigDocument

MAX_ADAPTER_CONFIG_BYTES = 2**20
"""Far above any adapter_config.json: they have a few KB, also with a long list of targets."""

OF_THE_LAUNCH = ("fsdp", "fsdp_config", "deepspeed", "parallelism_config")
"""Fields of TrainingArguments that say how several GPUs share a job (`_sharding`)."""
OF_THIS_MACHINE = ("use_cpu", "no_cuda")
"""Fields that people set where they make the object, not where it trains."""
OF_OTHER_ARGUMENTS = frozenset(
    {"method", "r", "target_modules", "device_map", "dtype", "attn_implementation", "quant", "double_quant", "compute_dtype"}
)
"""Options that a script's other calls set: how it loads its model, and what it adapts."""
OF_LOADING = "args.model_init_kwargs."
"""What stands before keys that set some of them, for a model that the trainer loads by its name."""
RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Today's names of transformers → those of other releases."""
ARGUMENTS = "training_args"
LIBRARIES = ("transformers", "trl", "sentence_transformers")
"""Packages whose classes of arguments are known."""


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


class Training(NamedTuple):
    """What arguments of a trainer say: our options, and what they do that changes the peak and is not counted."""

    options: dict[str, object]
    warnings: tuple[str, ...] = ()
    document: ConfigDocument | None = None
    """The `config` field of a result."""

    def named(self, error: InputError) -> InputError:
        """The error about an option under the name of the argument that sets it."""
        rows = {} if self.document is None else self.document["read"]
        keys = [key for key, row in rows.items() if error.field in row["option"].split(", ") and key.startswith("args.")]
        exact = [key for key in keys if rows[key]["value"] == error.value]
        return error.named(f"{ARGUMENTS}.{(exact or keys)[0].removeprefix('args.')}") if keys else error

    def without(self, names: Container[str]) -> Training:
        """The same, less some options."""
        return self._replace(options={name: value for name, value in self.options.items() if name not in names})


def training(args: object, chosen: Mapping[str, object], *, config: Mapping[str, object]) -> Training:
    """A `TrainingArguments` or one of TRL's configs, read as the same call in a script is (`data/configs`).

    `chosen`: the user's own options, which win; `config`: the model's. Raises InputError for an argument of which nobody
    knows what it does to the peak.
    """
    from peftplan.job.configs.documents import Document
    from peftplan.job.configs.facts import facts
    from peftplan.job.configs.planned import plan_of
    from peftplan.job.configs.with_file import DISABLES_DROPOUT, EVALUATED
    from peftplan.job.launch import accelerate

    if isinstance(args, type) or not hasattr(args, "per_device_train_batch_size"):
        raise InputError(ARGUMENTS, args, "accepted: a transformers TrainingArguments or a TRL SFTConfig")
    for field in ("gradient_checkpointing_kwargs", "liger_kernel_config"):
        if not isinstance(value := getattr(args, field, None), (Mapping, str, type(None))):
            raise InputError(f"{ARGUMENTS}.{field}", value, "accepted: a dict")
    trainer = TRAINERS[_trainer(args)]
    arguments = trainer.arguments or "TrainingArguments"
    of_trl = arguments.endswith("Config")
    tool = facts("trl-script" if of_trl else "transformers-script")
    trainer_class = arguments.replace("Config", "Trainer") if of_trl else "Trainer"
    called: dict[str, object] = {"args": {"call": arguments, **_fields_set(args, tool)}, "trainer": {"call": trainer_class}}
    if chosen.get("method") == "qlora" or chosen.get("quant") in FOUR_BIT:
        called["quant"] = {"load_in_4bit": True}
    try:
        plan = plan_of(Document(called, program=ARGUMENTS, chosen=chosen, model=config), tool, file=ARGUMENTS)
    except InputError as error:
        raise error.named(error.field.replace(f"{ARGUMENTS}: args.", f"{ARGUMENTS}.")) from None
    loading = {row.option for key, row in plan.read.items() if key.startswith(OF_LOADING)}
    options = {name: value for name, value in plan.options.items() if name not in OF_OTHER_ARGUMENTS - loading}
    if options.get("dtype") == "auto":
        del options["dtype"]
    if not of_trl:
        options["trainer"] = trainer.name  # Trainer, or one whose arguments have no rules of their own
    if not chosen.get("use_vllm", options.get("use_vllm")):
        options = {name: value for name, value in options.items() if name not in OF_VLLM}
    try:
        options |= _sharding(args)
    except InputError as error:
        raise error.named(f"{ARGUMENTS}.{error.field.removeprefix(f'{accelerate.ACCELERATE}: ').replace(': ', '.')}") from None
    defaults = _defaults(args)
    uncounted: dict[str, Unsupported] = {}
    for key, row in plan.without(chosen).items():
        name = key.removeprefix("args.")
        if name != key and name in defaults and defaults[name] == row.value:  # what a trainer does by itself is counted
            continue
        if row.effect == "unknown" and name != DISABLES_DROPOUT:
            raise _not_counted(f"{ARGUMENTS}.{name}", row.value, row.why)
        uncounted[f"{ARGUMENTS}.{name}"] = row
    warnings = [
        f"{name}={row.value}: {row.why}; the peak is at {'most' if row.effect == 'lowers' else 'least'} the stated one"
        for name, row in uncounted.items()
        if row.option != EVALUATED and row.effect != "unknown"
    ]
    warnings += [f"{ARGUMENTS}: {why}; the numbers are those {change}" for why, change in plan.refusals(chosen).items()]
    document = replace(plan, options=options, unsupported=uncounted).to_dict(chosen)
    return Training(options, tuple(warnings), document)


def check_dropout(document: ConfigDocument) -> None:
    """Raise InputError for `disable_dropout` where it decides what drops."""
    from peftplan.job.configs.with_file import DISABLES_DROPOUT

    for name, row in document["unsupported"].items():
        if name == f"{ARGUMENTS}.{DISABLES_DROPOUT}":
            raise _not_counted(name, row["value"], row["why"])


def _not_counted(name: str, value: object, why: str) -> InputError:
    return InputError(name, value, f"{why}; accepted: without it, as it is not counted")


def _defaults(args: object) -> dict[str, object]:
    """The defaults of the fields of an object's class."""
    fields: dict[str, Field[object]] = getattr(args, "__dataclass_fields__", {})
    return {name: field.default for name, field in fields.items() if field.default is not MISSING}


def _fields_set(args: object, tool: Facts) -> dict[str, object]:
    """The fields of an object that have another value than the tool's default, without those of a class of the user's own."""
    fields = _fields(args) or vars(args)
    declared = (cls for cls in type(args).__mro__ if cls.__module__.partition(".")[0] not in LIBRARIES)
    of_user = {name for cls in declared for name in getattr(cls, "__annotations__", ())}
    defaults = _defaults(args)
    set_fields: dict[str, object] = {}
    for name, value in fields.items():
        if not isinstance(name, str) or name in OF_THE_LAUNCH or name in OF_THIS_MACHINE:
            continue
        name = RENAMED.get(name, name)
        value = _mapping(args, name) if name.endswith("_kwargs") and isinstance(value, str) else _plain(value)
        known = tool.known(f"args.{name}")
        if known is None and (value is None or name in of_user):
            continue
        if known is not None and value == known.default == defaults.get(name, value):
            continue
        if known is not None and "ignored" not in known.row and isinstance(defaults.get(name), bool) and isinstance(value, str):
            raise InputError(f"{ARGUMENTS}.{name}", value, "accepted: True or False")  # Python takes "no" for true
        if set_fields.get(name) is None:
            set_fields[name] = value
    kwargs = set_fields.get("gradient_checkpointing_kwargs")
    if isinstance(kwargs, Mapping) and not fields.get("gradient_checkpointing", fields.get("activation_checkpointing")):
        set_fields["gradient_checkpointing_kwargs"] = {name: kwargs[name] for name in kwargs if name == "use_reentrant"}
    return set_fields


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
    """Enums by value, sets as sorted lists, dtypes by name."""
    value = getattr(value, "value", value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    return sorted(value) if isinstance(value, (set, frozenset)) else value

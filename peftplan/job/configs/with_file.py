"""Combine a file with the user's options, which win over the file, as the file wins over the tool's defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

import peftplan.methods as methods
from peftplan.arch import catalogue
from peftplan.distributed.names import ALWAYS, OPTIONS, STRATEGIES
from peftplan.errors import PeftplanError, RefusedError, UnknownNameError, UnsupportedKeyError
from peftplan.job.configs.facts import facts
from peftplan.job.configs.models import is_folder
from peftplan.job.configs.plan import LOADING_AS_TOLD, ConfigPlan, Effect, Tool, Unsupported, bound
from peftplan.job.kernels import kernels_of, named_kernels
from peftplan.job.launch import OF_FSDP
from peftplan.job.script import OF_DDP
from peftplan.job.setup import OF_PREFERENCES, Setup
from peftplan.job.tasks import OF_VLLM
from peftplan.job.trainers import DEFAULT, OLDER, TRAINERS
from peftplan.versions import FLASH_BESIDE_IMAGES, FORWARD_CHECKPOINTED, FSDP2_TAIL_APART, LIGER_SKIPS

if TYPE_CHECKING:
    from peftplan.results.config_documents import ConfigDocument

EVALUATED = "eval_batch_size"
DISABLES_DROPOUT = "disable_dropout"
"""An argument of trl's trainers that changes nothing where nothing drops."""
OF_STORAGE = (
    "quant",
    "double_quant",
    "quant_bits",
    "quant_group_size",
    "quant_blocksize",
    "quant_skip_modules",
    "quant_experts",
    "quant_storage",
)
OF_A_STORED_BASE = (*OF_STORAGE, "compute_dtype", "kbit_prepare")
"""Options without effect where nothing is quantized."""


class WithFile(NamedTuple):
    """Model and options of a plan with those of the user, and the `config` field of the result."""

    model: object
    options: dict[str, object]
    config: ConfigDocument
    facts: Mapping[str, bool | float | str]
    """What the tool does, as fields of `Script`."""
    warnings: tuple[str, ...] = ()
    """What the tool raises for the file as it is."""
    places: Mapping[str, str] = MappingProxyType({})
    """Key → its file and line."""


def check_map(tool: str, options: Mapping[str, object]) -> None:
    """Raise RefusedError for weights on the host beside a file of a tool that loads the model itself."""
    if options.get("device_map") == "cpu" and tool not in LOADING_AS_TOLD:
        raise RefusedError(f"device_map: {tool} loads the model itself, not on the host; accepted: none")


def with_file(plan: ConfigPlan, model: object, chosen: Mapping[str, object], *, objects: bool, strict: bool) -> WithFile:
    """What to estimate. `objects`: whether the user gives a peft config, so that the file's method does not count.

    Raises RefusedError for files that train nothing or name no model, and with `strict` for an unsupported key.
    """
    file = plan.files[0]
    if plan.kind != "training":
        for key, row in plan.unsupported.items() if plan.tool == "other" else ():
            raise RefusedError(
                f"config: {file} is {row.why}" if key == "model_type" else f"config: {file} runs {row.value}, {row.why}"
            )
        what = (
            "not a training config of a known tool" if plan.tool == "other" else f"a file of {plan.tool}, which trains no model"
        )
        raise RefusedError(f"config: {file} is {what}; accepted: a training config, then its launch files")
    if model is None and plan.model is None:
        raise RefusedError(f"config: {file} {plan.no_model}")
    if model is None and plan.model is not None and is_folder(plan.model) and not os.path.exists(plan.model):
        raise RefusedError(f"config: {file}: {plan.model} is not here; add the MODEL that it holds")
    chosen_options = {name: value for name, value in chosen.items() if value is not None}
    check_map(plan.tool, chosen_options)
    unsupported = plan.without(chosen_options)
    if strict and unsupported:
        key, row = next(iter(unsupported.items()))
        raise UnsupportedKeyError(f"config: {plan.places.get(key, file)}: {key} is not supported: {row.why}")
    for why, change in plan.refusals(chosen_options).items() if strict else ():
        raise RefusedError(f"config: {file}: {why}; it runs {change}")
    options = dict(plan.options)
    if model is not None and not _is_the_file_s(model, plan) and re.search(r"\d", str(options.get("quant_skip_modules"))):
        del options["quant_skip_modules"]  # layers of the file's model
    if not chosen_options.get("use_vllm", options.get("use_vllm")):  # the tool's defaults for vLLM, which does not generate
        options = {name: value for name, value in options.items() if name not in OF_VLLM or name not in plan.defaults}
    if objects:
        options = {name: value for name, value in options.items() if name in Setup.model_fields}
    else:
        options = _with_method(options, chosen_options)
    options = _with_strategy(options, chosen_options)
    launch = {name: str(value) for name, value in chosen_options.items() if name in OPTIONS}
    if launch not in ({}, {"gpus": "1"}) and options.get("device_map") == facts(plan.tool).device_map:
        options.pop("device_map", None)  # the tool's on one GPU
    options = {name: value for name, value in options.items() if name not in OF_DDP}  # the user's strategy may be another
    options |= chosen_options
    if chosen_options.get("trainer", plan.options.get("trainer")) not in OLDER and "tool_version" not in chosen_options:
        options.pop("tool_version", None)  # of the file's own trainer
    of_ddp = {OF_DDP[name]: value for name, value in plan.of_ddp.items()}
    of_tool = {**of_releases(plan.tool, options), **of_ddp, **plan.releases}
    read_from = plan.model if model is None else model
    warnings = plan.warnings(chosen_options)
    return WithFile(read_from, options, plan.to_dict(chosen_options), of_tool, warnings, plan.places)


def of_releases(tool: Tool, options: Mapping[str, object]) -> dict[str, bool]:
    """What the releases of libraries that a tool refuses to run without do on several GPUs, as fields of `Script`."""
    shared = bool(options.get("use_reentrant")) and not OPTIONS.isdisjoint(options)
    by_default = options.get("strategy") == "fsdp2" and options.get("accelerate") is None
    fields = {
        "checkpoints_hooks": shared and FORWARD_CHECKPOINTED.after(facts(tool).transformers),
        "flash_beside_images": FLASH_BESIDE_IMAGES.after(facts(tool).transformers),
        "evaluates_logits": options.get("loss") == "liger" and LIGER_SKIPS.after(facts(tool).transformers),
        "units_of_layers": by_default and FSDP2_TAIL_APART.after(facts(tool).accelerate),
    }
    return {name: True for name, is_so in fields.items() if is_so}


def _with_method(options: dict[str, object], chosen: Mapping[str, object]) -> dict[str, object]:
    """The file's options that the user's method and storage leave. LoRA in place of QLoRA has a base in 16 bits."""
    instead = {name: chosen[name] for name in ("method", "quant") if name in chosen}
    if (options.get("method"), instead.get("method")) == ("qlora", "lora"):
        instead = {"quant": "none", **instead}
    changed = any(options.get(name) != value for name, value in instead.items())
    return fitting({**options, **instead}) if changed else options


def _with_strategy(options: dict[str, object], chosen: Mapping[str, object]) -> dict[str, object]:
    """The file's options, without the parameters of its strategy that the user's other one does not have."""
    of_file, of_user = (str(by.get("strategy") or "") for by in (options, chosen))
    takes = next((strategy.takes for name, strategy in STRATEGIES.items() if name == of_user != of_file), None)
    if takes is None:
        return options
    words = () if of_file.startswith("fsdp") and of_user.startswith("fsdp") else OF_FSDP
    lost = {*OPTIONS, *words} - {*ALWAYS, *takes}
    return {name: value for name, value in options.items() if name not in lost}


def _is_the_file_s(model: object, plan: ConfigPlan) -> bool:
    """Whether the user's model is that of the file, by whatever name."""
    return model == plan.model or (plan.model is not None and catalogue.find(str(model)) == catalogue.find(plan.model))


def of_trainer(options: Mapping[str, object]) -> dict[str, object]:
    """The options without those of other trainers, such as the share of vLLM in supervised fine-tuning."""
    name = options.get("trainer", DEFAULT)
    trainer = next((trainer for trainer in TRAINERS.values() if trainer.name == name), None)
    lacking = OF_PREFERENCES - (trainer.options if trainer else frozenset())
    return {name: value for name, value in options.items() if name not in lacking}


def effect_of(kernels: object) -> Effect:
    """What kernels do to the peak of the model's own code: they save fewer tensors; rows without padding have larger tables,
    models whose layers torch compiles may have another loss, and layers in 8 bits make copies of what they read. Fake-quantized
    layers raise it; beside kernels that save fewer tensors, or in MXFP4, which keeps 4 bits of what it reads, nobody knows."""
    names = named_kernels(kernels)
    chosen = kernels_of(names)
    unknown = any(of is not None for of in (chosen.padding_free, chosen.linear, chosen.layers))
    if (fake := chosen.fake_quant) is not None:
        unknown |= fake.in_mx or len(names) > 1
    return "unknown" if unknown else "raises" if chosen.fake_quant is not None else "lowers"


def without_kernels(document: ConfigDocument, why: str, effect: Effect, *, kept: tuple[str, ...] | None) -> ConfigDocument:
    """The `config` field of a result whose kernels have no formula: the keys that name them are not supported.

    `effect`: theirs on the true peak (`effect_of`). `kept`: names among them that tell how the model is built.
    """
    options = {name: value for name, value in document["options"].items() if name != "kernels"}
    options |= {} if kept is None else {"kernels": kept}
    kernel_rows = {key: row for key, row in document["read"].items() if row["option"].split(", ") == ["kernels"]}
    read = {key: row for key, row in document["read"].items() if key not in kernel_rows}
    rows = {key: Unsupported(row["value"], f"{why} (no formula yet)", effect, "kernels") for key, row in kernel_rows.items()}
    rows = rows or {"kernels": Unsupported("by default", f"{why} (no formula yet)", effect, "kernels")}
    unsupported = {key: Unsupported(**row) for key, row in document["unsupported"].items()} | rows
    assumed = {name: text for name, text in document["assumed"].items() if name != "kernels"}
    unsupported_rows = {key: row._asdict() for key, row in unsupported.items()}
    changed = {"options": options, "read": read, "unsupported": unsupported_rows, "assumed": assumed, "bound": bound(unsupported)}
    return cast("ConfigDocument", {**document, **changed})


def with_evaluation(document: ConfigDocument) -> ConfigDocument:
    """The `config` field of a result that counts the evaluation."""
    return _counted(document, {key for key, row in document["unsupported"].items() if row["option"] == EVALUATED}, EVALUATED)


def with_dropout(document: ConfigDocument) -> ConfigDocument:
    """The `config` field of a result where nothing drops, whatever `disable_dropout` says."""
    return _counted(document, {key for key in document["unsupported"] if key.rpartition(".")[2] == DISABLES_DROPOUT}, "")


def _counted(document: ConfigDocument, keys: Container[str], option: str) -> ConfigDocument:
    """The document with these keys supported, by an option."""
    rows = {key: Unsupported(**row) for key, row in document["unsupported"].items()}
    rest = {key: row for key, row in rows.items() if key not in keys}
    values = {key: row.value for key, row in rows.items() if key in keys and row.value != "by default"}
    read = {key: {"value": value, "option": option, "why": ""} for key, value in values.items()}
    unsupported = {key: row._asdict() for key, row in rest.items()}
    changed = {"read": {**document["read"], **read}, "unsupported": unsupported, "bound": bound(rest)}
    return cast("ConfigDocument", {**document, **changed})


def without_options(document: ConfigDocument, *names: str) -> ConfigDocument:
    """The same without options that are not counted."""
    options = {name: value for name, value in document["options"].items() if name not in names}
    return cast("ConfigDocument", {**document, "options": options})


def fitting(options: Mapping[str, object]) -> dict[str, object]:
    """The options without fields that their method does not have, such as a rank in full fine-tuning."""
    try:
        method = methods.method_named(str(options.get("method") or "lora"))
        fields = methods.config_class(method).model_fields
    except (UnknownNameError, PeftplanError):
        return dict(options)
    known = {"method", "peft_config", *Setup.model_fields, *OPTIONS, *OF_FSDP, *fields}
    accepted = {name: value for name, value in options.items() if name in known}
    stored = OF_A_STORED_BASE if method.name == "full" or accepted.get("quant") == "none" else ()
    return {name: value for name, value in accepted.items() if name not in stored}

"""A job as the options that decide its bytes, so that two of them can be compared: the one requested and the one in a file."""

from __future__ import annotations

from collections.abc import Iterator

import peftplan.methods as methods
from peftplan.distributed.strategy import Distributed
from peftplan.errors import RefusedError
from peftplan.job.configs.documents import Values
from peftplan.job.configs.with_file import OF_STORAGE
from peftplan.job.job import Job
from peftplan.job.launch.writing import stated
from peftplan.job.setup import Setup
from peftplan.methods.targets import ALL_LINEAR, PEFT_DEFAULT, WORDS

BYTELESS: dict[str, object] = {"lora_alpha": 8, "use_rslora": False, "init_lora_weights": True}
"""Fields of a method that scale or initialize its tensors → peft's defaults. A file has them where the tool has a key."""
BY_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that only choose modules: two jobs are equal in them if the same modules are adapted."""
WITHOUT_EFFECT = (*OF_STORAGE, "compute_dtype", "trust_remote_code", "task_type")
"""Fields of a setup that `fields_of` takes from elsewhere, or that change nothing."""
ROLES = frozenset(Distributed.model_fields)
OF_TOOL = frozenset({"device_map"})
"""Fields that a tool decides, whoever chose them."""
REPLACED = {"deepspeed_adam": "adamw_torch", "deepspeed_cpu_adam": "adamw_torch", "deepspeed_cpu_lion": "lion_32bit"}
"""Optimizers that DeepSpeed or accelerate makes → one that a tool can name, in whose place it steps."""
FIRM = frozenset({"model", "task_type", "method", "quant", "batch_size", "seq_len", "gpus", "nodes"})
"""Fields of which a tool's own value is never taken, chosen or not."""


def fields_of(job: Job) -> Values:
    """Option → value, those that were filled in included. Raises RefusedError for a job of a model that was loaded."""
    if job.config is None or job.method is None or job.method.name not in methods.METHODS:
        raise RefusedError(f"method: {job.method_name} cannot be written into a config; accepted: one of `peftplan methods`")
    config = {name: value for name, value in job.config.model_dump().items() if name not in BYTELESS}
    if job.config.model_dump().get("init_lora_weights") == "mica":
        config["init_lora_weights"] = "mica"  # it freezes every B
    for name in ("modules_to_save", "target_parameters"):
        if config.get(name):
            config[name] = tuple(config[name])
    if isinstance(adapted := dict(job.adaptation.resolved).get("target_parameters"), tuple) and adapted:
        config["target_parameters"] = tuple(sorted(adapted))
    if "target_modules" in config:
        config["target_modules"] = tuple(sorted((module.name, module.layers or ()) for module in job.adaptation.matched))
    fields: Values = {
        "model": job.architecture.name,
        "task_type": job.architecture.task_type,
        "method": job.method.peft_type or job.method.name,
        "seq_len": job.setup.seq_len,
        "quant": "none" if job.quant is None else job.quant.name,
        **config,
        "dtype": job.setup.dtype,
    }
    if job.quant is not None:
        renamed = {"bits": "quant_bits", "group_size": "quant_group_size", "blocksize": "quant_blocksize"}
        renamed |= {"skip_modules": "quant_skip_modules", "experts": "quant_experts"}
        stored = {renamed.get(name, name): value for name, value in job.quant._asdict().items() if name != "name"}
        fields |= stored
    fields |= job.setup.model_dump(exclude={*WITHOUT_EFFECT, "dtype", "seq_len"})
    fields["optim"] = REPLACED.get(str(fields["optim"]), fields["optim"])
    if fields["method"] == "full":
        del fields["adapter_dtype"]
    if not fields["gradient_checkpointing"]:
        del fields["use_reentrant"]
    if job.distributed is not None:
        fields |= stated(job.distributed)
    return fields


def firm(name: str, value: object, chosen: frozenset[str]) -> bool:
    """Whether a tool must say this field as it is: somebody chose it, or it decides what trains."""
    if name == "device_map" and value == "cpu":
        return True  # no tool does it by itself
    filled_in = name in Setup.model_fields or name in ROLES or name in OF_STORAGE or name in ("compute_dtype", "pre_quantized")
    return name not in OF_TOOL and (name in FIRM or name in chosen or not filled_in)


def spellings(job: Job, field: str, value: object) -> Iterator[object]:
    """The ways to say a value: methods that train the same tensors, target modules by a word and by their names."""
    if field == "method":
        same = [each.name for each in methods.METHODS.values() if (each.peft_type or each.name) == value]
        yield from sorted(same, key=lambda name: name != job.method_name)
        return
    if field != "target_modules":
        yield value
        return
    wanted = getattr(job.config, "target_modules", None)
    if wanted is None or wanted in (ALL_LINEAR, PEFT_DEFAULT):
        yield wanted or ALL_LINEAR
    elif wanted not in WORDS:
        yield wanted
    targets = job.adaptation.target_modules
    if targets and not any("{" in name for name in targets):
        yield tuple(targets)
    yield tuple(dict.fromkeys(module.name.rpartition(".")[2] for module in job.adaptation.matched))

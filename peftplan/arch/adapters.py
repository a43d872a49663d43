"""The adapters: one function per `model_type`, from strict config fields to an `Architecture`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from peftplan.arch.fields import Fields
from peftplan.arch.heads import TASK_TYPES
from peftplan.arch.modules import Architecture
from peftplan.errors import UnknownNameError

Adapter = Callable[[Fields, str], Architecture]

ADAPTERS: dict[str, tuple[str, str, str]] = {
    # model_type: (module, function, default task type)
    "llama": ("llama", "llama", "CAUSAL_LM"),
    "mistral": ("llama", "mistral", "CAUSAL_LM"),
    "qwen2": ("llama", "qwen2", "CAUSAL_LM"),
    "qwen3": ("llama", "qwen3", "CAUSAL_LM"),
}


def read_config(config: Mapping[str, Any], *, name: str, task_type: str | None = None) -> Architecture:
    """The `Architecture` of a parsed config.json whose `model_type` has an adapter.

    `task_type` is one of `heads.TASK_TYPES`; None takes the task that the config's `architectures` names where the adapter
    has it, else the model type's usual one. Raises UnknownNameError for a model type without an adapter (see `has_adapter`)
    or a task that it does not have, InputError for a missing, mistyped or absurd field.
    """
    model_type = config["model_type"]
    if model_type not in ADAPTERS:
        raise UnknownNameError(f"{name}: model_type", model_type, ADAPTERS)
    module, function, default_task = ADAPTERS[model_type]
    adapter: Adapter = getattr(import_module(f"peftplan.arch.{module}"), function)
    fields = Fields(config, name=name)
    if task_type is not None:
        return adapter(fields, task_type)
    return adapter(fields, _stated_task(config) or default_task)


def _stated_task(config: Mapping[str, Any]) -> str | None:
    """The task of the class that `architectures` names, longest suffix first, or None where it names none we know."""
    stated = config.get("architectures")
    name = stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else ""
    for task, suffix in sorted(TASK_TYPES.items(), key=lambda item: -len(item[1])):
        if name.endswith(suffix):
            return task
    return None

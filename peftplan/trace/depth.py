"""Deep models at the price of shallow ones: two traces of few layers, and the log of many made from them (`expand`).

Only where all layers of the stack are alike: same modules, same shapes, same settings. Otherwise the model is traced in full.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftplan.trace.meta import build_config, build_model, model_class, quiet_transformers

LAYERS_FIELD = "num_hidden_layers"
SAMPLE_LAYERS = (3, 4)
"""Layers of the two traces: first, middle and last; and one more, which checks the rule."""
_INDEX = re.compile(r"(?:^|[.\[(|,\\{' ])\d")
"""A number where a layer's would stand: `layers.3`, `[0-7]`, `(1|2)`; not `fc1`."""
_SETTINGS = (bool, int, float, str, type(None))
_PLACE = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx"})
"""Attributes that say which layer it is, and nothing else."""


def stack_of(model: nn.Module, layers: int) -> str | None:
    """The name of the only module list with that many entries, if they are all alike."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if len(lists) != 1:
        return None
    name, stack = lists[0]
    first = _likeness(stack[0])
    return name if all(_likeness(layer) == first for layer in stack) else None


def _likeness(layer: nn.Module) -> list[Any]:
    """Names, classes, shapes and plain settings of all modules of a layer."""
    return [
        (
            name,
            type(module),
            [(n, p.shape, p.dtype) for n, p in module._parameters.items() if p is not None],
            [(n, b.shape, b.dtype) for n, b in module._buffers.items() if b is not None],
            sorted((k, str(v)) for k, v in vars(module).items() if isinstance(v, _SETTINGS) and k not in _PLACE),
        )
        for name, module in layer.named_modules()
    ]


def names_layers(peft_config: Any, quant_skip: tuple[str, ...] | None) -> bool:
    """Whether the adapter or the quantization names single layers, which a shallow model may not have."""
    fields = peft_config if isinstance(peft_config, Mapping) else getattr(peft_config, "__dict__", {})
    asked = [fields.get(key) for key in ("layers_to_transform", "layer_replication", "num_layers", "adapter_layers")]
    texts = [str(fields.get(key) or "") for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")]
    texts += [str(fields.get(key) or "") for key in ("rank_pattern", "alpha_pattern")]
    return any(value is not None for value in asked) or any(_INDEX.search(t) or "\\d" in t for t in (*texts, *(quant_skip or ())))


def repeating_stack(config: Mapping[str, Any], *, task_type: str | None) -> str | None:
    """The name of the stack of a model that is worth tracing at two depths, None for one to be traced in full."""
    layers = config.get(LAYERS_FIELD)
    if not isinstance(layers, int) or layers <= sum(SAMPLE_LAYERS):
        return None
    with quiet_transformers():
        hf_config = build_config(config, name="model")
        cls = model_class(config, hf_config, name="model", task_type=task_type)
        return stack_of(build_model(config, hf_config, cls, name="model"), layers)


def with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config of the same model with fewer layers; lists with one entry per layer are cut."""
    depth = config[LAYERS_FIELD]
    cut = {k: v[:layers] for k, v in config.items() if isinstance(v, list) and len(v) == depth}
    return {**config, **cut, LAYERS_FIELD: layers}

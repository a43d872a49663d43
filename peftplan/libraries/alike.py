"""The stacks of a model whose layers are all alike: same modules, shapes and settings, and no layer singled out in the config.

Such a stack is traced at two small depths and extended (`depth.expand`). A model may have two of them: encoder and decoder,
vision tower and text. A model with any other stack is traced in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from peftplan.depth.shallow import SAMPLE_LAYERS, Stack, places, samples, with_depth
from peftplan.errors import PeftplanError
from peftplan.libraries.meta import build_config, build_model, model_class, quiet_transformers

MAX_STACKS = 2
"""The most stacks that are traced at two depths. Each further one doubles the number of traces."""
_SETTINGS = (bool, int, float, str, type(None))
NUMBERS_LAYERS = ("_indices", "_indexes")
"""How fields of configs end that number single layers: those of its vision tower whose output Mllama reads. `_out_indices` is of
backbones, all of whose layers run."""
_PLACE = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx"})
"""Attributes that hold the layer's number and nothing else."""


def repeating_stacks(config: Mapping[str, Any], *, task_type: str | None, period: int = 1) -> tuple[Stack, ...]:
    """The stacks of a model that are worth tracing at two depths, the deepest first; layers that are `period` apart run alike."""
    deep = [place for place in places(config) if place[2] > sum(samples(place[2], period))]
    if not deep:
        return ()
    model = _model(config, task_type)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    stacks = [replace(stack, period=period) for place in deep if (stack := _stack(config, *place, lists, task_type)) is not None]
    return tuple(sorted(stacks, key=lambda stack: -stack.layers)[:MAX_STACKS])


def _stack(
    config: Mapping[str, Any], section: str | None, field: str, layers: int, lists: Mapping[str, Any], task_type: str | None
) -> Stack | None:
    """The stack whose length a field says: the only list that another value makes shorter, if its layers are all alike."""
    try:
        shallow = _model(with_depth(config, section, field, layers, SAMPLE_LAYERS[0]), task_type)
    except PeftplanError:
        return None
    lengths = {name: len(m) for name, m in shallow.named_modules() if isinstance(m, nn.ModuleList)}
    changed = [name for name, m in lists.items() if lengths.get(name, 0) != len(m)]
    outer = [name for name in changed if not any(name.startswith(f"{other}.") for other in changed)]
    if len(outer) != 1 or len(lists[outer[0]]) != layers:
        return None
    fields = vars(shallow.config if section is None else getattr(shallow.config, section))
    if any(fields[name] for name in fields if name.endswith(NUMBERS_LAYERS) and not name.startswith("_")):
        return None
    first = _likeness(lists[outer[0]][0])
    alike = all(_likeness(layer) == first for layer in lists[outer[0]])
    elements = sum(parameter.numel() for parameter in lists[outer[0]][0].parameters())
    return Stack(outer[0], layers, section, field, elements=elements) if alike else None


def _model(config: Mapping[str, Any], task_type: str | None) -> nn.Module:
    with quiet_transformers():
        hf_config = build_config(config, name="model")
        cls = model_class(config, hf_config, name="model", task_type=task_type)
        model: nn.Module = build_model(config, hf_config, cls, name="model")
        return model


def _likeness(layer: nn.Module) -> list[Any]:
    """Names, classes, shapes and plain settings of all modules in a layer."""
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

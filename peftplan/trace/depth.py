"""Deep models at the price of shallow ones: two traces of a few layers are extended to the full depth (`expand`).

Only where all layers of a stack are alike: same modules, same shapes, same settings, and no number of one in the config. A model
may have two such stacks (encoder and decoder, vision tower and text); any other is traced in full. Where every n-th layer is
checkpointed, n layers repeat; all depths then differ by multiples of n, so that each later layer is the same one of its n,
whatever stack it is in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peftplan.errors import PeftplanError
from peftplan.libraries.meta import build_config, build_model, model_class, quiet_transformers

SAMPLE_LAYERS = (3, 4)
"""Layers of the two traces, or periods of them: first, middle and last; and one more, which checks the rule."""
MAX_STACKS = 2
"""Each further stack doubles the number of traces."""
LAYERS_FIELDS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "depth",
)  # fmt: skip
"""Fields of transformers' configs that state the number of layers of a stack."""
_INDEX = re.compile(r"(?:^|[.\[(|,\\{' ])\d")
"""A number in the place of a layer number: `layers.3`, `[0-7]`, `(1|2)`; not `fc1`."""
_SETTINGS = (bool, int, float, str, type(None))
NUMBERS_LAYERS = ("_indices", "_indexes")
"""How fields of configs end that number single layers: those of its vision tower whose output Mllama reads. `_out_indices` is of
backbones, all of whose layers run."""
_PLACE = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx"})
"""Attributes that hold only the layer number."""


@dataclass(frozen=True)
class Stack:
    """A module list of like layers; `section` and `field` are where the config says how many they are.

    Layers that are `period` apart run alike.
    """

    name: str
    layers: int
    section: str | None
    field: str
    period: int = 1

    @property
    def samples(self) -> tuple[int, ...]:
        """The depths at which it is traced."""
        return samples(self.layers, self.period)


def samples(layers: int, period: int) -> tuple[int, ...]:
    """The depths at which a stack is traced: so many whole periods, and what its own depth has beyond them."""
    return tuple(number * period + layers % period for number in SAMPLE_LAYERS)


def repeating_stacks(config: Mapping[str, Any], *, task_type: str | None, period: int = 1) -> tuple[Stack, ...]:
    """The stacks of a model that are worth tracing at two depths, the deepest first; layers that are `period` apart run alike."""
    deep = [place for place in _places(config) if place[2] > sum(samples(place[2], period))]
    if not deep:
        return ()
    model = _model(config, task_type)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    stacks = [replace(stack, period=period) for place in deep if (stack := _stack(config, *place, lists, task_type)) is not None]
    return tuple(sorted(stacks, key=lambda stack: -stack.layers)[:MAX_STACKS])


def _places(config: Mapping[str, Any]) -> Iterator[tuple[str | None, str, int]]:
    """Section, field and value of every layer count in a config."""
    sections = [(None, config), *((key, value) for key, value in config.items() if isinstance(value, Mapping))]
    for section, fields in sections:
        for field in LAYERS_FIELDS:
            if isinstance(fields.get(field), int):
                yield section, field, fields[field]


def _stack(
    config: Mapping[str, Any], section: str | None, field: str, layers: int, lists: Mapping[str, Any], task_type: str | None
) -> Stack | None:
    """The stack whose length a field says: the only list that another value makes shorter, if its layers are all alike."""
    try:
        shallow = _model(_with(config, section, field, layers, SAMPLE_LAYERS[0]), task_type)
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
    return Stack(outer[0], layers, section, field) if alike else None


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


def names_layers(peft_config: Any, quant_skip: tuple[str, ...] | None) -> bool:
    """Whether the adapter or the quantization names single layers, which a shallow model may not have."""
    if getattr(peft_config, "by_layer", False):
        return True
    fields = peft_config if isinstance(peft_config, Mapping) else getattr(peft_config, "__dict__", {})
    by_layer = [fields.get(key) for key in ("layers_to_transform", "layer_replication", "num_layers", "adapter_layers")]
    texts = [str(fields.get(key) or "") for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")]
    texts += [str(fields.get(key) or "") for key in ("rank_pattern", "alpha_pattern")]
    return any(value is not None for value in by_layer) or any(
        _INDEX.search(t) or "\\d" in t for t in (*texts, *(quant_skip or ()))
    )


def with_layers(config: Mapping[str, Any], stack: Stack, layers: int) -> dict[str, Any]:
    """The config of the same model with fewer layers in one stack; lists with one entry per layer are cut."""
    return _with(config, stack.section, stack.field, stack.layers, layers)


def _with(config: Mapping[str, Any], section: str | None, field: str, depth: int, layers: int) -> dict[str, Any]:
    if section is not None:
        return {**config, section: _with(config[section], None, field, depth, layers)}
    cut = {k: v[:layers] for k, v in config.items() if isinstance(v, list) and len(v) == depth}
    return {**config, **cut, field: layers}

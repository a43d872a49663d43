"""The shallow models that a deep one is extended from: their depths, their configs, and what rules them out.

Where every n-th layer is checkpointed, n layers repeat. All depths then differ by multiples of n, so that each later layer is the
same one of its n, whatever stack it is in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SAMPLE_LAYERS = (3, 4)
"""Layers of the two traces, or periods of them: first, middle and last; and one more, which checks the rule. Where a layer
reaches further than the next one, as many more as it does on either side of the middle."""
LAYERS_FIELDS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "depth",
)  # fmt: skip
"""Fields of transformers' configs that state the number of layers of a stack."""
_INDEX = re.compile(r"(?:^|[.\[(|,\\{' ])\d")
"""A number in the place of a layer number: `layers.3`, `[0-7]`, `(1|2)`; not `fc1`."""


@dataclass(frozen=True)
class Stack:
    """A module list of like layers; `section` and `field` are where the config says how many they are.

    Layers that are `period` apart run alike. `elements`: of the parameters of a layer. `reach`: the most layers between what one
    makes and the one that frees it.
    """

    name: str
    layers: int
    section: str | None
    field: str
    period: int = 1
    elements: int = 0
    reach: int = 1

    @property
    def samples(self) -> tuple[int, ...]:
        """The depths at which it is traced."""
        return samples(self.layers, self.period, self.reach)


def samples(layers: int, period: int, reach: int = 1) -> tuple[int, ...]:
    """The depths at which a stack is traced: so many whole periods, and what its own depth has beyond them."""
    return tuple((number + 2 * (reach - 1)) * period + layers % period for number in SAMPLE_LAYERS)


def places(config: Mapping[str, object]) -> Iterator[tuple[str | None, str, int]]:
    """Section, field and value of every layer count in a config."""
    sections = [(None, config), *((key, value) for key, value in config.items() if isinstance(value, Mapping))]
    for section, fields in sections:
        for field in LAYERS_FIELDS:
            if isinstance(layers := fields.get(field), int):
                yield section, field, layers


def names_layers(peft_config: object, quant_skip: tuple[str, ...] | None) -> bool:
    """Whether the adapter or the quantization names single layers, which a shallow model may not have."""
    if getattr(peft_config, "by_layer", False):
        return True
    fields = _fields(peft_config)
    by_layer = [fields.get(key) for key in ("layers_to_transform", "layer_replication", "num_layers", "adapter_layers")]
    texts = [str(fields.get(key) or "") for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")]
    texts += [str(fields.get(key) or "") for key in ("rank_pattern", "alpha_pattern")]
    return any(value is not None for value in by_layer) or any(
        _INDEX.search(t) or "\\d" in t for t in (*texts, *(quant_skip or ()))
    )


def has_prefix(peft_config: object) -> bool:
    """Whether the adapter is a prefix, whose length is in the config's layers."""
    return _fields(peft_config).get("peft_type") == "PREFIX_TUNING"


def _fields(peft_config: object) -> Mapping[str, object]:
    return peft_config if isinstance(peft_config, Mapping) else getattr(peft_config, "__dict__", {})


def with_layers(config: Mapping[str, object], stack: Stack, layers: int) -> dict[str, object]:
    """The config of the same model with fewer layers in one stack; lists with one entry per layer are cut."""
    return with_depth(config, stack.section, stack.field, stack.layers, layers)


def with_depth(config: Mapping[str, object], section: str | None, field: str, depth: int, layers: int) -> dict[str, object]:
    if section is not None:
        part = config[section]
        assert isinstance(part, Mapping)
        return {**config, section: with_depth(part, None, field, depth, layers)}
    cut = {k: v[:layers] for k, v in config.items() if isinstance(v, list) and len(v) == depth}
    return {**config, **cut, field: layers}

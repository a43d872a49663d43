"""The order of a model's tensors: that of `named_parameters()`, and that in which modules are moved."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby

from peftplan.parameters import Parameter, Parameters


def in_module_order(parameters: Parameters) -> list[Parameter]:
    """All families of a model as it is moved, those of an adapter behind the module that they adapt."""
    base, added = ([p for p in parameters.all if p.owner == owner] for owner in ("base", "adapter"))
    return by_module(base, added)


def by_module(base: list[Parameter], added: list[Parameter]) -> list[Parameter]:
    """The families of a model as it is moved: what is added below a module comes behind the module's own and its children's.

    The tied embeddings of T5 and BART, which are modules of both stacks, come before their layers.
    """
    ends = {module: place for place, p in enumerate(base) for module in _modules(p.name)}
    starts = {module: place for place, p in reversed([*enumerate(base)]) for module in _modules(p.name)}
    behind: dict[int, list[Parameter]] = {}
    for p in added:
        module = next((module for module in _modules(p.name) if module in ends), "")
        tied = p.name.startswith(f"{module}.{TIED}.")
        place = len(base) - 1 if not module else starts[module] - 1 if tied else ends[module]
        behind.setdefault(place, []).append(p)
    return [family for place, p in enumerate(base) for family in (p, *behind.get(place, ()))]


TIED = "embed_tokens"


def _modules(name: str) -> Iterator[str]:
    """The modules that a tensor is below, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def tensors(parameters: Iterable[Parameter]) -> Iterator[tuple[Parameter, int | None]]:
    """Every tensor of the families with its layer, in the order of `named_parameters()`: layer by layer."""
    families = list(parameters)
    stacks = {p.name.partition("{}")[0] for p in families if p.layers is not None}
    placed = [(p, *_stack(p, stacks)) for p in families]
    for _, group in groupby(placed, key=lambda of_family: of_family[1]):
        of_stack = [(p, layers) for p, _, layers in group]
        for layer in sorted({layer for _, layers in of_stack for layer in layers}) or (None,):
            for p, layers in of_stack:
                if layer is None or layer in layers:
                    yield from [(p, layer if p.layers else None)] * (p.copies // len(p.layers or (0,)))


def _stack(p: Parameter, stacks: Collection[str]) -> tuple[str, Collection[int]]:
    """What precedes the number of a family's layers in its name, and its layers; its name and none where it has none.

    T5's first layer alone has a table of distances: `encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight`.
    """
    if p.layers is not None:
        return p.name.partition("{}")[0], p.layers
    for number in NUMBER.finditer(p.name):
        if p.name[: number.start()] in stacks:
            return p.name[: number.start()], (int(number[0]),)
    return p.name, ()


NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

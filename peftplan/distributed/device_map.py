"""`device_map="auto"`: the modules of a model on the GPUs of one process, as transformers places them.

Source: transformers, integrations/accelerate.py (`get_balanced_memory`, `infer_auto_device_map`). Sizes are bytes as loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.parameters import Parameter, Parameters

SPARE = 1.25
"""Room beside the even part, in sizes of the largest layer or module, on each GPU but the last."""


class Block(NamedTuple):
    """What is placed as a whole: a layer, or a module outside the layers."""

    layer: int | None
    parameters: tuple[Parameter, ...]
    nbytes: int


def blocks_of(parameters: Parameters) -> list[Block]:
    """The base's blocks in the order of its modules."""
    outside: dict[str, list[Parameter]] = {}
    by_layer: dict[int, list[Parameter]] = {}
    order: list[str | int] = []
    for p in parameters.all:
        if p.owner != "base":
            continue
        for key in sorted(p.layers) if p.layers is not None else (p.name.rpartition(".")[0],):
            members = by_layer.setdefault(key, []) if isinstance(key, int) else outside.setdefault(key, [])
            members.append(p)
            if len(members) == 1:
                order.append(key)
    members_of = ((key, by_layer[key] if isinstance(key, int) else outside[key]) for key in order)
    return [
        Block(key if isinstance(key, int) else None, tuple(members), sum(map(_loaded, members))) for key, members in members_of
    ]


def _loaded(p: Parameter) -> int:
    """Bytes of one layer's weight."""
    return sum(a.nbytes for a in p.allocations if a.name == "weight")


def placed(sizes: Sequence[int], devices: int) -> list[int]:
    """The GPU of each block. A GPU that is not the last takes no more than its even part and the spare room; the first one also
    leaves room for the largest block that is still to come.
    """
    limit = sum(sizes) // devices + int(SPARE * max(sizes))
    places, device, used = [], 0, 0
    for number, nbytes in enumerate(sizes):
        room = limit - (max(sizes[number + 1 :], default=0) if device == 0 else 0)
        if used and used + nbytes > room and device < devices - 1:
            device, used = device + 1, 0
        places.append(device)
        used += nbytes
    return places


class Places(NamedTuple):
    """The GPU of each layer, and of each module outside the layers."""

    devices: int
    layers: dict[int, int]
    modules: dict[str, int]

    def held_on(self, parameters: Iterable[Parameter], device: int) -> Iterator[Parameter]:
        """What one GPU holds: each family with the copies that are there. An adapter is where its module is."""
        for p in parameters:
            if p.layers is None:
                if any(p.name.startswith(f"{module}.") for module, place in self.modules.items() if place == device):
                    yield p
            elif here := frozenset(layer for layer in p.layers if self.layers[layer] == device):
                yield p._replace(layers=here, copies=p.copies // len(p.layers) * len(here))


def places_of(parameters: Parameters, devices: int) -> Places:
    """Where transformers places a model."""
    blocks = blocks_of(parameters)
    layers, modules = {}, {}
    for block, place in zip(blocks, placed([block.nbytes for block in blocks], devices), strict=True):
        if block.layer is None:
            modules[block.parameters[0].name.rpartition(".")[0]] = place
        else:
            layers[block.layer] = place
    return Places(devices, layers, modules)


def largest(parameters: Parameters, devices: int) -> Parameters:
    """What the GPU with the most bytes holds: weights, and gradients and two states of what trains."""
    return max((on_device(parameters, devices, device) for device in range(devices)), key=_bytes)


def _bytes(parameters: Parameters) -> int:
    return sum(
        p.copies * (sum(a.nbytes for a in p.allocations) + (3 * p.numel * ITEMSIZE[p.dtype] if p.trainable else 0))
        for p in parameters.all
    )


def on_device(parameters: Parameters, devices: int, device: int) -> Parameters:
    """What one GPU holds."""
    return parameters._replace(all=tuple(places_of(parameters, devices).held_on(parameters.all, device)))

"""`device_map="auto"`: the modules of a model on the GPUs of one process, as transformers places them.

Source: transformers, integrations/accelerate.py (`get_balanced_memory`, `infer_auto_device_map`). Sizes are bytes as loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.parameters import Parameter, Parameters

SPARE = 1.25
"""Room beside the even part, in sizes of the largest layer or module, on each GPU but the last."""

BY_BITSANDBYTES = 0.9
"""The share of that limit that is left to weights in 4 or 8 bits (quantizers/quantizer_bnb_4bit.py, `adjust_max_memory`)."""


class Block(NamedTuple):
    """What is placed as a whole: a layer, or a module outside the layers."""

    layer: int | None
    parameters: tuple[Parameter, ...]
    nbytes: int


def blocks_of(parameters: Parameters) -> list[Block]:
    """The base's blocks in the order of its modules."""
    members: dict[str | int, list[Parameter]] = {}
    loaded: dict[str | int, int] = {}
    for p in parameters.all:
        if p.owner != "base":
            continue
        nbytes = _loaded(p)
        for key in sorted(p.layers) if p.layers is not None else (p.name.rpartition(".")[0],):
            members.setdefault(key, []).append(p)
            loaded[key] = loaded.get(key, 0) + nbytes
    return [Block(key if isinstance(key, int) else None, tuple(of_key), loaded[key]) for key, of_key in members.items()]


def _loaded(p: Parameter) -> int:
    """Bytes of one layer's weight."""
    return sum(a.nbytes for a in p.allocations if a.name == "weight")


def placed(sizes: Sequence[int], devices: int, *, share: float = 1) -> list[int]:
    """The GPU of each block. A GPU that is not the last takes no more than its even part and the spare room, or a share of both;
    the first one also leaves room for the largest block that is still to come, and stays empty where that leaves too little.
    """
    limit = share * (sum(sizes) // devices + int(SPARE * max(sizes)))
    places, device, used = [], 0, 0
    for number, nbytes in enumerate(sizes):
        room = limit - (max(sizes[number + 1 :], default=0) if device == 0 else 0)
        if used + nbytes > room and device < devices - 1:
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
        layers = frozenset(layer for layer, place in self.layers.items() if place == device)
        modules = tuple(f"{module}." for module, place in self.modules.items() if place == device)
        for p in parameters:
            if p.layers is None:
                if p.name.startswith(modules):
                    yield p
            elif here := p.layers & layers:
                yield p._replace(layers=here, copies=p.copies // len(p.layers) * len(here))


class Share(NamedTuple):
    """What one GPU holds. `like`: the first GPU that holds as many layers of each family, whichever these are."""

    parameters: Parameters
    like: int


def places_of(parameters: Parameters, devices: int) -> Places:
    """Where transformers places a model."""
    blocks = blocks_of(parameters)
    layers, modules = {}, {}
    share = BY_BITSANDBYTES if any(p.quantized for p in parameters.all) else 1
    for block, place in zip(blocks, placed([block.nbytes for block in blocks], devices, share=share), strict=True):
        if block.layer is None:
            modules[block.parameters[0].name.rpartition(".")[0]] = place
        else:
            layers[block.layer] = place
    return Places(devices, layers, modules)


@lru_cache(maxsize=64)
def largest(parameters: Parameters, devices: int) -> Share:
    """What the GPU with the most bytes holds: weights, and gradients and two states of what trains."""
    return max(on_devices(parameters, devices), key=lambda share: _bytes(share.parameters))


def _bytes(parameters: Parameters) -> int:
    return sum(
        p.copies * (sum(a.nbytes for a in p.allocations) + (3 * p.numel * ITEMSIZE[p.dtype] if p.trainable else 0))
        for p in parameters.all
    )


@lru_cache(maxsize=64)
def on_devices(parameters: Parameters, devices: int) -> tuple[Share, ...]:
    """What each GPU holds. Tables of 4 bits are where the first weight is packed (bitsandbytes, functional.py, `name2qmap`)."""
    places = places_of(parameters, devices)
    firsts: dict[tuple[object, ...], int] = {}
    shares, shared = [], parameters.shared
    for device in range(devices):
        here = tuple(places.held_on(parameters.all, device))
        tables, shared = (shared, ()) if any(p.quantized for p in here) else ((), shared)
        like = firsts.setdefault((tables, *(p._replace(layers=None) for p in here)), device)
        shares.append(Share(parameters._replace(all=here, shared=tables), like))
    return tuple(shares)

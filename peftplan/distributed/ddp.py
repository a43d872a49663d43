"""The buckets in which DDP reduces gradients.

Source: torch, nn/parallel/distributed.py, csrc/distributed/c10d/reducer.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from peftplan.distributed.order import in_module_order, tensors
from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Line
from peftplan.parameters import Parameter, Parameters

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes at which a bucket is full by default (torch, `dist._DEFAULT_FIRST_BUCKET_BYTES`, `_DEFAULT_BUCKET_CAP_MB`)."""


def buckets(parameters: Parameters, distributed: Distributed) -> tuple[Line, ...]:
    """DDP's buckets: all gradients a second time, from construction on, however many ranks there are (torch, reducer.cpp)."""
    source = "torch: Reducer::initialize_buckets"
    return tuple(
        Line(f"bucket of gradients of {nbytes:,} B", "communication", "uint8", (nbytes,), copies, source)
        for nbytes, copies in Counter(bucket_sizes(parameters, distributed)).items()
    )


def bucket_caps(distributed: Distributed) -> tuple[int, int]:
    """Bytes at which DDP's first bucket is full, and every later one. The first is smaller only by default.

    accelerate does not pass the default on (`DistributedDataParallelKwargs.to_kwargs`).
    """
    if distributed.bucket_cap_mb in (None, BUCKET // 2**20):
        return FIRST_BUCKET, BUCKET
    cap = int((distributed.bucket_cap_mb or 0) * 2**20)
    return cap, cap


def divided_after(distributed: Distributed) -> int:
    """Steps before the forward that divides the bucket of all gradients, whose order it knows (`Reducer::rebuild_buckets`); 0:
    the constructor makes buckets that stay, since each step looks for parameters without gradients (`should_rebuild_buckets`).
    """
    if distributed.static_graph:
        return 2
    return 0 if distributed.find_unused_parameters else 1


def copies_outputs(distributed: Distributed | None) -> bool:
    """Whether the model's outputs are copied, so that a gradient that one of them does not get can be told (`_DDPSink`)."""
    if distributed is None or distributed.strategy != "ddp":
        return False
    return bool(distributed.find_unused_parameters) and not distributed.static_graph


def bucket_sizes(parameters: Parameters, distributed: Distributed) -> tuple[int, ...]:
    """Bytes of each of DDP's buckets, filled in the order in which gradients arrive, the last layer's first. Buckets that stay
    are filled in the order of the model, and made from the last one to the first."""
    stay = not divided_after(distributed)
    families = in_module_order(parameters) if stay else parameters.all
    return _sizes(tuple(p for p in families if p.trainable), bucket_caps(distributed), stay)


@lru_cache(maxsize=64)
def _sizes(trained: tuple[Parameter, ...], caps: tuple[int, int], stay: bool) -> tuple[int, ...]:
    """Those of trainable families, in their order."""
    if stay:
        return _filled((p for p, _ in tensors(trained)), *caps)[::-1]
    return _filled(_backwards(trained), *caps)


def _filled(parameters: Iterable[Parameter], limit: int, cap: int) -> tuple[int, ...]:
    """Bytes of each bucket. `limit`: bytes at which the first is full; `cap`: every later one."""
    sizes: list[int] = []
    filled = 0
    for p in parameters:
        filled += p.numel * ITEMSIZE[p.dtype]
        if filled >= limit:
            sizes.append(filled)
            filled, limit = 0, cap
    return (*sizes, filled) if filled else tuple(sizes)


def _backwards(trained: tuple[Parameter, ...]) -> Iterator[Parameter]:
    """The trainable parameters, the last layer first. A family is repeated for each of its layers."""
    layers = sorted({layer for p in trained for layer in p.layers or ()}, reverse=True)
    outside = [p for p in trained if p.layers is None]
    ahead = [p for p in outside if p.in_embedding]
    yield from reversed([p for p in outside if not p.in_embedding for _ in range(p.copies)])
    for layer in layers:
        yield from reversed([p for p in trained if p.layers is not None and layer in p.layers])
    yield from reversed(ahead)

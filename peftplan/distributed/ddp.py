"""The buckets in which DDP reduces gradients.

Source: torch, nn/parallel/distributed.py, csrc/distributed/c10d/reducer.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from peftplan.distributed.strategy import Distributed
from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Line
from peftplan.parameters import Parameter, Parameters

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


def bucket_sizes(parameters: Parameters, distributed: Distributed) -> tuple[int, ...]:
    """Bytes of each of DDP's buckets, filled in the order in which gradients arrive, the last layer's first."""
    limit, cap = bucket_caps(distributed)
    sizes: list[int] = []
    filled = 0
    for p in _backwards(parameters):
        filled += p.numel * ITEMSIZE[p.dtype]
        if filled >= limit:
            sizes.append(filled)
            filled, limit = 0, cap
    return (*sizes, filled) if filled else tuple(sizes)


def _backwards(parameters: Parameters) -> Iterator[Parameter]:
    """The trainable parameters, the last layer first. A family is repeated for each of its layers."""
    trained = [p for p in parameters.all if p.trainable]
    layers = sorted({layer for p in trained for layer in p.layers or ()}, reverse=True)
    outside = [p for p in trained if p.layers is None]
    ahead = [p for p in outside if p.in_embedding]
    yield from reversed([p for p in outside if not p.in_embedding for _ in range(p.copies)])
    for layer in layers:
        yield from reversed([p for p in trained if p.layers is not None and layer in p.layers])
    yield from reversed(ahead)

"""The flat tensors in which rank 0 sends its weights to the other ranks: under DDP, and under FSDP1 with `sync_module_states`.

Source: torch, distributed/utils.py (`_sync_params_and_buffers`), csrc/distributed/c10d/comm.cpp (`broadcast_coalesced`),
reducer.cpp (`compute_bucket_assignment_by_size`), csrc/utils/tensor_flatten.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import groupby
from math import prod

from peftplan.distributed.ddp import bucket_sizes, divided_after
from peftplan.distributed.order import in_module_order, tensors
from peftplan.distributed.strategy import Distributed
from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Ledger
from peftplan.memory.loaded import Handle, Loader, Memory
from peftplan.parameters import Parameter, Parameters
from peftplan.tape.streams import on_stream
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor

BROADCAST_BUCKET = 250 * 2**20
"""Bytes at which a bucket is sent (torch, nn/parallel/distributed.py, `broadcast_bucket_size`)."""
IN_FLIGHT = 2
"""Buckets that are there at once."""


OF_PICTURES = "cross_attn"
"""In the names of what only layers that look at pictures have (transformers, `MllamaCrossAttentionDecoderLayer`)."""


def flat_tensors(sizes: Iterable[tuple[str, int]]) -> tuple[int, ...]:
    """Bytes of each flat tensor, in order; 0 where a bucket has one tensor, which is sent itself. `sizes`: dtype and bytes."""
    buckets: list[tuple[int, list[int]]] = []
    filling: dict[str, tuple[int, list[int]]] = {}
    for number, (dtype, nbytes) in enumerate(sizes):
        bucket = filling.setdefault(dtype, (number, []))[1]
        bucket.append(nbytes)
        if sum(bucket) >= BROADCAST_BUCKET:
            buckets.append(filling.pop(dtype))
    ordered = sorted([*buckets, *filling.values()], key=lambda bucket: bucket[0])
    return tuple(sum(bucket) if len(bucket) > 1 else 0 for _, bucket in ordered)


def of_model(parameters: Parameters, buffers: Ledger) -> tuple[int, ...]:
    """Those of a whole model. Packed layers have buffers alone, which follow all parameters."""
    each, packed = _in_order(parameters), _packed(parameters)
    weights = [next((a for a in p.allocations if a.name == "weight"), p.allocations[0]) for p in each if _module(p) not in packed]
    of_buffers = ((line.dtype, ITEMSIZE[line.dtype] * prod(line.shape)) for line in buffers for _ in range(line.copies))
    return flat_tensors([*((a.dtype, a.nbytes) for a in weights), *_of_packed(parameters), *of_buffers])


def sent_in_forward(parameters: Parameters) -> tuple[int, ...]:
    """Those of packed layers, which DDP sends again before the first forward of each step (torch, nn/parallel/distributed.py,
    `_sync_buffers`). Left out: other buffers, of a few hundred bytes."""
    return flat_tensors(_of_packed(parameters))


def _in_order(parameters: Parameters) -> list[Parameter]:
    """As the model registers them: a layer of Llama 3.2 Vision that looks at pictures has what others lack first."""
    replaced = {_module(p) for p in parameters.all if any(a.name == "g_idx" for a in p.allocations)}
    of_layers = groupby(tensors(in_module_order(parameters)), key=lambda placed: placed[1])
    layers = ([p for p, _ in sorted(of_layer, key=lambda placed: OF_PICTURES not in placed[0].name)] for _, of_layer in of_layers)
    return [p for families in layers for p in (_as_replaced(families, replaced) if replaced else families)]


def _as_replaced(families: list[Parameter], packed: set[str]) -> list[Parameter]:
    """With a module's packed layers behind what else it has, by name: optimum deletes a layer and adds its own (2.3.0,
    gptq/quantizer.py:302)."""
    parents = {name.rpartition(".")[0] for name in packed}

    def parent(p: Parameter) -> str | None:
        return next((name for name in parents if p.name.startswith(f"{name}.")), None)

    def place(p: Parameter) -> str:
        return next((name for name in packed if p.name.startswith(f"{name}.")), "")

    groups = groupby(families, key=parent)
    return [p for name, group in groups for p in (group if name is None else sorted(group, key=place))]


def _packed(parameters: Parameters) -> set[str]:
    """Layers whose tensors are all buffers, the bias too (gptqmodel, nn_modules/qlinear)."""
    return {_module(p) for p in parameters.all if p.allocations[0].name == "qweight"}


def _of_packed(parameters: Parameters) -> list[tuple[str, int]]:
    packed = _packed(parameters)
    each = (p for p in _in_order(parameters) if _module(p) in packed) if packed else ()
    return [(a.dtype, a.nbytes) for p in each for a in p.allocations]


def _module(p: Parameter) -> str:
    return p.name.rpartition(".")[0]


def send(memory: Memory[Handle], flats: Iterable[int]) -> None:
    """Make the flat tensors, two at a time."""
    in_flight: list[list[Handle]] = []
    for nbytes in flats:
        if len(in_flight) == IN_FLIGHT:
            for flat in in_flight.pop(0):
                memory.release(flat)
        in_flight.append([memory.allocate(nbytes)] if nbytes else [])
    for flats_of_bucket in in_flight:
        for flat in flats_of_bucket:
            memory.release(flat)


def send_on_tape(f: Tape, flats: Iterable[int]) -> None:
    """The same in a step."""
    in_flight: list[Tensor] = []
    for nbytes in flats:
        del in_flight[: len(in_flight) + 1 - IN_FLIGHT]
        in_flight.append(on_stream(f, (nbytes,), "uint8", "buffers that are sent", 0, "communication"))


def synced(parameters: Parameters, buffers: Ledger, distributed: Distributed, load: Loader) -> Loader:
    """Loading under DDP. Its constructor broadcasts all weights from rank 0, in flat tensors of at least 250 MiB, two at a time.
    Then it makes one bucket of all gradients, which it divides when it has seen their order, or those that stay
    (`_ddp_init_helper`).
    """
    whole = sum(bucket_sizes(parameters, distributed)) if divided_after(distributed) else 0
    return partial(_synced, flats=of_model(parameters, buffers), bucket=whole, load=load)


def _synced(memory: Memory[Handle], *, flats: tuple[int, ...], bucket: int, load: Loader) -> None:
    load(memory)
    send(memory, flats)
    memory.release(memory.allocate(bucket))

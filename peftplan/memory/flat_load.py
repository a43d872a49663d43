"""How a rank loads under FSDP1: unit by unit, its tensors in one flat parameter, of which the rank keeps its part.

Source: torch, distributed/fsdp/_init_utils.py (`_init_param_handle_from_module`), _flat_param.py (`FlatParamHandle.__init__`,
`shard`); accelerate, accelerator.py (`prepare_model`), which casts what trains to fp32 when all units are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Ledger
from peftplan.memory.loaded import Handle, Loader, Memory, Whole
from peftplan.memory.synced import flat_tensors, send


class FlatShard(NamedTuple):
    """A flat parameter while it is made. Bytes."""

    tensors: tuple[int, ...]
    whole: int
    shard: int
    cast: int
    """Of the shard in fp32; 0 if it is not cast."""
    on_host: bool
    gathered: int
    in_masters: int
    """Of the gathered parameter in the dtype of the shard; 0 if that is the dtype in which it is gathered."""
    never_runs: bool = False
    """Whether modules of a tower have it, which no text runs: their tensors stay views of the shard before it is cast."""


class FlatUnits(NamedTuple):
    """All flat parameters in the order in which they are made, the root's last, and the buffers."""

    flats: tuple[FlatShard, ...]
    buffers: Ledger
    accumulates: bool
    """Whether `no_sync` makes them ready before the first forward."""
    of_one_gpu: Loader | None = None
    """Loads the whole model onto the GPU first, as a quantized one is."""
    stays: Mapping[tuple[int, ...], int] = MappingProxyType({})
    """Sizes of tensors of quantized weights that are never flattened, and how many there are."""

    @property
    def leaves_shards(self) -> bool:
        """Whether shards that are cast stay until the first forward has returned: the modules' own tensors are views of them
        (`_use_sharded_views`). Beside a quantized model nothing in 16 bits trains."""
        return self.of_one_gpu is None

    def first_run(self, memory: Memory[Handle]) -> None:
        """The first forward makes each tensor that will hold a flat parameter, and frees it (`init_flat_param_attributes`): the
        shard as it is gathered, where that is a cast, and the whole."""
        for flat in (*self.flats[-1:], *self.flats[:-1]):
            narrow = flat.gathered * flat.shard // flat.whole if flat.in_masters else 0
            for nbytes in filter(None, (narrow, flat.gathered, flat.in_masters)):
                memory.release(memory.allocate(nbytes))

    def __call__(self, memory: Memory[Handle]) -> None:
        """Load flat parameter by flat parameter."""
        to_cast: list[tuple[Handle | None, int]] = []
        model = None if self.of_one_gpu is None else Whole(memory, self.stays)
        if self.of_one_gpu is not None and model is not None:
            self.of_one_gpu(model)
        elif self.stays:
            memory.keep(tuple(nbytes for sizes, count in self.stays.items() for nbytes in sizes * count))
        for flat in self.flats:
            tensors = [memory.allocate(nbytes) if model is None else model.taken(nbytes) for nbytes in flat.tensors]
            send(memory, flat_tensors(("", nbytes) for nbytes in flat.tensors))
            whole = memory.allocate(flat.whole)
            if flat.never_runs:
                memory.keep((flat.shard,))
                to_cast.append((None, flat.cast))
            elif flat.cast or flat.on_host:
                shard = memory.allocate(flat.shard)
                if flat.on_host:
                    memory.release(shard)
                else:
                    to_cast.append((shard, flat.cast))
            else:
                memory.keep((flat.shard,))
            memory.release(whole)
            for tensor in tensors:  # they become views of the shard when it is there
                memory.release(tensor)
        for line in self.buffers if model is None else ():
            memory.keep((ITEMSIZE[line.dtype] * prod(line.shape),) * line.copies)
        for _, nbytes in (*to_cast[-1:], *to_cast[:-1]):  # the root first
            memory.keep((nbytes,))
        if self.accumulates:
            self.first_run(memory)
        for uncast, _ in to_cast if not self.leaves_shards else ():
            if uncast is not None:
                memory.release(uncast)

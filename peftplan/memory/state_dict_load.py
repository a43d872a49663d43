"""How the first rank loads under FSDP2 with accelerate's `cpu_ram_efficient_loading`: tensor by tensor, for all ranks.

Source: accelerate, utils/fsdp_utils.py (`fsdp2_load_full_state_dict`); torch, distributed/tensor/placement_types.py
(`Shard._split_tensor`).
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Ledger
from peftplan.memory.loaded import Handle, Memory
from peftplan.memory.sharded_load import keep_shard
from peftplan.memory.unit_groups import Pairs


class ByStateDict(NamedTuple):
    """What the rank loads, in order."""

    pairs: Pairs
    """Each tensor with its shard, as the state dict has them."""
    table: Pairs
    """A table that the head reads too: it comes again as the head's, and goes when the weights are tied again."""
    buffers: Ledger
    ranks: int
    keeps_last: bool = True
    """Whether a whole tensor goes once the next one is there (`versions.FSDP2_KEEPS_LAST_LOADED`)."""

    def __call__(self, memory: Memory[Handle]) -> None:
        """Each tensor is moved whole, and its shard copied, beside copies of the chunks that are padded to as many rows."""
        again, last = [], list[Handle]()
        for number, (p, shard) in enumerate((*self.pairs, *self.table)):
            of_shard = ITEMSIZE[shard.dtype] * shard.numel
            if not self.keeps_last:
                _release(memory, last)
            whole = memory.allocate(ITEMSIZE[shard.dtype] * p.numel)
            _release(memory, last)
            padded = [memory.allocate(of_shard) for _ in range(self.ranks - p.numel // shard.numel)]
            if number < len(self.pairs):
                keep_shard(memory, shard)
            else:
                again.append(memory.allocate(of_shard))
            _release(memory, padded)
            last = [whole]
        _release(memory, last)
        for line in self.buffers:
            memory.keep((ITEMSIZE[line.dtype] * prod(line.shape),) * line.copies)
        _release(memory, again)


def _release(memory: Memory[Handle], handles: list[Handle]) -> None:
    for handle in handles:
        memory.release(handle)
    handles.clear()

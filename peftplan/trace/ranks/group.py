"""torch's fake process group: a world of which one rank is there, whose collectives leave values alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from peftplan.distributed.strategy import Distributed
from peftplan.errors import RefusedError
from peftplan.trace.ranks.one_gpu import OneGpu


@contextmanager
def process_group(world_size: int, *, rank: int = 0) -> Iterator[None]:
    """Start the process group of a rank, and end it afterwards. Raises RefusedError in a process that has one."""
    if dist.is_initialized():
        raise RefusedError("engine: trace makes a process group of its own, and this process has one already")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass
class OneOfSeveral(OneGpu):
    """Rank 0 of a process group; the other ranks are not there."""

    distributed: Distributed
    alone = False
    whole = False

    def world(self) -> AbstractContextManager[None]:
        """The process group."""
        return process_group(self.distributed.world_size)

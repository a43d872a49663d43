"""The allocator itself: `malloc`, `free`, `empty_cache`, in the order of steps of `DeviceCachingAllocator`.

Source: c10/cuda/CUDACachingAllocator.cpp, torch. Not modelled: private pools (CUDA graphs, `MemPool`), `record_stream`
and what waits for another stream, IPC, free-memory callbacks (they only return memory of peers), several devices.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.allocator.blocks import Block, BlockPool, should_split, try_merge
from peftplan.allocator.config import SMALL_BUFFER, SMALL_SIZE, AllocatorConfig, allocation_size, round_size
from peftplan.allocator.device import Device, SegmentEvent
from peftplan.allocator.expandable import allocate_expandable, bytes_to_map
from peftplan.allocator.oom import OutOfMemory
from peftplan.allocator.release import (
    garbage_collect_cached_blocks,
    release_available_cached_blocks,
    release_cached_blocks,
)
from peftplan.allocator.segments import Segment, segments_of
from peftplan.allocator.stats import Peaks, Stats
from peftplan.errors import InputError, MissingError


class Allocator:
    """One device's allocator. Each call of `malloc`, `free`, `empty_cache` or `mark` is one event; `event` is the last index.

    `capacity_bytes`: what the device can give to this process (its memory less contexts and other processes); None: no limit.
    `device_bytes`: all of its memory; a memory fraction is a fraction of it. `history`: every segment taken or given back.
    """

    def __init__(
        self, config: AllocatorConfig | None = None, capacity_bytes: int | None = None, *, device_bytes: int | None = None
    ) -> None:
        self.config = config or AllocatorConfig()
        fraction = self.config.per_process_memory_fraction
        if fraction is not None and device_bytes is None:
            raise MissingError(
                "device_bytes", "per_process_memory_fraction is a fraction of all of the device's memory, in bytes"
            )
        allowed = None if fraction is None or device_bytes is None else int(fraction * device_bytes)
        self._threshold = int(self.config.garbage_collection_threshold * (allowed or 0))
        self._stats = Stats()
        self._device = Device(
            self._stats,
            capacity=capacity_bytes,
            allowed=allowed,
            device_bytes=device_bytes,
            downwards=self.config.ties_by_address,
        )
        self._small = BlockPool(is_small=True, page=SMALL_BUFFER)
        self._large = BlockPool(is_small=False, page=self.config.large_segment_size)
        self._live: dict[int, Block | None] = {}
        self._rounded: dict[int, int] = {}
        config = self.config
        self._plain = not (config.garbage_collects or config.expandable_segments or config.max_split_size)

    # -- events ------------------------------------------------------------------------------------------------------------

    def malloc(self, id: int, nbytes: int, stream: int = 0) -> OutOfMemory | None:
        """Allocate `nbytes` under a name that no live allocation has. Zero bytes take no block, as in torch."""
        if id in self._live:
            raise InputError("id", id, "already allocated: free it first, or use a new id")
        if nbytes < 0:
            raise InputError("nbytes", nbytes, "accepted: 0 or more")
        if nbytes == 0:
            self._stats.event += 1
            self._live[id] = None
            return None
        block = self._take(nbytes, stream)
        if block is None:
            size = round_size(nbytes, divisions=self.config.roundup_power2_divisions)
            return self._out_of_memory(id, nbytes, self.get_pool(size), size, stream)
        self._live[id] = block
        return None

    def free(self, id: int) -> None:
        """Free a live allocation: its block merges with free neighbours and returns to its pool (`free_block`)."""
        if id not in self._live:
            raise InputError("id", id, "no live allocation has this id")
        block = self._live.pop(id)
        if block is None:
            self._stats.event += 1
        else:
            self.release(block)

    def allocate(self, nbytes: int, stream: int = 0) -> Block | None:
        """As `malloc`, without a name: the block, None for zero bytes. Raises MemoryError."""
        if nbytes == 0:
            self._stats.event += 1
            return None
        block = self._take(nbytes, stream)
        if block is None:
            raise MemoryError
        return block

    def release(self, block: Block | None) -> None:
        """Free a block."""
        self._stats.event += 1
        if block is None:
            return
        self._stats.release(block.size, block.requested)
        block.allocated = False
        block.requested = 0
        try_merge(block, block.prev)
        try_merge(block, block.next)
        block.pool.insert(block)

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`: give back every segment without a live block."""
        self._stats.event += 1
        self._release_all()

    def mark(self) -> None:
        """An event that changes nothing."""
        self._stats.event += 1

    def begin_phase(self, phase: str) -> None:
        """What follows counts for this phase; not an event."""
        self._stats.begin_phase(phase)

    def reset_peaks(self) -> None:
        """`torch.cuda.reset_peak_memory_stats()`: the overall peaks restart at the current level. Not an event."""
        self._stats.reset_peaks()

    # -- what it tells -----------------------------------------------------------------------------------------------------

    @property
    def event(self) -> int:
        """Index of the last event, -1 before the first."""
        return self._stats.event

    @property
    def allocated(self) -> int:
        """Bytes of live blocks (`torch.cuda.memory_allocated`)."""
        return self._stats.allocated

    @property
    def requested(self) -> int:
        """Bytes that live allocations asked for, before rounding."""
        return self._stats.requested

    @property
    def reserved(self) -> int:
        """Bytes of segments (`torch.cuda.memory_reserved`)."""
        return self._stats.reserved

    @property
    def peaks(self) -> Peaks:
        """Peaks since the start or the last `reset_peaks`."""
        return self._stats.peaks

    @property
    def peaks_by_phase(self) -> dict[str, Peaks]:
        """Peaks of each phase that had events."""
        return self._stats.peaks_by_phase

    @property
    def history(self) -> tuple[SegmentEvent, ...]:
        """Segments taken and given back, in order."""
        return tuple(self._device.history)

    def address(self, id: int) -> int:
        """Where a live allocation lies in this model's address space; 0 for an allocation of zero bytes."""
        block = self._live[id]
        return 0 if block is None else block.address

    def snapshot(self) -> list[Segment]:
        """Segments and their blocks, like `torch.cuda.memory_snapshot()`."""
        return segments_of(self._blocks())

    # -- how it decides ----------------------------------------------------------------------------------------------------

    def get_pool(self, size: int) -> BlockPool:
        """The pool of a rounded size."""
        return self._small if size <= SMALL_SIZE else self._large

    def _take(self, nbytes: int, stream: int) -> Block | None:
        """A block for so many bytes; None where the device has no room."""
        self._stats.event += 1
        size = self._rounded.get(nbytes, 0)
        if not size:
            size = self._rounded[nbytes] = round_size(nbytes, divisions=self.config.roundup_power2_divisions)
        pool = self._small if size <= SMALL_SIZE else self._large
        fitting = pool.best_fit(size, stream) if self._plain else pool.take(size, stream, self.config)
        block = fitting or self._miss(pool, size, stream)
        if block is None:
            return None
        if should_split(block, size, self.config):
            block = _split(block, size)
        block.allocated = True
        block.requested = nbytes
        self._stats.allocate(block.size, nbytes)
        return block

    def _blocks(self) -> Iterator[Block]:
        yield from self._small
        yield from self._large
        yield from (block for block in self._live.values() if block is not None)

    def _miss(self, pool: BlockPool, size: int, stream: int) -> Block | None:
        """No free block fits: collect garbage, ask the device, release what may help and ask again, release all and ask again."""
        if self.config.garbage_collects:
            garbage_collect_cached_blocks(self._large, self._device, threshold=self._threshold)
        block = self._alloc_block(pool, size, stream)
        limit = self.config.max_split_size
        if (
            block is None
            and limit is not None
            and release_available_cached_blocks(pool, self._device, size=size, stream=stream, max_split_size=limit)
        ):
            block = self._alloc_block(pool, size, stream)
        if block is None:
            self._release_all()
            block = self._alloc_block(pool, size, stream)
        return block

    def _release_all(self) -> None:
        for pool in (self._large, self._small):
            release_cached_blocks(pool, self._device)

    def _alloc_block(self, pool: BlockPool, size: int, stream: int) -> Block | None:
        """A new segment, or more pages of an expandable one; None where the device has no room."""
        wanted = allocation_size(size, large_segment_size=self.config.large_segment_size)
        if not self._device.permits(wanted):
            return None
        if self.config.expandable_segments:
            return allocate_expandable(pool, self._device, size=size, stream=stream)
        if not self._device.has(wanted):
            return None
        self._device.take("segment_alloc", wanted)
        return Block(pool, stream, address=self._device.addresses(wanted), size=wanted)

    def _out_of_memory(self, id: int, nbytes: int, pool: BlockPool, size: int, stream: int) -> OutOfMemory:
        config, stats = self.config, self._stats
        wanted = allocation_size(size, large_segment_size=config.large_segment_size)
        if config.expandable_segments and self._device.permits(wanted):
            wanted = bytes_to_map(pool, self._device, size=size, stream=stream)
        return OutOfMemory(
            event=stats.event,
            id=id,
            stream=stream,
            requested=nbytes,
            size=size,
            wanted=wanted,
            missing=self._device.missing(wanted),
            allocated=stats.allocated,
            reserved=stats.reserved,
            fragmented=stats.reserved - stats.allocated,
            largest_free=max((block.size for each in (self._small, self._large) for block in each), default=0),
        )


def _split(block: Block, size: int) -> Block:
    """The first `size` bytes as a block of its own; the rest, which keeps its place in the chain, returns to the pool."""
    front = Block(block.pool, block.stream, address=block.address, size=size, segment=block.segment)
    front.link(block.prev, block)
    block.address += size
    block.size -= size
    block.pool.insert(block)
    return front

"""Blocks and the two pools of free ones, ordered as the allocator's `std::set`s are.

Source: `Block`, `BlockPool`, `BlockComparatorSize`, `BlockComparatorAddress` of c10/cuda/CUDACachingAllocator.cpp, torch.
The comparators order by stream first; here each stream has a list of its own, which gives the same order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from peftplan.allocator.config import MIN_BLOCK_SIZE, SMALL_SIZE, AllocatorConfig


class ExpandableSegment:
    """A reserved range of addresses of which pages are mapped one by one."""

    __slots__ = ("address", "page", "size")

    def __init__(self, address: int, *, size: int, page: int) -> None:
        self.address, self.size, self.page = address, size, page


class Block:
    """A range of addresses, linked to its neighbours in the same segment."""

    __slots__ = (
        "address",
        "allocated",
        "gc_count_base",
        "mapped",
        "next",
        "pool",
        "prev",
        "requested",
        "segment",
        "size",
        "stream",
    )

    def __init__(
        self, pool: BlockPool, stream: int, *, address: int, size: int, segment: ExpandableSegment | None = None
    ) -> None:
        self.pool, self.stream, self.address, self.size, self.segment = pool, stream, address, size, segment
        self.requested = 0
        self.allocated = False
        self.mapped = True
        self.gc_count_base = 0
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def is_split(self) -> bool:
        """Whether the block shares its segment; such a segment cannot be released."""
        return self.prev is not None or self.next is not None

    def link(self, before: Block | None, after: Block | None) -> None:
        """Take the place between two neighbours (`splice`)."""
        self.prev, self.next = before, after
        if before is not None:
            before.next = self
        if after is not None:
            after.prev = self


class BlockPool:
    """Free blocks of one pool: mapped ones by (size, address), unmapped ones by address, per stream."""

    def __init__(self, *, is_small: bool, page: int) -> None:
        self.is_small = is_small
        self.page = page
        """What an expandable segment of this pool maps at a time, in bytes."""
        self.calls = 0
        """`get_free_blocks_call_count`: the clock of garbage collection, counted only while it is on."""
        self._free: dict[int, list[tuple[int, int, Block]]] = {}
        self._unmapped: dict[int, list[tuple[int, Block]]] = {}

    def __iter__(self) -> Iterator[Block]:
        """A copy of the free mapped blocks in the order of `BlockComparatorSize`: stream, size, address."""
        return iter([block for stream in sorted(self._free) for *_, block in self._free[stream]])

    def insert(self, block: Block) -> None:
        """Make a mapped block available (`insert_into_blocks`)."""
        block.gc_count_base = self.calls
        insort(self._free.setdefault(block.stream, []), (block.size, block.address, block))

    def erase(self, block: Block) -> None:
        """Take a free block out, mapped or not."""
        if block.mapped:
            sizes = self._free[block.stream]
            del sizes[bisect_left(sizes, (block.size, block.address))]
        else:
            addresses = self._unmapped[block.stream]
            del addresses[bisect_left(addresses, (block.address,))]

    def age(self, block: Block) -> int:
        """Searches in this pool since the block became free (`gc_count`)."""
        return self.calls - block.gc_count_base

    def insert_unmapped(self, block: Block) -> None:
        """Remember a range of an expandable segment that has no memory behind it."""
        insort(self._unmapped.setdefault(block.stream, []), (block.address, block))

    def unmapped(self, stream: int) -> list[Block]:
        """The unmapped ranges of a stream, lowest address first."""
        return [block for _, block in self._unmapped.get(stream, ())]

    def at_least(self, size: int, stream: int) -> tuple[list[Block], list[Block]]:
        """The stream's free blocks, (smaller than `size`, the others), each in order (`lower_bound`)."""
        sizes = self._free.get(stream, [])
        blocks = [block for *_, block in sizes]
        split = bisect_left(sizes, (size,))
        return blocks[:split], blocks[split:]

    def take(self, size: int, stream: int, config: AllocatorConfig) -> Block | None:
        """Best fit: the smallest free block of the stream that holds `size`, taken out (`get_free_block`)."""
        if config.garbage_collects:
            self.calls += 1
        sizes = self._free.get(stream)
        if not sizes:
            return None
        position = bisect_left(sizes, (size,))
        if position == len(sizes):
            return None
        block = sizes[position][2]
        if block.segment is not None:
            position = self._least_expandable(sizes, position)
            block = sizes[position][2]
        limit = config.max_split_size
        if limit is not None:
            if size < limit <= block.size:
                return None  # an oversize block is kept for oversize requests
            if limit <= size and block.size >= size + config.max_non_split_rounding_size:
                return None  # and they may waste only so much of it
        del sizes[position]
        return block

    def best_fit(self, size: int, stream: int) -> Block | None:
        """`take` with default options: neither garbage collection nor expandable segments, and no block too large to split."""
        sizes = self._free.get(stream)
        if sizes:
            position = bisect_left(sizes, (size,))
            if position < len(sizes):
                return sizes.pop(position)[2]
        return None

    def _least_expandable(self, sizes: list[tuple[int, int, Block]], position: int) -> int:
        """From the best fit on, the block that with the unmapped range behind it is smaller than its successor."""
        while position + 1 < len(sizes):
            here, after = (sizes[i][2] for i in (position, position + 1))
            if here.segment is None or _expandable_size(after) >= _expandable_size(here):
                break
            position += 1
        return position


def should_split(block: Block, size: int, config: AllocatorConfig) -> bool:
    """Whether the rest of a block stays available after `size` bytes are taken from it."""
    remaining = block.size - size
    if block.pool.is_small or config.expandable_segments:
        return remaining >= MIN_BLOCK_SIZE
    return remaining > SMALL_SIZE and (config.max_split_size is None or size < config.max_split_size)


def try_merge(block: Block, neighbour: Block | None) -> None:
    """Absorb a neighbour that is free and in the same state of mapping; `block` itself is in no pool (`try_merge_blocks`)."""
    if neighbour is None or neighbour.allocated or neighbour.mapped != block.mapped:
        return
    neighbour.pool.erase(neighbour)
    if block.prev is neighbour:
        block.address = neighbour.address
        block.link(neighbour.prev, block.next)
    else:
        block.link(block.prev, neighbour.next)
    block.size += neighbour.size


def _expandable_size(block: Block) -> int:
    after = block.next
    return block.size + (after.size if after is not None and not after.mapped else 0)

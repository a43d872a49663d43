"""`expandable_segments:True`: one growing range of addresses per stream and pool, backed page by page.

Source: `ExpandableSegment`, `find_expandable_block`, `map_block`, `try_allocate_expandable_block`, `unmap_block` of
c10/cuda/CUDACachingAllocator.cpp. A page is 2 MiB in the small pool and `large_segment_size` (20 MiB) in the large one; that
the option `large_segment_size_mb` also sets the page is inferred from its header, not seen in the source.
"""

from __future__ import annotations

from peftplan.allocator.blocks import Block, BlockPool, ExpandableSegment, try_merge
from peftplan.allocator.device import Device
from peftplan.units import ceil_div


def allocate_expandable(pool: BlockPool, device: Device, *, size: int, stream: int) -> Block | None:
    """A block of at least `size`, mapping what is missing of it; pages mapped before a failure stay, as free memory."""
    block = _find(pool, device, size=size, stream=stream)
    if not block.mapped and not _map(block, min(block.size, size), device):
        return None
    while block.size < size:  # block is free and followed by an unmapped range; mapping that merges the two
        after = block.next
        assert after is not None
        if not _map(after, min(size - block.size, after.size), device):
            return None
        block = after
    pool.erase(block)
    return block


def bytes_to_map(pool: BlockPool, device: Device, *, size: int, stream: int) -> int:
    """Bytes of the pages that `allocate_expandable` would still map for `size`."""
    block: Block | None = _find(pool, device, size=size, stream=stream)
    left, to_map = size, 0
    while left > 0 and block is not None:
        if not block.mapped and block.segment is not None:
            to_map += ceil_div(min(left, block.size), block.segment.page) * block.segment.page
        left -= block.size
        block = block.next
    return to_map


def unmap(block: Block, device: Device) -> None:
    """Give back the whole pages of a free mapped block; the ends that share a page with a neighbour stay."""
    segment = block.segment
    assert segment is not None
    first = ceil_div(block.address - segment.address, segment.page) * segment.page + segment.address
    last = (block.address + block.size - segment.address) // segment.page * segment.page + segment.address
    if first >= last:
        return
    pool, end = block.pool, block.address + block.size
    pool.erase(block)
    if first > block.address:
        before = Block(pool, block.stream, address=block.address, size=first - block.address, segment=segment)
        before.link(block.prev, block)
        pool.insert(before)
    if end > last:
        after = Block(pool, block.stream, address=last, size=end - last, segment=segment)
        after.link(block, block.next)
        pool.insert(after)
    block.address, block.size, block.mapped = first, last - first, False
    try_merge(block, block.prev)
    try_merge(block, block.next)
    pool.insert_unmapped(block)
    device.give_back("segment_unmap", last - first)
    if not block.is_split:
        pool.erase(block)  # nothing of the segment is mapped: its addresses go too (`release_expandable_segment`)


def _find(pool: BlockPool, device: Device, *, size: int, stream: int) -> Block:
    """The lowest unmapped range, with the free block right before it, that has room for `size`; else a new segment."""
    for block in pool.unmapped(stream):
        before = block.prev
        start = before if before is not None and not before.allocated else block
        if _has_room(start, size):
            return start
    length = ceil_div(device.address_space, pool.page) * pool.page
    segment = ExpandableSegment(device.addresses(length), size=length, page=pool.page)
    block = Block(pool, stream, address=segment.address, size=length, segment=segment)
    block.mapped = False
    pool.insert_unmapped(block)
    return block


def _has_room(block: Block | None, size: int) -> bool:
    while size > 0 and block is not None and not block.allocated:
        size -= block.size
        block = block.next
    return size <= 0


def _map(block: Block, size: int, device: Device) -> bool:
    """Back the first pages of an unmapped range; all of them or, where the device cannot give so many, none."""
    segment = block.segment
    assert segment is not None
    length = ceil_div(size, segment.page) * segment.page
    if not device.has(length):
        return False
    pool = block.pool
    pool.erase(block)
    block.mapped = True
    if length < block.size:
        rest = Block(pool, block.stream, address=block.address + length, size=block.size - length, segment=segment)
        rest.mapped = False
        rest.link(block, block.next)
        pool.insert_unmapped(rest)
        block.size = length
    try_merge(block, block.prev)
    try_merge(block, block.next)
    pool.insert(block)
    device.take("segment_map", length)
    return True

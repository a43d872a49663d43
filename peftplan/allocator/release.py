"""Giving memory back to the device: the three ways in which the allocator does it.

Source: `release_available_cached_blocks`, `release_cached_blocks`, `garbage_collect_cached_blocks` of
c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from peftplan.allocator.blocks import Block, BlockPool
from peftplan.allocator.device import Device
from peftplan.allocator.expandable import unmap


def release_cached_blocks(pool: BlockPool, device: Device) -> None:
    """Release everything without a live block: whole free segments, and whole free pages of expandable ones."""
    to_unmap = []
    for block in pool:
        if block.segment is not None:
            to_unmap.append(block)
        elif not block.is_split:
            _release_block(block, device)
    for block in to_unmap:
        unmap(block, device)


def release_available_cached_blocks(pool: BlockPool, device: Device, *, size: int, stream: int, max_split_size: int) -> bool:
    """The smallest oversize block that is enough, else oversize blocks from the largest down; whether it was enough."""
    needed = max(size, max_split_size)
    smaller, enough = pool.at_least(needed, stream)
    if enough and enough[0].segment is None:
        _release_block(enough[0], device)
        return True
    released = 0
    for block in reversed(smaller):
        if released >= needed or block.size < max_split_size:
            break
        if block.segment is None:
            released += block.size
            _release_block(block, device)
    return released >= needed


def garbage_collect_cached_blocks(large: BlockPool, device: Device, *, threshold: int) -> None:
    """While more than `threshold` bytes are reserved: rounds over whole free segments of at least average age.

    A block's age is the number of searches in its pool since it became free. A round does not stop at the target, so that
    rounds are rare. Blocks of expandable segments count for the average (as in the source) and are never released.
    """
    target, reclaimed = device.stats.reserved - threshold, 0
    whole = [block for block in large if not block.is_split]
    total_age, count = sum(large.age(block) for block in whole), len(whole)
    freed = True
    while freed and reclaimed < target and count > 0:
        average, freed = total_age / count, False
        for block in large:
            if not block.is_split and block.segment is None and large.age(block) >= average:
                freed = True
                reclaimed += block.size
                total_age -= large.age(block)
                count -= 1
                _release_block(block, device)


def _release_block(block: Block, device: Device) -> None:
    block.pool.erase(block)
    device.give_back("segment_free", block.size)

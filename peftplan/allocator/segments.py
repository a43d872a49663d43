"""Segments and blocks in the shape of `torch.cuda.memory_snapshot()` (keys as in torch, stack frames left out)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, TypedDict

from peftplan.allocator.blocks import Block


class BlockInfo(TypedDict):
    """One block; `requested_size` is 0 for a free one."""

    address: int
    size: int
    requested_size: int
    state: Literal["active_allocated", "inactive"]


class Segment(TypedDict):
    """One `cudaMalloc`, or one contiguous mapped range of an expandable segment."""

    address: int
    total_size: int
    allocated_size: int
    requested_size: int
    stream: int
    segment_type: Literal["small", "large"]
    is_expandable: bool
    blocks: list[BlockInfo]


def segments_of(blocks: Iterable[Block]) -> list[Segment]:
    """The segments that these mapped blocks, free and live, make up; by address."""
    heads = [block for block in blocks if block.prev is None or not block.prev.mapped]
    return [_segment(head) for head in sorted(heads, key=lambda head: head.address)]


def _segment(head: Block) -> Segment:
    blocks: list[BlockInfo] = [
        {
            "address": block.address,
            "size": block.size,
            "requested_size": block.requested,
            "state": "active_allocated" if block.allocated else "inactive",
        }
        for block in _mapped_from(head)
    ]
    return {
        "address": head.address,
        "total_size": sum(block["size"] for block in blocks),
        "allocated_size": sum(block["size"] for block in blocks if block["state"] == "active_allocated"),
        "requested_size": sum(block["requested_size"] for block in blocks),
        "stream": head.stream,
        "segment_type": "small" if head.pool.is_small else "large",
        "is_expandable": head.segment is not None,
        "blocks": blocks,
    }


def _mapped_from(head: Block) -> Iterator[Block]:
    block: Block | None = head
    while block is not None and block.mapped:
        yield block
        block = block.next

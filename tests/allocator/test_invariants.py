"""Whatever the sequence: blocks tile segments, nothing is lost, best fit is the least that fits, all of it comes back."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peftplan.allocator.config import parse_config
from peftplan.allocator.core import Allocator
from peftplan.units import MIB

OPTIONS = (
    "",
    "expandable_segments:True",
    "max_split_size_mb:24",
    "roundup_power2_divisions:8",
    "garbage_collection_threshold:0.3,per_process_memory_fraction:0.9",
)
CAPACITY = 160 * MIB

sizes = st.one_of(st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(MIB, 50 * MIB))
steps = st.lists(st.tuples(st.integers(0, 9), sizes, st.integers(0, 1)), min_size=20, max_size=60)


def check(allocator: Allocator, live: dict[int, int]) -> None:
    """The snapshot against a plain list of what is live."""
    segments = allocator.snapshot()
    end = 0
    for segment in segments:
        assert segment["address"] >= end, "segments overlap"
        end = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == end, "blocks leave a gap or overlap"
            assert block["size"] > 0
            assert block["size"] % 512 == 0
            end += block["size"]
        assert end == segment["address"] + segment["total_size"]
        free = [block["state"] == "inactive" for block in segment["blocks"]]
        assert not any(a and b for a, b in pairwise(free)), "two free neighbours were not merged"
    blocks = {block["address"]: block for segment in segments for block in segment["blocks"] if block["requested_size"]}
    assert {address: block["requested_size"] for address, block in blocks.items()} == {
        allocator.address(id): nbytes for id, nbytes in live.items()
    }
    assert allocator.requested == sum(live.values())
    assert allocator.allocated == sum(block["size"] for block in blocks.values())
    assert allocator.reserved == sum(segment["total_size"] for segment in segments)
    assert allocator.requested <= allocator.allocated <= allocator.reserved <= CAPACITY
    signed = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
    assert allocator.reserved == sum(signed[event.action] * event.nbytes for event in allocator.history)


def best_fit(allocator: Allocator, size: int, stream: int) -> int | None:
    """The address of the least free block that fits, by a walk over the snapshot."""
    kind = "small" if size <= MIB else "large"
    fitting = [
        (block["size"], block["address"])
        for segment in allocator.snapshot()
        if segment["segment_type"] == kind and segment["stream"] == stream
        for block in segment["blocks"]
        if block["state"] == "inactive" and block["size"] >= size
    ]
    return min(fitting)[1] if fitting else None


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(OPTIONS), steps)
def test_invariants(options: str, script: list[tuple[int, int, int]]) -> None:
    allocator = Allocator(parse_config(options), CAPACITY, device_bytes=CAPACITY)
    live: dict[int, int] = {}
    highest = 0
    for number, (choice, nbytes, stream) in enumerate(script):
        if choice == 9:
            allocator.empty_cache()
        elif choice >= 5 and live:
            id = sorted(live)[nbytes % len(live)]
            allocator.free(id)
            del live[id]
        else:
            expected = best_fit(allocator, -(-nbytes // 512) * 512, stream) if options == "" else None
            oom = allocator.malloc(number, nbytes, stream)
            if oom is None:
                live[number] = nbytes
                assert expected in (None, allocator.address(number))
            else:
                assert expected is None
                assert oom.missing > 0
                assert oom.fragmented == allocator.reserved - allocator.allocated
        highest = max(highest, allocator.allocated)
        check(allocator, live)
    assert allocator.peaks.allocated == highest
    for id in live:
        allocator.free(id)
    check(allocator, {})
    allocator.empty_cache()
    assert (allocator.reserved, allocator.snapshot()) == (0, [])


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(OPTIONS), st.lists(sizes, min_size=1, max_size=8), st.data())
def test_free_and_the_same_size_again_reuses_the_block(options: str, requests: list[int], data: st.DataObject) -> None:
    """But where `max_split_size` lies between request and segment: torch keeps such blocks for larger ones (`get_free_block`)."""
    config = parse_config(options)
    allocator = Allocator(config, device_bytes=100 * CAPACITY)
    for id, nbytes in enumerate(requests):
        allocator.malloc(id, nbytes)
    id = data.draw(st.sampled_from(range(len(requests))))
    limit = config.max_split_size
    assume(limit is None or requests[id] >= limit or -(-requests[id] // 2**21) * 2**21 < limit)
    reserved = allocator.reserved
    allocator.free(id)
    allocator.malloc(id, requests[id])
    assert allocator.reserved == reserved

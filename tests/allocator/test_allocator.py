"""The allocator, rule by rule: sequences worked by hand, sizes in MiB."""

from __future__ import annotations

import pytest

from peftplan.allocator.config import AllocatorConfig, parse_config
from peftplan.allocator.core import Allocator
from peftplan.allocator.oom import OutOfMemory
from peftplan.errors import InputError
from peftplan.units import MIB


class Script:
    """An allocator that is spoken to in MiB, and `sizes`: the blocks of each segment, live ones positive, free ones negative."""

    def __init__(self, options: str = "", capacity: int | None = None, device: int | None = None) -> None:
        def nbytes(mib: int | None) -> int | None:
            return None if mib is None else mib * MIB

        self.allocator = Allocator(parse_config(options), nbytes(capacity), device_bytes=nbytes(device))

    def malloc(self, *mibs: float, first: int = 1, stream: int = 0) -> OutOfMemory | None:
        """Allocations with the ids `first`, `first` + 1, …; the answer to the last."""
        answer = None
        for offset, mib in enumerate(mibs):
            answer = self.allocator.malloc(first + offset, int(mib * MIB), stream)
        return answer

    def free(self, *ids: int) -> None:
        for id in ids:
            self.allocator.free(id)

    @property
    def sizes(self) -> list[list[float]]:
        return [
            [(1 if block["state"] == "active_allocated" else -1) * block["size"] / MIB for block in segment["blocks"]]
            for segment in self.allocator.snapshot()
        ]

    @property
    def history(self) -> list[tuple[str, float]]:
        return [(event.action.removeprefix("segment_"), event.nbytes / MIB) for event in self.allocator.history]

    @property
    def reserved(self) -> float:
        return self.allocator.reserved / MIB


def test_a_small_segment_splits_down_to_512_bytes() -> None:
    allocator = Allocator()
    allocator.malloc(1, 1)
    allocator.malloc(2, MIB)
    allocator.malloc(3, MIB - 512)
    # 2 MiB = 512 + 1 MiB + (1 MiB − 512): exactly full, so the next byte takes a second segment
    assert [[block["size"] for block in s["blocks"]] for s in allocator.snapshot()] == [[512, MIB, MIB - 512]]
    allocator.malloc(4, 1)
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (2 * MIB - 510, 2 * MIB + 512, 4 * MIB)


@pytest.mark.parametrize(("by_address", "taken"), [(False, [1, 2, 3, 4]), (True, [4, 3, 2, 1])])
def test_of_equal_free_blocks_the_oldest_segment_goes_first_and_before_2_13_the_lowest_address(
    by_address: bool, taken: list[int]
) -> None:
    """What torch 2.13.0, 2.14.0 and 2.15.0 do, and 2.10.0, 2.11.0 and 2.12.1, whose segments lie each below the one before."""
    allocator = Allocator(AllocatorConfig(ties_by_address=by_address))
    for id in (1, 2, 3, 4):
        allocator.malloc(id, 30 * MIB)
    place = {allocator.address(id): id for id in (1, 2, 3, 4)}
    for id in (3, 1, 4, 2):
        allocator.free(id)
    for id in (5, 6, 7, 8):
        allocator.malloc(id, 30 * MIB)
    assert [place[allocator.address(id)] for id in (5, 6, 7, 8)] == taken


def test_a_small_remainder_of_512_is_split_off() -> None:
    allocator = Allocator()
    allocator.malloc(1, MIB)
    allocator.malloc(2, MIB - 512)
    assert [block["size"] for block in allocator.snapshot()[0]["blocks"]] == [MIB, MIB - 512, 512]


def test_a_large_block_keeps_a_tail_of_up_to_1_mib() -> None:
    script = Script()
    script.malloc(9, 9.75)
    # 20 − 9 = 11 > 1: split. 11 − 9.75 = 1.25 > 1: split.
    assert script.sizes == [[9, 9.75, -1.25]]
    script.free(2)
    script.malloc(10, first=3)  # 11 − 10 = 1, not more than 1: the whole block goes out, and counts as allocated
    assert script.sizes == [[9, 11]]
    assert (script.allocator.allocated, script.allocator.requested) == (20 * MIB, 19 * MIB)


def test_large_segments_to_measure() -> None:
    script = Script()
    script.malloc(10, 10.5, 33)
    # 10 → 10; 10.5 → 12, 1.5 > 1 splits; 33 → 34, 1 is not more than 1
    assert script.sizes == [[10], [10.5, -1.5], [34]]


def test_best_fit_is_the_smallest_and_then_the_oldest() -> None:
    script = Script()
    script.malloc(30, 14, 14, 22)
    second = script.allocator.address(2)
    script.free(1, 3, 2, 4)
    script.malloc(13.5, first=5)  # 14, 14, 22 and 30 fit; of the two 14s the older segment's, though freed last
    assert script.allocator.address(5) == second
    assert script.reserved == 80


def test_free_blocks_serve_only_their_stream_and_pool() -> None:
    script = Script()
    script.malloc(12)
    script.free(1)
    script.malloc(12, first=2, stream=7)
    assert script.history == [("alloc", 12), ("alloc", 12)]
    script.malloc(1, first=3)  # small: takes its own 2 MiB although 12 are free
    assert script.history[2:] == [("alloc", 2)]


def test_free_merges_with_both_neighbours() -> None:
    script = Script()
    script.malloc(4, 4, 4)
    script.free(1)
    script.free(3)  # merges with the 8 behind it
    assert script.sizes == [[-4, 4, -12]]
    script.free(2)
    assert script.sizes == [[-20]]


def test_empty_cache_releases_whole_free_segments_only() -> None:
    script = Script()
    script.malloc(12, 4, 4, 0.5)
    script.free(1, 2, 4)
    script.allocator.empty_cache()
    # large pool by size, then small pool; the 20 MiB segment holds a live 4
    assert script.history[3:] == [("free", 12), ("free", 2)]
    assert script.sizes == [[-4, 4, -12]]


def test_zero_bytes_take_nothing() -> None:
    allocator = Allocator()
    assert allocator.malloc(1, 0) is None
    assert (allocator.reserved, allocator.address(1), allocator.event) == (0, 0, 0)
    allocator.free(1)


def test_a_failed_cudamalloc_releases_the_cache_and_tries_again() -> None:
    script = Script(capacity=50)
    script.malloc(20, 30)
    script.free(1, 2)
    assert script.malloc(40, first=3) is None
    assert script.history[2:] == [("free", 20), ("free", 30), ("alloc", 40)]


def test_out_of_memory_says_how_much_is_missing_and_why() -> None:
    script = Script(capacity=64)
    script.malloc(8, 8, 8, 8, 12)  # segments 20 [8 8 −4], 20 [8 8 −4], 12
    script.free(2, 4, 5)
    oom = script.malloc(15, first=6)
    # asked: 15 → 16. The free 12 is released; 40 reserved, 24 left of 64: it fits
    assert oom is None
    oom = script.malloc(14, first=7)
    # now 40 + 16 reserved; 14 more make 70, 6 over 64. Live: 8 + 8, and all of the 16 (its tail of 1 is not split off).
    # Free: 12 behind each 8.
    assert oom == OutOfMemory(
        event=9,
        id=7,
        stream=0,
        requested=14 * MIB,
        size=14 * MIB,
        wanted=14 * MIB,
        missing=6 * MIB,
        allocated=32 * MIB,
        reserved=56 * MIB,
        fragmented=24 * MIB,
        largest_free=12 * MIB,
    )
    assert oom.for_fragmentation
    assert str(oom) == (
        "out of memory at event 9: 14.00 MiB requested, 6.00 MiB missing; 32.00 MiB allocated, 56.00 MiB reserved, "
        "24.00 MiB free in pieces of at most 12.00 MiB"
    )
    assert script.malloc(12, first=7) is None  # the failed id is free to use, and 12 fits


def test_an_oversize_block_waits_for_an_oversize_request() -> None:
    script = Script("max_split_size_mb:32,max_non_split_rounding_mb:24")
    script.malloc(64, 30)
    script.free(1)
    assert script.malloc(20, first=3) is None  # 64 ≥ 32 > 20: not given, a new segment of 20
    assert script.sizes == [[-64], [30], [20]]
    script.malloc(40, first=4)  # oversize itself, but 64 ≥ 40 + 24: too much waste
    assert script.sizes == [[-64], [30], [20], [40]]
    script.malloc(42, first=5)  # 64 < 42 + 24: given whole, never split
    assert script.sizes == [[64], [30], [20], [40]]


def test_at_20_mib_the_shared_segments_themselves_are_oversize() -> None:
    script = Script("max_split_size_mb:20")
    script.malloc(4)
    script.free(1)
    script.malloc(4, first=2)  # the free 20 is not under 20: another 20
    assert script.sizes == [[-20], [4, -16]]


def test_below_max_split_size_blocks_split_as_ever() -> None:
    script = Script("max_split_size_mb:32")
    script.malloc(30)
    script.free(1)
    script.malloc(20, first=2)
    assert script.sizes == [[20, -10]]


def test_release_of_the_smallest_sufficient_oversize_block() -> None:
    script = Script("max_split_size_mb:32", capacity=200)
    script.malloc(64, 50, 80)
    script.free(1, 2, 3)
    script.malloc(25, first=4)  # needs one of at least max(25, 32): 50 is released, 64 and 80 stay; 25 → 26, tail 1
    assert script.history[3:] == [("free", 50), ("alloc", 26)]


def test_release_of_several_oversize_blocks_from_the_largest() -> None:
    script = Script("max_split_size_mb:32,max_non_split_rounding_mb:20", capacity=132)
    script.malloc(40, 34, 36, 22)
    script.free(1, 2, 3, 4)
    script.malloc(60, first=5)  # none holds 60: 40, then 36 make 76 ≥ 60; 34 and 22 (not oversize) stay
    assert script.history[4:] == [("free", 40), ("free", 36), ("alloc", 60)]


def test_where_oversize_blocks_are_not_enough_all_is_released() -> None:
    script = Script("max_split_size_mb:32", capacity=100)
    script.malloc(40, 26, 30)
    script.free(1, 2, 3)
    script.malloc(70, first=4)  # only 40 is oversize, under 70: then all, by size
    assert script.history[3:] == [("free", 40), ("free", 26), ("free", 30), ("alloc", 70)]


def test_garbage_collection_releases_what_waited_longest() -> None:
    script = Script("garbage_collection_threshold:0.5,per_process_memory_fraction:0.5", device=400)
    # allowed 200, threshold 100
    script.malloc(40, 30, 20)
    script.free(1)  # after 3 searches of the large pool
    script.malloc(35, first=4)  # takes the free 40: 40 − 35 > 1, splits
    script.free(4)  # after 4
    script.malloc(50, first=5)  # search 5 misses; 90 reserved, not above 100: nothing collected
    script.free(2, 3)  # after 5
    script.malloc(60, first=6)  # search 6: ages 40: 2, 30: 1, 20: 1; 140 reserved, 40 above; average 4/3
    assert script.history[4:] == [("free", 40), ("alloc", 60)]


def test_garbage_collection_needs_a_fraction() -> None:
    script = Script("garbage_collection_threshold:0.5", capacity=200)
    script.malloc(120)
    script.free(1)
    script.malloc(140, first=2)
    assert script.history[1:] == [("free", 120), ("alloc", 140)]  # by the failure only
    with pytest.raises(InputError, match="device_bytes"):
        Script("per_process_memory_fraction:0.5", capacity=200)


def test_a_memory_fraction_limits_like_a_capacity() -> None:
    script = Script("per_process_memory_fraction:0.25", device=100)
    oom = script.malloc(20, 10)
    assert oom is not None
    assert (oom.missing, oom.reserved) == (5 * MIB, 20 * MIB)


def test_ids_are_checked() -> None:
    allocator = Allocator()
    allocator.malloc(1, 10)
    with pytest.raises(InputError, match="already allocated"):
        allocator.malloc(1, 10)
    with pytest.raises(InputError, match="no live allocation"):
        allocator.free(2)
    with pytest.raises(InputError, match="nbytes"):
        allocator.malloc(3, -1)
    assert allocator.event == 0


def test_peaks_by_phase_start_at_the_level_they_meet() -> None:
    allocator = Allocator()
    allocator.begin_phase("load")
    allocator.malloc(1, 12 * MIB)  # event 0
    allocator.malloc(2, 12 * MIB - 100)  # event 1: 12 MiB allocated
    allocator.free(1)  # event 2
    allocator.begin_phase("forward")
    allocator.malloc(3, 2 * MIB)  # event 3: from the free 12, split
    allocator.begin_phase("load")
    allocator.malloc(4, 10 * MIB)  # event 4: the 10 behind 3; 24 MiB again, which changes nothing
    allocator.free(4)  # event 5
    load, forward = allocator.peaks_by_phase["load"], allocator.peaks_by_phase["forward"]
    assert (load.allocated, load.allocated_at, load.requested) == (24 * MIB, 1, 24 * MIB - 100)
    assert (forward.allocated, forward.allocated_at, forward.requested) == (14 * MIB, 3, 14 * MIB - 100)
    assert (forward.reserved, forward.reserved_at) == (24 * MIB, 2)  # carried in
    assert allocator.peaks == load
    allocator.reset_peaks()
    assert allocator.peaks.allocated == 14 * MIB
    assert allocator.peaks_by_phase["load"] == load


def test_a_peak_belongs_to_the_first_event_that_reached_it() -> None:
    allocator = Allocator()
    for _ in range(2):
        allocator.malloc(1, MIB)
        allocator.free(1)
    assert (allocator.peaks.allocated_at, allocator.peaks.requested_at, allocator.peaks.reserved_at) == (0, 0, 0)

"""`expandable_segments:True`, worked by hand in MiB: pages of 2 in the small pool, of 20 in the large one."""

from __future__ import annotations

from tests.allocator.test_allocator import Script

ON = "expandable_segments:True"


def test_one_segment_grows_page_by_page() -> None:
    script = Script(ON)
    script.malloc(30)  # 2 pages, 10 free
    script.malloc(25, first=2)  # 10 free + 15 to map: 1 page
    assert script.history == [("map", 40), ("map", 20)]
    assert script.sizes == [[30, 25, -5]]


def test_the_small_pool_and_each_stream_have_their_own_segment() -> None:
    script = Script(ON)
    script.malloc(0.5, 1, 1)  # 2 holds 0.5 + 1; the third takes the free 0.5 and a page
    assert script.history == [("map", 2), ("map", 2)]
    script.malloc(1.5, first=4)
    script.malloc(1.5, first=5, stream=3)
    assert script.sizes == [[0.5, 1, 1, -1.5], [1.5, -18.5], [1.5, -18.5]]


def test_large_blocks_split_down_to_512_bytes() -> None:
    script = Script(ON)
    script.malloc(19.5)
    assert script.sizes == [[19.5, -0.5]]


def test_empty_cache_unmaps_whole_free_pages() -> None:
    script = Script(ON)
    script.malloc(30, 25, 45)  # [30 25 45], 100 mapped
    script.free(2)
    script.allocator.empty_cache()
    # pages 20..40 and 40..60 both reach out of the free 30..55: nothing to unmap
    assert script.history[-1] == ("map", 40)
    script.free(3)
    script.allocator.empty_cache()  # free 30..100: pages 40..60, 60..80, 80..100
    assert script.history[-1] == ("unmap", 60)
    assert script.sizes == [[30, -10]]
    script.free(1)
    script.allocator.empty_cache()
    assert script.reserved == 0
    assert script.sizes == []


def test_a_hole_is_mapped_again_before_the_end_grows() -> None:
    script = Script(ON)
    script.malloc(20, 40, 20)
    script.free(2)
    script.allocator.empty_cache()
    assert script.sizes == [[20], [20]]  # two mapped ranges of the one segment
    script.malloc(50, first=4)  # the hole has 40: too small, so the end grows by 3 pages
    assert script.sizes == [[20], [20, 50, -10]]
    script.malloc(30, first=5)
    assert script.sizes == [[20, 30, -10, 20, 50, -10]]


def test_best_fit_counts_what_a_block_can_grow_to() -> None:
    script = Script(ON)
    script.malloc(20, 15, 5, 11)  # [20 15 5 11 −9 | unmapped …]
    script.free(2)  # free: 15 inside, 9 at the end
    script.malloc(8, first=5)
    # 9 is the smallest that fits, but with the unmapped range behind it it is larger than 15, which is taken instead
    assert script.sizes == [[20, 8, -7, 5, 11, -9]]


def test_out_of_memory_in_pages() -> None:
    script = Script(ON, capacity=70)
    oom = script.malloc(30, 35)
    # 40 mapped, 10 free at the end; 35 − 10 = 25 more are 2 pages = 40; 80 over 70 by 10
    assert oom is not None
    assert (oom.wanted, oom.missing) == (40 * 2**20, 10 * 2**20)
    assert (oom.reserved, oom.fragmented, oom.largest_free) == (40 * 2**20, 10 * 2**20, 10 * 2**20)


def test_free_pages_move_to_where_they_are_needed() -> None:
    script = Script(ON, capacity=100)
    script.malloc(20, 40, 20)
    script.free(2)
    assert script.malloc(60, first=4) is None  # 40 unmapped from the hole, 60 mapped at the end
    assert script.history[-2:] == [("unmap", 40), ("map", 60)]


def test_address_space_is_an_eighth_more_than_the_device() -> None:
    script = Script(ON, capacity=200, device=160)  # 180 MiB of addresses
    script.malloc(*[20] * 9)
    script.malloc(20, first=10)  # a second segment
    assert [sum(sizes) for sizes in script.sizes] == [180, 20]

"""Options: against the compiled parser of torch, and by hand where the CPU build of torch does not hold the rule."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from peftplan.allocator.config import DIVISION_INTERVALS, AllocatorConfig, allocation_size, parse_config, round_size
from peftplan.errors import InputError, UnknownNameError
from peftplan.units import GIB, MIB

NO_DIVISIONS = (0,) * DIVISION_INTERVALS
FOUR = (4,) * DIVISION_INTERVALS

ACCEPTED = [
    "",
    "max_split_size_mb:20",
    "max_split_size_mb:512, max_non_split_rounding_mb:64",
    "large_segment_size_mb:15",
    "large_segment_size_mb:40,max_split_size_mb:40",
    "large_segment_size_mb:30,max_non_split_rounding_mb:50",
    "max_non_split_rounding_mb:60,large_segment_size_mb:25",
    "garbage_collection_threshold:0.6",
    "expandable_segments:True",
    "expandable_segments:False,pinned_use_background_threads:True",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:1",
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
    "roundup_power2_divisions:[64:8,256:4,1024:4,>:1]",
    "roundup_power2_divisions:[>:4]",
    "roundup_power2_divisions:[1:4,131072:2]",
    "roundup_power2_divisions:[256:0]",
    "roundup_power2_divisions:[]",
]
REFUSED = [
    "max_split_size_mb:19",
    "large_segment_size_mb:40,max_split_size_mb:39",
    "large_segment_size_mb:10",
    "max_non_split_rounding_mb:10",
    "garbage_collection_threshold:0",
    "garbage_collection_threshold:1.0",
    "expandable_segments:true",
    "roundup_power2_divisions:0",
    "roundup_power2_divisions:3",
    "roundup_power2_divisions:[256:3]",
    "roundup_power2_divisions:[3:4]",
    "max_split_size_mb:",
    "max_split_size_mb",
    ",",
]


@pytest.fixture
def libc10() -> Iterator[tuple[object, ctypes.CDLL]]:
    """torch's own parser (a process-wide singleton, left at its defaults) and the library that holds its fields."""
    torch = pytest.importorskip("torch")
    set_settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    path = Path(torch.__file__).parent / "lib" / "libc10.so"
    if set_settings is None or not path.exists() or not torch.__version__.startswith("2.13."):
        pytest.skip("the fields are read at the offsets of torch 2.13 on Linux")
    yield set_settings, ctypes.CDLL(os.fspath(path))
    set_settings("large_segment_size_mb:20,max_non_split_rounding_mb:20,expandable_segments:False")


def fields_of(library: ctypes.CDLL) -> AllocatorConfig:
    """The members of `AcceleratorAllocatorConfig` in the order of its header: three sizes, a vector, a double, a bool."""
    scope = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig"
    instance = library[f"{scope}8instanceEv"]
    instance.restype = ctypes.c_void_p
    divisions = library[f"{scope}24roundup_power2_divisionsEm"]
    divisions.argtypes, divisions.restype = [ctypes.c_size_t], ctypes.c_size_t
    address = instance()
    large, max_split, rounding = (ctypes.c_size_t * 3).from_address(address)
    return AllocatorConfig(
        max_split_size=None if max_split == 2**64 - 1 else max_split,
        max_non_split_rounding_size=rounding,
        roundup_power2_divisions=tuple(divisions(MIB << i) for i in range(DIVISION_INTERVALS)),
        garbage_collection_threshold=ctypes.c_double.from_address(address + 48).value,
        expandable_segments=bool(ctypes.c_ubyte.from_address(address + 56).value),
        large_segment_size=large,
    )


@pytest.mark.parametrize("text", ACCEPTED)
def test_options_mean_what_torch_makes_of_them(text: str, libc10) -> None:
    set_settings, library = libc10
    set_settings(text)
    assert parse_config(text) == fields_of(library)


@pytest.mark.parametrize("text", REFUSED)
def test_what_torch_refuses_is_refused(text: str, libc10) -> None:
    set_settings, _ = libc10
    with pytest.raises((ValueError, RuntimeError)):
        set_settings(text)
    with pytest.raises(InputError):
        parse_config(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_split_size_mb:30abc",  # torch reads 30
        "max_split_size_mb:-1",  # torch reads 2⁶⁴ − 1
        "max_split_size_mb:30,,expandable_segments:True",
        "max_split_size_mb:[1:2]",
        "expandable_segments:[1:2]",
        "roundup_power2_divisions:[256]",
        "garbage_collection_threshold:nan",
        "backend:cudaMallocAsync",
        "throw_on_cudamalloc_oom:True",
        "per_process_memory_fraction:1.5",
    ],
)
def test_stricter_than_torch(text: str) -> None:
    with pytest.raises(InputError):
        parse_config(text)


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean max_split_size_mb"):
        parse_config("max_split_size:100")


def test_options_of_speed_and_host_memory_change_nothing() -> None:
    assert parse_config("backend:native,pinned_num_register_threads:8,release_lock_on_cudamalloc:True") == AllocatorConfig()
    assert parse_config("throw_on_cudamalloc_oom:False") == AllocatorConfig()
    assert parse_config("per_process_memory_fraction:0.5") == replace(AllocatorConfig(), per_process_memory_fraction=0.5)


@pytest.mark.parametrize(
    ("nbytes", "divisions", "size"),
    [
        (1, NO_DIVISIONS, 512),
        (511, NO_DIVISIONS, 512),
        (512, NO_DIVISIONS, 512),
        (513, NO_DIVISIONS, 1024),
        (8_519_680, NO_DIVISIONS, 8_519_680),  # 16640 × 512
        (2048, FOUR, 2048),  # 4 × 512 is not more than 4 × 512: rounded to 512 as ever
        (2049, FOUR, 2560),  # between 2048 and 4096 in steps of 512
        (1200 * 1024, FOUR, 1280 * 1024),  # 1024, 1280, 1536, 1792, 2048 KiB: the example in the source, in KiB
        (1793 * 1024, FOUR, 2048 * 1024),
        (2048 * 1024, FOUR, 2048 * 1024),
        (3 * MIB + 1, (0, 2, *NO_DIVISIONS[2:]), 4 * MIB),  # 2 to 4 MiB in steps of 1
        (3 * MIB + 1, (2, 0, *NO_DIVISIONS[2:]), 3 * MIB + 512),  # the entry of 1 to 2 MiB does not apply
        (65 * GIB, (0,) * 15 + (2,), 96 * GIB),  # the last entry holds for all above 32 GiB: 64, 96, 128
    ],
)
def test_round_size(nbytes: int, divisions: tuple[int, ...], size: int) -> None:
    assert round_size(nbytes, divisions=divisions) == size


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (33_554_432, 32 * MIB),
    ],
)
def test_allocation_size(size: int, segment: int) -> None:
    assert allocation_size(size, large_segment_size=20 * MIB) == segment


def test_large_segment_size_replaces_only_the_middle_case() -> None:
    assert [allocation_size(n * MIB, large_segment_size=12 * MIB) for n in (1, 2, 10)] == [2 * MIB, 12 * MIB, 10 * MIB]

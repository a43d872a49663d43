"""Bytes and counts: how the CUDA allocator rounds, and how numbers are shown."""

from __future__ import annotations

from collections.abc import Iterable

GIB = 2**30
MIB = 2**20
GB = 10**9
"""Vendors and some papers count in GB = 10⁹; everywhere else this project says GiB = 2³⁰."""

ALLOCATION_ROUNDING = 512
"""Smallest block of the CUDA caching allocator, in bytes (`kMinBlockSize`, c10/cuda/CUDACachingAllocator.cpp)."""


def ceil_div(n: int, d: int) -> int:
    """⌈n / d⌉ for integers."""
    return -(-n // d)


def pinned(num_bytes: int) -> int:
    """Bytes that torch's caching allocator of pinned host memory takes for a tensor of one byte or more.

    Source: torch, aten/src/ATen/core/CachingHostAllocator.h (`allocate`: `PowerOf2Ceil`), with default options.
    """
    return 1 << (num_bytes - 1).bit_length()


def round512(num_bytes: int) -> int:
    """Bytes that the allocator counts for a request of `num_bytes` (`round_size`: up to a multiple of 512, 0 for 0)."""
    return ceil_div(num_bytes, ALLOCATION_ROUNDING) * ALLOCATION_ROUNDING


def in_ranges(numbers: Iterable[int], between: str = ",") -> str:
    """Ascending numbers as ranges: `(0, 1, 2, 5)` → `0-2,5`."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    return between.join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def format_bytes(num_bytes: int) -> str:
    """`41.27 GiB`, `18.0 MiB`, `512 B`: three or four significant figures, binary units."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes} B"


def format_count(count: int) -> str:
    """A parameter count in short form: `6.74 B`, `16.8 M`, `512`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)

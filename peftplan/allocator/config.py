"""Options and size rules of PyTorch's CUDA caching allocator: what is rounded to what, and which options change it.

Sources: c10/core/AllocatorConfig.{h,cpp} and c10/cuda/CUDACachingAllocator.cpp, torch (names below are the C++ names
in snake case). The parser and the divisions per size were compared with the compiled `libc10` of torch.
Options that only change speed or pinned host memory are accepted and have no effect here. Refused because they change
which memory is taken in a way that is not modelled: `backend:cudaMallocAsync` and `throw_on_cudamalloc_oom:True`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftplan.allocator.tokens import Value, flag, fraction, items, power_of_2, whole_number
from peftplan.errors import InputError, UnknownNameError
from peftplan.units import ALLOCATION_ROUNDING, MIB, ceil_div

MIN_BLOCK_SIZE = ALLOCATION_ROUNDING
"""`kMinBlockSize`: every block is a multiple of it."""
SMALL_SIZE = 1 * MIB
"""`kSmallSize`: rounded sizes up to it live in the small pool; also the remainder a large block needs to exceed to split."""
SMALL_BUFFER = 2 * MIB
"""`kSmallBuffer`: a segment of the small pool, and a page of a small expandable segment."""
MIN_LARGE_ALLOC = 10 * MIB
"""`kMinLargeAlloc`: from here on a segment is made to measure."""
ROUND_LARGE = 2 * MIB
"""`kRoundLarge`: segments made to measure are multiples of it."""
LARGE_SEGMENT_SIZE = 20 * MIB
"""Default of `large_segment_size_mb` (`kLargeBuffer` in older releases): segments for 1 to 10 MiB, large expandable pages."""

DIVISION_INTERVALS = 16
"""`kRoundUpPowerOfTwoIntervals`: one entry of `roundup_power2_divisions` per power of two from 1 MiB, the last for all above."""

WITHOUT_EFFECT = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
    }
)
"""Options of torch that change speed or pinned host memory, and no byte on the device."""


@dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """What decides sizes, in bytes; the defaults are torch's.

    `max_split_size` None: any block may be split. `per_process_memory_fraction` None: never set, which also switches garbage
    collection off (torch collects only under a set fraction; `torch.cuda.set_per_process_memory_fraction` sets it too).
    `ties_by_address` is not an option but torch before 2.13: among free blocks of one size it takes the lowest address; newer
    versions take the block in the oldest segment (docs/rehearse.md).
    """

    max_split_size: int | None = None
    max_non_split_rounding_size: int = LARGE_SEGMENT_SIZE
    roundup_power2_divisions: tuple[int, ...] = (0,) * DIVISION_INTERVALS
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    large_segment_size: int = LARGE_SEGMENT_SIZE
    per_process_memory_fraction: float | None = None
    ties_by_address: bool = False

    @property
    def garbage_collects(self) -> bool:
        """Whether `garbage_collect_cached_blocks` ever runs."""
        return self.per_process_memory_fraction is not None and self.garbage_collection_threshold > 0


def round_size(nbytes: int, *, divisions: tuple[int, ...]) -> int:
    """Bytes of the block that `nbytes` > 0 asks for (`round_size`): 512 or a multiple of 512, or the next power-of-2 division."""
    if nbytes < MIN_BLOCK_SIZE:
        return MIN_BLOCK_SIZE
    parts = divisions[min(max(nbytes.bit_length() - MIB.bit_length(), 0), DIVISION_INTERVALS - 1)]
    if parts > 1 and nbytes > MIN_BLOCK_SIZE * parts:
        step = (1 << (nbytes.bit_length() - 1)) // parts  # the power of two below, in `parts` equal steps
        return ceil_div(nbytes, step) * step
    return ceil_div(nbytes, MIN_BLOCK_SIZE) * MIN_BLOCK_SIZE


def allocation_size(size: int, *, large_segment_size: int) -> int:
    """Bytes that a miss of rounded `size` asks of the device (`get_allocation_size`)."""
    if size <= SMALL_SIZE:
        return SMALL_BUFFER
    if size < MIN_LARGE_ALLOC:
        return large_segment_size
    return ceil_div(size, ROUND_LARGE) * ROUND_LARGE


def parse_config(text: str) -> AllocatorConfig:
    """The options of a `PYTORCH_ALLOC_CONF` string, `key:value,key:[size:value,...]`; stricter than torch about stray tokens."""
    config = AllocatorConfig()
    rounding: int | None = None
    for key, value in items(text):
        if key == "max_non_split_rounding_mb":
            rounding = _mib(key, value, at_least=config.large_segment_size)
        elif key in _PARSERS:
            config = _PARSERS[key](config, key, value)
        elif key not in WITHOUT_EFFECT:
            raise UnknownNameError("alloc_conf", key, [*_PARSERS, "max_non_split_rounding_mb", *WITHOUT_EFFECT])
    # Until it is set itself, the rounding limit follows `large_segment_size_mb` (seen in the compiled library).
    return replace(config, max_non_split_rounding_size=config.large_segment_size if rounding is None else rounding)


def _mib(key: str, value: Value, *, at_least: int) -> int:
    size = whole_number(key, value) * MIB
    if size < at_least:
        raise InputError(key, value, f"accepted: at least {at_least // MIB}")
    return size


def _max_split_size(config: AllocatorConfig, key: str, value: Value) -> AllocatorConfig:
    return replace(config, max_split_size=_mib(key, value, at_least=config.large_segment_size))


def _large_segment_size(config: AllocatorConfig, key: str, value: Value) -> AllocatorConfig:
    return replace(config, large_segment_size=_mib(key, value, at_least=MIN_LARGE_ALLOC + MIB))


def _divisions(config: AllocatorConfig, key: str, value: Value) -> AllocatorConfig:
    """One number for all sizes, or `[256:1,512:2,>:4]`: sizes in MiB.

    Below the first listed size its number holds; a power of two that is skipped between two listed sizes is *not* rounded.
    """
    if isinstance(value, str):
        return replace(config, roundup_power2_divisions=(power_of_2(key, value),) * DIVISION_INTERVALS)
    divisions = [0] * DIVISION_INTERVALS
    last = 0
    for position, (size, number) in enumerate(value):
        parts = 0 if number == "0" else power_of_2(key, number)
        if size == ">":
            divisions[last + 1 :] = [parts] * (DIVISION_INTERVALS - last - 1)
            continue
        last = min(power_of_2(key, size).bit_length() - 1, DIVISION_INTERVALS - 1)
        if position == 0:
            divisions[:last] = [parts] * last
        divisions[last] = parts
    return replace(config, roundup_power2_divisions=tuple(divisions))


def _threshold(config: AllocatorConfig, key: str, value: Value) -> AllocatorConfig:
    threshold = fraction(key, value)
    if threshold in (0.0, 1.0):
        raise InputError(key, value, "accepted: a number strictly between 0 and 1")
    return replace(config, garbage_collection_threshold=threshold)


def _expandable(config: AllocatorConfig, key: str, value: Value) -> AllocatorConfig:
    return replace(config, expandable_segments=flag(key, value))


def _memory_fraction(config: AllocatorConfig, key: str, value: Value) -> AllocatorConfig:
    return replace(config, per_process_memory_fraction=fraction(key, value))


def _backend(config: AllocatorConfig, key: str, value: Value) -> AllocatorConfig:
    if value != "native":
        raise InputError(key, value, "accepted: native (no other backend is modelled)")
    return config


def _throw_early(config: AllocatorConfig, key: str, value: Value) -> AllocatorConfig:
    if flag(key, value):
        raise InputError(key, value, "accepted: False (the early out-of-memory policy is not modelled)")
    return config


_PARSERS = {
    "backend": _backend,
    "expandable_segments": _expandable,
    "garbage_collection_threshold": _threshold,
    "large_segment_size_mb": _large_segment_size,
    "max_split_size_mb": _max_split_size,
    "per_process_memory_fraction": _memory_fraction,
    "roundup_power2_divisions": _divisions,
    "throw_on_cudamalloc_oom": _throw_early,
}

"""The flat tensors in which rank 0 sends its weights, against sums by hand."""

from __future__ import annotations

from peftplan.memory.loaded import Level
from peftplan.memory.synced import flat_tensors, send

MIB = 2**20


def test_a_bucket_of_one_tensor_is_no_copy() -> None:
    """250 MiB fill a bucket; each dtype has its own; they are sent in the order of their first tensors."""
    sizes = [("bf16", 200 * MIB), ("fp32", 512), ("bf16", 100 * MIB), ("bf16", 400 * MIB), ("bf16", 512), ("bf16", 512)]
    assert flat_tensors(sizes) == (300 * MIB, 0, 0, 1024)


def test_two_buckets_are_there_at_once() -> None:
    memory = Level()
    send(memory, (300 * MIB, 100 * MIB, 200 * MIB))
    assert memory.peak == 400 * MIB
    assert memory.now == 0

"""Context sizes against the public figures they were read from, and torch's default cuBLAS workspace."""

from __future__ import annotations

import pytest

from peftplan.datafiles import load
from peftplan.hardware.context import (
    GENERATIONS,
    context_bytes,
    context_for_verdict,
    context_measurements,
    cublas_workspace_bytes,
)
from peftplan.hardware.gpus import find_gpu, gpus


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("t4", 147_718_144),  # 140.875 MiB = 140.875 × 1,048,576, after a training step
        ("b200", 641_728_512),  # 612 MiB
        ("rtx-4090", 448_790_528),  # 428 MiB
        ("rtx-3090", 268_435_456),  # 256 MiB; not the 1,488 MiB of torch 1.7, which loads every kernel at start
        ("a100-80gb", 504_365_056),  # 481 MiB: lazy loading, not 942 MiB with CUDA_MODULE_LOADING=EAGER
    ],
)
def test_measured_cards(name: str, num_bytes: int) -> None:
    looked = context_bytes(find_gpu(name))
    assert looked.bytes == num_bytes
    assert looked.source


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h100-80gb", "no public measurement"),
        ("v100-16gb", "1343 MiB"),  # only with every kernel loaded: told, not used
        ("rtx-5090", "828 MiB"),  # only a process that had worked before
        ("24GiB", "no public measurement"),
    ],
)
def test_unknown_is_none_with_the_reason(name: str, words: str) -> None:
    looked = context_bytes(find_gpu(name))
    assert looked.bytes is None
    assert words in looked.why
    assert looked.source is None


@pytest.mark.parametrize(
    ("name", "mib", "of"),
    [  # the largest figure with lazy loading of a card of the generation
        ("rtx-2080-ti", 140.875, "t4"),  # Turing; its own 879 MiB are of torch 1.6, which loads every kernel at start
        ("a10", 481, "a100-80gb"),  # Ampere: 256 MiB on an RTX 3090
        ("l4", 428, "rtx-4090"),  # Ada: 426 MiB on an RTX 6000 Ada
        ("rtx-5090", 828, "rtx-5090"),  # Blackwell: 612 MiB on a B200, 555 on an RTX PRO 6000
        ("b300", 828, "rtx-5090"),
        ("h100-80gb", 828, "rtx-5090"),  # no Hopper, no Volta, no AMD card: the largest of all
        ("v100-16gb", 828, "rtx-5090"),
        ("mi300x", 828, "rtx-5090"),
        ("24GiB", 828, "rtx-5090"),
        ("24GB", 828, "rtx-5090"),
    ],
)
def test_a_verdict_assumes_the_largest_current_context_of_the_generation(name: str, mib: float, of: str) -> None:
    context = context_for_verdict(find_gpu(name))
    assert (context.bytes, context.assumed) == (mib * 2**20, True)
    assert f"assumed: {mib:g} MiB" in context.why
    assert of in context.why


def test_most_contexts_are_assumed() -> None:
    contexts = {gpu.id: context_for_verdict(gpu) for gpu in gpus()}
    assert (len(contexts), sum(context.assumed for context in contexts.values())) == (155, 148)
    for gpu in gpus():
        known = context_bytes(gpu).bytes
        assert known is None or (contexts[gpu.id].bytes, contexts[gpu.id].assumed) == (known, False)


def test_every_compute_capability_of_nvidia_has_a_generation() -> None:
    assert {gpu.compute_capability for gpu in gpus() if gpu.vendor == "NVIDIA"} <= set(GENERATIONS)


def test_a_rounded_measurement_says_so() -> None:
    assert "476 to 486 MiB" in context_bytes(find_gpu("a100-80gb")).why


def test_every_measurement_has_a_catalogue_card_and_a_source() -> None:
    rows = load("context.json", dict)["measurements"]
    ids = {gpu.id for gpu in gpus()}
    assert all(row["gpu"] in ids and row["source"] and row["how"] for row in rows)
    assert sum(len(context_measurements(gpu)) for gpu in gpus()) == len(rows) >= 15


@pytest.mark.parametrize(
    ("capability", "num_bytes"),
    [
        ("7.5", 8_519_680),  # :4096:2:16:8 = (2 × 4096 + 8 × 16) KiB = 8,320 KiB
        ("8.0", 8_519_680),
        ("8.9", 8_519_680),
        ("9.0", 33_554_432),  # :4096:8 = 32,768 KiB
        ("10.0", 33_554_432),
        ("12.0", 33_554_432),
        ("10.3", None),
        ("12.1", None),
        ("gfx942", None),
        (None, None),
    ],
)
def test_cublas_workspace(capability: str | None, num_bytes: int | None) -> None:
    looked = cublas_workspace_bytes(capability)
    assert looked.bytes == num_bytes
    assert looked.why

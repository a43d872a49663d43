"""Buffers of sums over rows, against torch's own allocator."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from peftplan import estimate
from peftplan.hardware.gpus import find_gpu
from peftplan.hardware.processors import processors
from peftplan.planning.verdicts import kernels_on
from peftplan.tape.column_sums import ColumnSums, column_dims, elements

np = pytest.importorskip("numpy")

A100, T4 = processors("8.0"), processors("7.5")
CARDS = ("l4", "rtx-4090")


@pytest.mark.parametrize(
    ("rows", "columns", "on_a100", "on_t4"),
    [
        (4096, 2, 0, 0),
        (512, 768, 0, 0),
        (1024, 768, 6_291_456, 6_291_456),
        (4096, 768, 25_165_824, 21_233_664),
        (4096, 3072, 100_663_296, 22_020_096),
        (16384, 768, 100_663_296, 21_233_664),
        (16384, 3072, 113_246_208, 25_165_824),
    ],
)
def test_buffers_are_those_that_torch_allocates(rows: int, columns: int, on_a100: int, on_t4: int) -> None:
    """`torch.empty(rows, columns).sum(0)` in fp32, fp16 and bf16, in the memory history of torch 2.13's CUDA build.

    The emulated cards have 108 x 2,048 and 40 x 1,024 threads. Beside the partial sums it shows 512 bytes of counters.
    """
    for card, nbytes in ((A100, on_a100), (T4, on_t4)):
        assert 4 * elements("partial sums", rows=rows, columns=columns, card=card) == nbytes
        assert (0 < 4 * elements("counters", rows=rows, columns=columns, card=card) <= 512) == bool(nbytes)


def test_a_named_size_is_that_of_many_points_at_once() -> None:
    size = ColumnSums(("b", "s"), 768, A100, "partial sums")
    many: dict[str, Any] = {"b": np.array([1, 4]), "s": 1024}
    assert (4 * np.asarray(size.at(many))).tolist() == [6_291_456, 25_165_824]
    assert pickle.loads(pickle.dumps(size)).at({"b": 4, "s": 1024}) == 6_291_456


def test_only_sums_over_the_first_dims_have_buffers() -> None:
    assert column_dims(("b", "s", 768), (768,), A100) == column_dims(("b", 12, "s", 64), (768,), A100)
    assert column_dims(("b", "s", 16, 128), (128,), A100)[0] == "partial sums of b·s·16 rows of 128"
    assert len(column_dims(("b", 197, 768), (768,), A100)) == 2
    assert column_dims(("b", 197, 768), (1, 197, 768), A100) == ()
    assert column_dims(("b", "s", 768), ("b", "s", 1), A100) == ()
    assert column_dims(("b", "s", 768), (1,), A100) == ()
    assert column_dims(("b", "s", 768), ("s", 768), A100) == ()


@pytest.mark.parametrize(("gpu", "multiprocessors"), [("l4", 58), ("rtx-3060", 28), ("rtx-4090", 128), ("rtx-2080-ti", 68)])
def test_both_engines_count_the_cards_own_multiprocessors(gpu: str, multiprocessors: int) -> None:
    """DistilBERT, 32 x 256 tokens: what is reserved differs with the buffers of its biases; numbers as torch prints them."""
    pytest.importorskip("torch")
    job: dict[str, Any] = {"method": "full", "task_type": "SEQ_CLS", "trainer": "plain", "batch_size": 32, "seq_len": 256}
    ours, traced = (estimate("distilbert-base-uncased", gpu=gpu, engine=engine, **job).peaks for engine in ("analytic", "trace"))
    assert ours is not None
    assert traced is not None
    assert kernels_on(find_gpu(gpu))[1].number == multiprocessors
    assert ours.reserved == traced.reserved
    assert ours.by_phase["backward"] == pytest.approx(traced.by_phase["backward"], abs=512)


def test_cards_of_one_generation_reserve_what_their_buffers_need() -> None:
    """DistilBERT, 32 x 256 tokens: an L4 has 58 multiprocessors, an RTX 4090 128; LoRA of Llama sums no rows."""
    job: dict[str, Any] = {"method": "full", "task_type": "SEQ_CLS", "batch_size": 32, "seq_len": 256}
    both, llama = estimate("distilbert-base-uncased", gpu=CARDS, **job), estimate("llama-3.2-1b", method="lora", gpu=CARDS)
    alone = [estimate("distilbert-base-uncased", gpu=card, **job).peaks for card in CARDS]
    reserved = [peaks and peaks.reserved for peaks in alone]
    assert [verdict.needed_bytes - verdict.context_bytes for verdict in both.gpus] == reserved
    assert reserved[0] != reserved[1]
    assert len({verdict.needed_bytes - verdict.context_bytes for verdict in llama.gpus}) == 1


@pytest.mark.quick
def test_a_card_of_unknown_multiprocessors_has_those_of_its_generation() -> None:
    assert kernels_on(find_gpu("v100-16gb"))[1] == processors("7.0")
    assert kernels_on(find_gpu("24GiB"))[1] == kernels_on(None)[1] == A100

"""Corrections of single operations: what they take on CUDA instead of under a mode on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from peftplan.trace.cuda.differences import KERNEL_TEMPORARIES
from peftplan.trace.cuda.dispatcher import dispatched_as_on_cuda
from peftplan.trace.events.tracker import Tracker

ROWS, WIDTH = 64, 32
WHOLE = ROWS * WIDTH * 4


def indexed(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x[i]


def selected(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, i)


def gathered(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x.gather(0, i.unsqueeze(-1).expand(-1, WIDTH))


def largest(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x.topk(2).values


@pytest.mark.parametrize("pick", [indexed, selected, gathered, largest])
def test_backward_of_indexing_writes_into_its_zeros(pick: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """One tensor as large as what was indexed: autograd's formula adds into the zeros that it makes."""
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, after=lambda *args: None)
    with FakeTensorMode():
        x = torch.empty(ROWS, WIDTH, requires_grad=True)
        out = pick(x, torch.empty(ROWS // 2, dtype=torch.int64))
        grad = torch.empty_like(out)
        with tracker:
            (gradient,) = torch.autograd.grad(out, x, grad)
    sizes = [m.storage.nbytes for m in tracker.log if m.kind == "alloc"]
    assert sizes.count(WHOLE) == 1
    assert gradient.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_the_log_probabilities_of_a_cross_entropy_not_its_logits(dtype: torch.dtype) -> None:
    """As CUDA's own dispatcher does, seen with a CUDA build of torch 2.12: 16-bit log probabilities, and a copy in fp32."""
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, after=lambda *args: None)
    with FakeTensorMode(), dispatched_as_on_cuda(), tracker, torch.autocast("cpu", dtype=dtype):
        logits = torch.empty(ROWS, WIDTH, dtype=dtype, requires_grad=True)
        torch.nn.functional.cross_entropy(logits, torch.empty(ROWS, dtype=torch.int64))
    sizes = [m.storage.nbytes for m in tracker.log if m.kind == "alloc"][1:]
    assert [nbytes for nbytes in sizes if nbytes >= WHOLE // 2] == [WHOLE // 2, WHOLE]


@pytest.mark.parametrize(
    ("n", "rows", "width", "indices", "segments", "parts", "sums"),
    [(4096, 128256, 2048, 32_768, 32_768, 36_040, 36_904_960), (4096, 2, 512, 32_768, 16, 3_288, 841_728)],
)
def test_the_gradient_of_an_embedding_sorts_its_indices(
    n: int, rows: int, width: int, indices: int, segments: int, parts: int, sums: int
) -> None:
    """Bytes as the memory history of torch 2.13's CUDA build says them, on an emulated card; 3,072 indices are not sorted."""
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries=KERNEL_TEMPORARIES, after=lambda *args: None)
    traced = []
    for count in (n, 3072):
        with FakeTensorMode():
            weight = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
            out = torch.nn.functional.embedding(torch.zeros(count, dtype=torch.int64), weight)
            grad = torch.empty_like(out)
            tracker.log.clear()
            with tracker:
                torch.autograd.grad(out, weight, grad)
        traced.append([m.storage.nbytes for m in tracker.log if m.kind == "alloc" and m.storage.op.startswith("aten.embedding")])
    table = rows * width * 2
    assert traced == [[table, indices, indices, indices, segments, segments, parts, sums], [table]]


def test_backward_of_clamp_joins_its_conditions_in_place() -> None:
    """Two masks and the gradient (FunctionsManual.cpp: `logical_and_` where nothing watches)."""
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, after=lambda *args: None)
    with FakeTensorMode():
        x, bound = torch.empty(ROWS, WIDTH, requires_grad=True), torch.empty(())
        out = torch.clamp(x, min=-bound, max=bound)
        with tracker:
            torch.autograd.grad(out, x, torch.empty_like(out))
    sizes = [m.storage.nbytes for m in tracker.log if m.kind == "alloc" and m.storage.nbytes >= WHOLE // 4]
    assert sizes == [WHOLE, WHOLE // 4, WHOLE // 4, WHOLE]  # the first is the gradient that comes


def test_isinf_takes_the_absolute_values_first() -> None:
    """Torch's own allocations on the CPU are the witness: the values, then the result of their comparison."""
    x = torch.zeros(ROWS, WIDTH, dtype=torch.float16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        torch.isinf(x)
    real = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, after=lambda *args: None)
    with FakeTensorMode(), tracker:
        torch.isinf(torch.empty(ROWS, WIDTH, dtype=torch.float16))
    traced = [m.storage.nbytes if m.kind == "alloc" else -m.storage.nbytes for m in tracker.log][1:]
    assert [n for n in real if n > 64] == [n for n in traced if n > 0] == [WHOLE // 2, WHOLE // 4]


def test_a_copy_that_code_asks_for_stays_a_copy() -> None:
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, after=lambda *args: None)
    with FakeTensorMode(), tracker:
        x: Any = torch.empty(ROWS, WIDTH)
        y = x.index_add(0, torch.empty(2, dtype=torch.int64), torch.empty(2, WIDTH))
    assert y.untyped_storage()._cdata != x.untyped_storage()._cdata
    assert [m.storage.nbytes for m in tracker.log if m.kind == "alloc"].count(WHOLE) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layer_norm_keeps_its_statistics_in_fp32(dtype: torch.dtype) -> None:
    """Mean and rstd of 256 rows: 1024 bytes each in any dtype; the gradients have the input's."""
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, after=lambda *args: None)
    with FakeTensorMode(), tracker:
        x, w, b = (torch.empty(*dims, dtype=dtype, requires_grad=True) for dims in ((256, WIDTH), (WIDTH,), (WIDTH,)))
        out = torch.nn.functional.layer_norm(x, (WIDTH,), w, b)
        sizes = [m.storage.nbytes for m in tracker.log if m.kind == "alloc" and m.storage.op.startswith("aten.native_layer_norm")]
        grads = torch.autograd.grad(out, (x, w, b), torch.empty_like(out))
    assert sizes[1:] == [1024, 1024]
    assert [g.dtype for g in grads] == [dtype] * 3


Summed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
linear = torch.nn.functional.linear


def residual(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x * 1.0
    return (h + linear(h, w)).square()


def two_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x * 1.0
    return (h @ w).square() + h @ w


def projections(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.unsqueeze(0) * 1.0
    return linear(h, w).square() + linear(h, w)


def tied(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return linear(torch.nn.functional.embedding(torch.zeros(ROWS, dtype=torch.int64), w), w)


def shared(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x * 1.0
    y = h * 2
    return (y + h + (h * 3).sin() + y).square()


def within(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x * 1.0
    return h * h


def torch_sums(summed: Summed) -> list[bool]:
    """Of each sum of gradients that torch makes itself, whether it is in place."""
    x, w = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH, requires_grad=True)
    loss = summed(x, w).sum()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        loss.backward()
    return [event.name == "aten::add_" for event in seen.events() if event.name in ("aten::add", "aten::add_")]


def traced_sums(summed: Summed) -> int:
    """How many sums of gradients take a new tensor in a trace."""
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, after=lambda *args: None)
    with FakeTensorMode(), tracker:
        x, w = torch.empty(ROWS, WIDTH, requires_grad=True), torch.empty(WIDTH, WIDTH, requires_grad=True)
        loss: Any = summed(x, w).sum()
        tracker.begin("backward")
        loss.backward()
    return sum(m.kind == "alloc" and m.phase == "backward" and m.storage.op == "aten.add.Tensor" for m in tracker.log)


@pytest.mark.parametrize("summed", [residual, two_products, projections, tied, shared])
def test_gradients_are_summed_in_place_where_torch_does_it(summed: Summed) -> None:
    """Torch's own backward of real tensors is the witness: a view (projections) or what another node holds is not written to."""
    in_place = torch_sums(summed)
    assert in_place
    assert traced_sums(summed) == in_place.count(False)


def test_the_two_gradients_of_one_operation_count_as_a_new_sum() -> None:
    """A formula's own sums look the same, so this one is left too large, by one tensor for one moment."""
    assert torch_sums(within) == [True]
    assert traced_sums(within) == 1


def test_a_later_backward_is_added_into_the_gradient_that_is_there() -> None:
    """Accumulation: the second micro batch makes its own gradient and no sum beside it (accumulate_grad.h, case 2.3)."""
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, after=lambda *args: None)
    with FakeTensorMode(), tracker:
        x, w = torch.empty(ROWS, WIDTH), torch.empty(WIDTH, WIDTH, requires_grad=True)
        for _ in range(2):
            loss: Any = (x @ w).sum()
            tracker.begin("backward")
            loss.backward()
            tracker.begin("forward")
    op = "aten.empty.memory_format"
    weight_sized = [m.kind for m in tracker.log if m.storage.shape == (WIDTH, WIDTH) and m.storage.op != op]
    assert weight_sized == ["alloc", "alloc", "free"]  # the first is stolen and stays, the second is added and goes

"""Corrections of single operations: what they take on CUDA instead of under a mode on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftplan.trace.tracker import Tracker

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
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, before=lambda *args: None)
    with FakeTensorMode():
        x = torch.empty(ROWS, WIDTH, requires_grad=True)
        out = pick(x, torch.empty(ROWS // 2, dtype=torch.int64))
        grad = torch.empty_like(out)
        with tracker:
            (found,) = torch.autograd.grad(out, x, grad)
    made = [m.storage.nbytes for m in tracker.log if m.kind == "alloc"]
    assert made.count(WHOLE) == 1
    assert found.shape == x.shape


def test_a_copy_that_code_asks_for_stays_a_copy() -> None:
    tracker = Tracker(is_logits=lambda t: False, scalar=lambda t: 0, temporaries={}, before=lambda *args: None)
    with FakeTensorMode(), tracker:
        x: Any = torch.empty(ROWS, WIDTH)
        y = x.index_add(0, torch.empty(2, dtype=torch.int64), torch.empty(2, WIDTH))
    assert y.untyped_storage()._cdata != x.untyped_storage()._cdata
    assert [m.storage.nbytes for m in tracker.log if m.kind == "alloc"].count(WHOLE) == 2

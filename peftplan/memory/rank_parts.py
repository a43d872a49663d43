"""The parts of a tensor that ranks share by their last dim, gathered and divided (torch, distributed/tensor/_redistribute.py)."""

from __future__ import annotations

from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor


def gathered(f: Tape, x: Tensor, ranks: int) -> Tensor:
    """The parts of all ranks. Of the gradient the rank copies its part."""
    node = f.record(_part_backward, (x,), x.dims)
    if node is not None:
        node.in_python = True
    return gather(f, x, ranks, node)


def gather(f: Tape, x: Tensor, ranks: int, node: Node | None = None) -> Tensor:
    """The parts of all ranks side by side, after they were one below the other."""
    *rows, width = x.dims
    assert isinstance(width, int)
    _below = f.new((ranks, *x.dims), x.dtype, "all_gather")
    return f.new((*rows, ranks * width), x.dtype, "cat", node)


def _part_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "part of a gradient")

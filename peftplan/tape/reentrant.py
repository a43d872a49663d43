"""Reentrant checkpointing: the forward saves its inputs alone, the backward runs the function again and a backward of its own.

Unlike without `use_reentrant` the function runs to its end again, its results and their gradients live until its own backward is
done, and its inputs are leaves, on which their gradients gather. Source: torch, utils/checkpoint.py (`CheckpointFunction`),
csrc/autograd/engine.cpp (a backward within a backward runs its graph alone).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peftplan.tape.hosted import fetched, stored
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Log, Node, Outputs, Parameter, Tensor


class Leaf(Parameter):
    """A tensor that asks for a gradient though no operation made it; its gradient waits on it."""

    __slots__ = ()

    def __init__(self, dims: Dims, dtype: str) -> None:
        super().__init__("", dims, dtype, trainable=True)
        self.node = None  # refers to itself else

    def accumulate(self, tape: Log, grad: Tensor) -> None:
        """`AccumulateGrad` takes a gradient that nothing else holds."""
        self.grad = grad.detach()


class Call(NamedTuple):
    """A checkpointed call, which its node holds."""

    function: Callable[..., Outputs]
    arguments: tuple[object, ...]
    """`TENSOR` stands for each one that is saved."""
    results: tuple[tuple[Dims, str], ...]
    """Dims and dtype of each result."""


def checkpoint(f: Tape, function: Callable[..., Outputs], *args: object, hosted: bool = False) -> Outputs:
    """`checkpoint(function, *args, use_reentrant=True)`: saves the tensors among the arguments; the node holds the function.

    `hosted`: they are saved on the host.
    """
    tensors = tuple(x for x in args if type(x) is Tensor)
    node = f.record(_checkpoint_backward, tensors, *(stored(f, tensors) if hosted else tensors))
    with f.no_grad():
        out = function(*args)
    outputs = (out,) if isinstance(out, Tensor) else out
    if node is not None:
        others = tuple(TENSOR if type(x) is Tensor else x for x in args)
        node.context = Call(function, others, tuple((x.dims, x.dtype) for x in outputs))
    results = tuple(Tensor(x.storage, x.dims, x.dtype, node, index) for index, x in enumerate(outputs))
    return results[0] if isinstance(out, Tensor) else results


TENSOR = object()
"""Stands for a saved tensor among the arguments."""


def _checkpoint_backward(f: Tape, node: Node, saved: Sequence[object], *grads_of_outputs: Tensor | None) -> Gradients:
    assert isinstance(node.context, Call)
    function, others, shapes = node.context
    saved = fetched(f, tuple(saved))
    grads = [*grads_of_outputs, *[None] * (len(shapes) - len(grads_of_outputs))]
    for index, (dims, dtype) in enumerate(shapes):  # `materialize_grads`
        grads[index] = grads[index] or f.new(dims, dtype, "zeros")
    detached = [
        Tensor(x.storage, x.dims, x.dtype, Leaf(x.dims, x.dtype) if x.node else None) for x in saved if isinstance(x, Tensor)
    ]
    waiting = iter(detached)
    inputs = tuple(next(waiting) if x is TENSOR else x for x in others)
    with f.recomputing():
        out = function(*inputs)
    outputs = (out,) if isinstance(out, Tensor) else out
    f.nested = True
    f.backward_from([(x, g) for x, g in zip(outputs, grads, strict=True) if x.node and g])
    f.nested = False
    return tuple(x.node.grad if type(x.node) is Leaf else None for x in detached)

"""Reentrant checkpointing. Forward saves only the inputs; backward runs the function again, then a nested backward.

It differs from `use_reentrant=False` in three ways:
- The recomputation runs to the end of the function.
- The recomputed results and their gradients live until the nested backward ends.
- The detached inputs are leaves, so their gradients accumulate on them.

Source: torch, utils/checkpoint.py (`CheckpointFunction`), csrc/autograd/engine.cpp (a nested backward runs its own graph alone).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peftplan.tape.hosted import fetched, stored
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Log, Node, Outputs, Parameter, Tensor


class Leaf(Parameter):
    """A detached input that requires a gradient. Its gradient accumulates on it.

    `permuted`: its elements do not lie in the order of its dims, nor does its gradient then.
    """

    __slots__ = ("permuted",)

    def __init__(self, dims: Dims, dtype: str, *, permuted: bool = False) -> None:
        super().__init__("", dims, dtype, trainable=True)
        self.node = None  # a Parameter refers to itself: a cycle
        self.permuted = permuted

    def accumulate(self, tape: Log, grad: Tensor) -> None:
        """`AccumulateGrad`: takes over the gradient, since nothing else refers to it, or a copy that lies as the leaf does."""
        if grad.storage is not None and self.permuted != (grad.storage.number in tape.permuted):
            grad = tape.new(self.dims, self.dtype, "clone")
            if self.permuted and grad.storage is not None:
                tape.permuted.add(grad.storage.number)
        self.grad = grad.detach()


class Call(NamedTuple):
    """A checkpointed call, which the node keeps as its context."""

    function: Callable[..., Outputs]
    arguments: tuple[object, ...]
    """The arguments, with `TENSOR` in place of each saved tensor."""
    results: tuple[tuple[Dims, str], ...]
    """Dims and dtype of each result."""


def checkpoint(
    f: Tape, function: Callable[..., Outputs], *args: object, hosted: bool = False, buffer: Tensor | None = None
) -> Outputs:
    """`checkpoint(function, *args, use_reentrant=True)`: saves the tensors among the arguments.

    `hosted`: saves them in host memory. `buffer`: the tensor that the first of them is copied back into, in place of a new one.
    """
    tensors = tuple(x for x in args if type(x) is Tensor)
    node = f.record(_checkpoint_backward, tensors, *(stored(f, tensors, buffer) if hosted else tensors))
    with f.no_grad():
        out = function(*args)
    outputs = (out,) if isinstance(out, Tensor) else out
    if node is not None:
        others = tuple(TENSOR if type(x) is Tensor else x for x in args)
        node.context = Call(function, others, tuple((x.dims, x.dtype) for x in outputs))
    results = tuple(Tensor(x.storage, x.dims, x.dtype, node, index) for index, x in enumerate(outputs))
    return results[0] if isinstance(out, Tensor) else results


TENSOR = object()
"""Placeholder for a saved tensor among the arguments."""


def _leaf(f: Tape, x: Tensor) -> Leaf:
    return Leaf(x.dims, x.dtype, permuted=x.storage is not None and x.storage.number in f.permuted)


def _checkpoint_backward(f: Tape, node: Node, saved: Sequence[object], *grads_of_outputs: Tensor | None) -> Gradients:
    assert isinstance(node.context, Call)
    function, others, shapes = node.context
    grads = [*grads_of_outputs, *[None] * (len(shapes) - len(grads_of_outputs))]
    for index, (dims, dtype) in enumerate(shapes):  # `materialize_grads`
        grads[index] = grads[index] or f.new(dims, dtype, "zeros")
    saved = fetched(f, tuple(saved))
    detached = [Tensor(x.storage, x.dims, x.dtype, _leaf(f, x) if x.node else None) for x in saved if isinstance(x, Tensor)]
    waiting = iter(detached)
    inputs = tuple(next(waiting) if x is TENSOR else x for x in others)
    with f.recomputing():
        out = function(*inputs)
    outputs = (out,) if isinstance(out, Tensor) else out
    f.nested = True
    f.backward_from([(x, g) for x, g in zip(outputs, grads, strict=True) if x.node and g])
    f.nested = False
    if f.kept_inputs is not None:
        f.kept_inputs += [(x, x.node.grad) for x in detached if type(x.node) is Leaf]
    return tuple(x.node.grad if type(x.node) is Leaf else None for x in detached)

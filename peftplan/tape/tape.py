"""The tape that modeling code is written on: an autograd whose modules may have hooks, with autocast and `no_grad`.

Blocks are written as transformers writes them. Which operation saves what is in `tape.ops`.

Source: torch, aten/src/ATen/autocast_mode.cpp (the cache of casts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, overload

from peftplan.tape.autograd import Autograd
from peftplan.tape.tensors import Node, Operand, Parameter, Tensor

X = TypeVar("X")
Y = TypeVar("Y")


class Tape(Autograd):
    """The autograd of one step, and its log of allocations."""

    def __init__(self, *, autocast: str | None = None, several: bool = False) -> None:
        super().__init__(several=several)
        self.autocast = autocast
        self.linear_in_python = False
        """Whether DeepSpeed has replaced `torch.nn.functional.linear`."""
        self.runs_on_views = False
        """Whether weights are views of FSDP1's flat parameters, and so no leaves."""

    def call(
        self,
        name: str,
        layer: int | None,
        parameters: tuple[Parameter | None, ...],
        x: X,
        function: Callable[[X], Y],
        *,
        by_name: bool = False,
        reads: tuple[Parameter | None, ...] = (),
    ) -> Y:
        """Call a module on `x`: its own parameters, those of other modules that its forward reads, and whether it takes `x` as a
        keyword, decide what hooks on it do."""
        if self.modules is None:
            return function(x)
        own = tuple([p for p in parameters if p is not None])
        read = tuple([p for p in reads if p is not None]) if reads else ()
        return self.modules.call(name, layer, own, x, function, by_name=by_name, reads=read)

    @overload
    def cast(self, x: Tensor, dtype: str) -> Tensor: ...
    @overload
    def cast(self, x: Operand, dtype: str) -> Operand: ...
    @overload
    def cast(self, x: Operand | None, dtype: str) -> Operand | None: ...

    def cast(self, x: Operand | None, dtype: str) -> Operand | None:
        """Autocast's cast. The cast of an fp32 leaf that requires a gradient is cached until autocast ends."""
        if x is None or x.dtype == dtype or x.dtype not in ("fp32", "fp16", "bf16"):
            return x
        if x.dtype != "fp32" or not self._is_leaf(x):
            return self.to(x, dtype)
        leaf = x if type(x) is Parameter else _number(x)  # the cache does not keep the tensor alive
        if leaf not in self._casts:
            before, self.grad_enabled = self.grad_enabled, True  # later calls with gradients use this cast too
            self._casts[leaf] = self.to(x, dtype)
            self.grad_enabled = before
        return self._casts[leaf]

    @overload
    def cast_all(self, dtype: str, a: Tensor, b: Tensor, /) -> tuple[Tensor, Tensor]: ...
    @overload
    def cast_all(self, dtype: str, a: Operand, b: Operand, /) -> tuple[Operand, Operand]: ...
    @overload
    def cast_all(self, dtype: str, a: Tensor, b: Tensor, c: Tensor, /) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def cast_all(self, dtype: str, a: Tensor, b: Operand, c: Operand | None, /) -> tuple[Tensor, Operand, Operand | None]: ...
    @overload
    def cast_all(
        self, dtype: str, a: Operand, b: Operand | None, c: Operand | None, /
    ) -> tuple[Operand, Operand | None, Operand | None]: ...

    def cast_all(self, dtype: str, *values: Operand | None) -> tuple[Operand | None, ...]:
        """Autocast's casts of an operation's arguments, the last one first.

        `WrapFunction_` casts them within one call's argument list, which GCC evaluates from the right (torch, autocast_mode.h).
        """
        return (*reversed([self.cast(x, dtype) for x in reversed(values)]),)

    def _is_leaf(self, x: Operand) -> bool:
        if type(x) is Parameter:
            return x.trainable and not self.runs_on_views
        if isinstance(x.node, Parameter):
            return bool(x.node.dims == x.dims)  # a view of a leaf is not a leaf
        return x.storage is not None and (x.storage.number, x.dims) in self.leaves

    @overload
    def to(self, x: Tensor, dtype: str) -> Tensor: ...
    @overload
    def to(self, x: Operand, dtype: str) -> Operand: ...

    def to(self, x: Operand, dtype: str) -> Operand:
        """`x.to(dtype)`: x itself if it has this dtype, else a copy."""
        if x.dtype == dtype:
            return x
        return self.new(x.dims, dtype, "to", self.record(_to_backward, (x,)))

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Run operations without saving anything for backward."""
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    def end_autocast(self) -> None:
        """Clear autocast's cache of casts."""
        self._casts.clear()


def _number(x: Operand) -> int:
    assert x.storage is not None
    return x.storage.number


def _to_backward(tape: Tape, node: Node, saved: object, grad: Tensor) -> Tensor:
    return grad  # cast by `_apply`, as the engine does

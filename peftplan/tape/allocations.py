"""The log of what is allocated and freed, in order: tensors by number, with their names, dims and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peftplan.hardware.processors import A100, Processors
from peftplan.ledger import Category
from peftplan.tape.column_sums import column_dims
from peftplan.tape.tensors import Dims, Node, Parameter, Storage, Tensor

PASSED = "passed"
"""The mark where the host has waited for the GPU in a forward."""


class Allocations:
    """The log of one step. `log` holds the number of a storage where it is allocated, and its negative where it is freed."""

    def __init__(self) -> None:
        self.log: list[int] = []
        self.dims: list[Dims] = [()]
        self.dtypes: list[str] = ["uint8"]
        self.names: list[str] = [""]
        self.made_as: dict[int, str] = {}
        """Storage → the name of a tensor before it became the gradient of a parameter."""
        self.made_in: list[int] = [0]
        """Storage → the segment that allocated it, negative in backward. Storages count from 1."""
        self.freed: dict[int, int] = {}
        self.category: dict[int, Category] = {}
        self.counts: dict[int, int] = {}
        """Storage → how many equal tensors its number stands for, if more than one."""
        self.collected: set[int] = set()
        """Storages of the batches, where those of the step before live until these are on the device."""
        self.handed_on: set[int] = set()
        """Storages that live from before the optimizer's step to `PASSED` in the next one."""
        self.marks: list[tuple[int, str]] = []
        self.views: set[int] = set()
        """Storages of gradients that autograd's formulas return as views."""
        self.permuted: set[int] = set()
        """Storages of tensors whose elements do not lie in the order of their dims."""
        self.streams: dict[int, int] = {}
        """Storage → the CUDA stream that allocates it, if not the default one."""
        self.accumulated: Callable[[Parameter], None] | None = None
        """What is called when a parameter has its gradient: `register_post_accumulate_grad_hook`."""
        self.arrived: list[Parameter] = []
        """The parameter for which it is to be called."""
        self.reused: list[Tensor] = []
        """Tensors that the next operations give instead of new ones."""
        self.runs_on = A100
        """The multiprocessors by which kernels size their buffers."""
        self.asks_card = False
        """Whether a kernel has sized one: the step is then that of this card alone."""
        self.module = ""
        """The module whose code runs."""
        self.pinned: list[tuple[int, int, str]] = []
        """What the first step leaves for good: the place in the log before which it is made, its bytes, and its name."""
        self.sizes_read: Mapping[str, str] = {}
        """Named sizes in whose place others stand, while a model reads rows of another number or length."""
        self.segment = 1
        """The part of the step: negative in backward."""

    def new(self, dims: Dims, dtype: str, op: str, node: Node | None = None) -> Tensor:
        """Allocate a tensor of these dims. `node`: the autograd node that computes it; None if it requires no gradient."""
        if self.sizes_read:
            dims = tuple(self.sizes_read.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)
        if self.reused:
            return Tensor(self.reused.pop(0).storage, dims, dtype, node)
        number = len(self.dims)
        self.dims.append(dims)
        self.dtypes.append(dtype)
        self.names.append(f"{self.module} {op}" if self.module else op)
        self.made_in.append(self.segment)
        self.log.append(number)
        return Tensor(Storage(self, number), dims, dtype, node)

    def drop(self) -> None:
        """Free the log at once, not when Python next looks for cycles of references."""
        for each in (self.log, self.dims, self.dtypes, self.names, self.made_in, self.freed, self.made_as, self.marks):
            each.clear()

    @property
    def card(self) -> Processors:
        """The multiprocessors, for a kernel that sizes a buffer."""
        self.asks_card = True
        return self.runs_on

    def column_sum(self, source: Dims, dims: Dims, dtype: str) -> Tensor:
        """Allocate the sum of a tensor over its first dims; the kernel takes buffers where rows are many (`column_sums`)."""
        total = self.new(dims, dtype, "sum")
        buffers = [self.new((size,), "fp32", "partial sums") for size in column_dims(source, dims, self.runs_on)]
        self.asks_card = self.asks_card or bool(buffers)
        while buffers:
            buffers.pop()
        return total

    def alike(self, x: Tensor, dtype: str, op: str) -> Tensor:
        """Allocate the result of an operation on each element of x; its elements lie in the order of those of x."""
        out = self.new(x.dims, dtype, op)
        if self.is_permuted(x) and out.storage is not None:
            self.permuted.add(out.storage.number)
        return out

    def is_permuted(self, x: Tensor | None) -> bool:
        """Whether the elements of x do not lie in the order of its dims."""
        return x is not None and x.storage is not None and x.storage.number in self.permuted

    def many(self, dims: Dims, dtype: str, op: str, count: int) -> Tensor:
        """Allocate `count` equal tensors with one lifetime, under one number in the log."""
        tensor = self.new(dims, dtype, op)
        assert tensor.storage is not None
        self.counts[tensor.storage.number] = count
        return tensor

    def view_of(self, tensor: Tensor) -> Tensor:
        """Mark a gradient as a view. A view refers to its base, so autograd never adds to it in place."""
        if tensor.storage is not None:
            self.views.add(tensor.storage.number)
        return tensor

    def sum_into(self, grads: list[Tensor | None], index: int, grad: Tensor) -> None:
        """Add `grad` to the gradient at `index`: in place if nothing else refers to that tensor, else into a new one.

        To find out, drop the reference: if that frees the tensor, undo the free and add in place. Source: torch,
        csrc/autograd/input_buffer.cpp (`can_accumulate_inplace`).
        """
        before = grads[index]
        if before is None:
            grads[index] = grad
            return
        number = None if before.storage is None else before.storage.number
        if number is not None and number not in self.views:
            grads[index] = before = None
            if self.log[-1] == -number:
                self.log.pop()
                del self.freed[number]
                grads[index] = Tensor(Storage(self, number), grad.dims, grad.dtype)
                return
        grads[index] = total = self.new(grad.dims, grad.dtype, "add")
        if number in self.permuted and total.storage is not None:
            self.permuted.add(total.storage.number)

    def mark(self, what: str) -> None:
        """Mark this position in the log, such as the start of a phase or the end of a layer."""
        self.marks.append((len(self.log), what))

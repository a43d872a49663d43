"""The operands of a tape: weights, tensors with names, dims and a dtype but no values, and the nodes of the autograd graph.

Source: torch, csrc/autograd/functions/accumulate_grad.h, input_buffer.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, Union

from peftplan.ledger import Category, Dim

Dims = tuple[Dim, ...]
Gradients: TypeAlias = Union["Tensor", Sequence["Tensor | None"]]
"""What a backward function returns: the gradient of each input, in the order in which `Tape.record` got them."""
Backward = Callable[..., Gradients]
"""A function of the tape, the node, what the node saved, and the gradient of each result."""
Edge: TypeAlias = tuple[Union["Node", "Parameter"], int, str]
"""Where the gradient of an input goes: the node that computed the input, the index of that result, and its dtype."""


class Operand(Protocol):
    """What the operations of a tape take: a tensor, or a weight."""

    @property
    def dims(self) -> Dims:
        """Its sizes, whole numbers or names."""

    @property
    def dtype(self) -> str:
        """A name of `dtypes.ITEMSIZE`."""

    @property
    def node(self) -> Node | Parameter | None:
        """Where its gradient goes; None if no gradient flows."""

    @property
    def storage(self) -> Storage | None:
        """The allocation that holds its bytes; None for a weight, which the ledger of parameters counts."""

    @property
    def index(self) -> int:
        """Which result of its node it is."""


Outputs: TypeAlias = Union["Tensor", tuple["Tensor", ...]]
"""What a layer returns: its hidden states, or these and more."""


class Log(Protocol):
    """The part of a tape that storages and nodes use."""

    log: list[int]
    freed: dict[int, int]
    segment: int
    names: list[str]
    made_as: dict[int, str]
    category: dict[int, Category]
    accumulated: Callable[[Parameter], None] | None
    arrived: list[Parameter]
    permuted: set[int]

    def new(self, dims: Dims, dtype: str, op: str) -> Tensor:
        """Allocate a tensor."""

    def sum_into(self, grads: list[Tensor | None], index: int, grad: Tensor) -> None:
        """Add `grad` to the gradient at `index`."""


class Storage:
    """One allocation, freed when the last reference to it goes. `base`: another one that lives as long."""

    __slots__ = ("base", "number", "tape")
    base: Storage | None

    def __init__(self, tape: Log, number: int) -> None:
        self.tape = tape
        self.number = number

    def __del__(self) -> None:
        tape = self.tape
        tape.log.append(-self.number)
        tape.freed[self.number] = tape.segment


class Tensor:
    """A view of a storage with dims and a dtype. `node`: the autograd node that computed it; None if it requires no gradient."""

    __slots__ = ("dims", "dtype", "index", "node", "storage")

    def __init__(
        self, storage: Storage | None, dims: Dims, dtype: str, node: Node | Parameter | None = None, index: int = 0
    ) -> None:
        self.storage = storage
        self.dims = dims
        self.dtype = dtype
        self.node = node
        self.index = index

    def view(self, dims: Dims) -> Tensor:
        """The same storage with other dims. No node is added: its gradient goes to the same one."""
        return Tensor(self.storage, dims, self.dtype, self.node, self.index)

    def detach(self) -> Tensor:
        """The same storage without a gradient."""
        return Tensor(self.storage, self.dims, self.dtype)


class Strided(Tensor):
    """A slice of the last tokens of several sequences, whose rows are not contiguous."""

    __slots__ = ()

    @property
    def rows_are_a_view(self) -> bool:
        """Whether `reshape` makes rows of it without a copy: one token of each sequence is one stride from the next."""
        return self.dims[-2] == 1


class Broadcast(Tensor):
    """The gradient of a broadcast input before the engine sums it; `dims` are those of the input, `source` its own."""

    __slots__ = ("source",)

    def __init__(self, grad: Tensor, dims: Dims) -> None:
        super().__init__(grad.storage, dims, grad.dtype)
        self.source = grad.dims


class Node:
    """One operation in the graph: what it saved, and where its gradients go."""

    __slots__ = (
        *(
            "at_once",
            "backward",
            "checkpointed",
            "context",
            "device",
            "edges",
            "folds",
            "grads",
            "in_python",
            "module",
            "releases",
            "saved",
        ),
        "sequence",
    )

    def __init__(
        self, sequence: tuple[int, int], module: str, backward: Backward, edges: tuple[Edge | None, ...], *, checkpointed: bool
    ) -> None:
        self.sequence = sequence
        """Its place in autograd's order: the number of the node that it stands directly behind, and among such ones its own."""
        self.module = module
        self.backward = backward
        self.edges = edges
        self.checkpointed = checkpointed
        self.in_python = False
        """Whether it is an `autograd.Function`. One releases its incoming gradients before the engine casts what it returns."""
        self.releases = False
        """Whether its backward gets the list of its gradients, which it empties where it needs them no longer."""
        self.at_once = False
        """Whether it runs as soon as it has a gradient: a leaf of one use, whose `AccumulateGrad` comes before all that wait."""
        self.folds = False
        """Whether it computes on rows: a `view` makes one matrix of all sequences before it."""
        self.device = 0
        """The GPU that it runs on."""
        self.context: object = None
        """What an `autograd.Function` keeps outside `save_for_backward`. Checkpointing does not free it."""
        self.saved: Sequence[object] = ()
        self.grads: list[Tensor | None] = [None]

    def receive(self, tape: Log, index: int, grad: Tensor) -> None:
        """`InputBuffer`: several gradients of one output are summed."""
        while len(self.grads) <= index:
            self.grads.append(None)
        tape.sum_into(self.grads, index, grad)

    def settle(self, tape: Log) -> None:
        """A node waits: the engine runs it in its turn."""


class Parameter:
    """A weight. The ledger of parameters counts its bytes; as an autograd node it accumulates its gradient.

    `counts`: it waits for the gradients of all its uses before it accumulates them.
    """

    counts = True
    __slots__ = ("buffered", "dims", "dtype", "grad", "layer", "name", "node", "trainable", "uses")
    storage: None = None
    index = 0

    def __init__(self, name: str, dims: Dims, dtype: str, *, trainable: bool, layer: int | None = None) -> None:
        self.name = name
        self.layer = layer
        self.dims = dims
        self.dtype = dtype
        self.trainable = trainable
        self.grad: Tensor | None = None
        self.node: Parameter | None = self if trainable else None
        self.uses = 1
        """How many gradients are still to come in this backward pass. A tied weight starts at two."""
        self.buffered: list[Tensor | None] = [None]

    def receive(self, tape: Log, index: int, grad: Tensor | None) -> None:
        """Gradients of all uses are summed first (`InputBuffer`)."""
        if grad is not None:
            tape.sum_into(self.buffered, 0, grad)
        self.uses -= 1

    def settle(self, tape: Log) -> None:
        """Accumulate the sum, once the last gradient is in it and gone."""
        grad = self.buffered[0]
        if self.uses <= 0 and grad is not None:
            self.buffered[0] = None
            self.accumulate(tape, grad)

    def accumulate(self, tape: Log, grad: Tensor) -> None:
        """`AccumulateGrad`: takes over the first gradient, and adds those of later passes to it in place."""
        if self.grad is None:
            self.grad = grad.detach() if grad.storage else tape.new(self.dims, self.dtype, "clone")
            number = self.grad.storage.number  # type: ignore[union-attr]
            tape.category[number] = "gradients"
            tape.made_as[number] = tape.names[number]
            tape.names[number] = f"{self.name}.grad"
        if tape.accumulated is not None:
            tape.arrived.append(self)

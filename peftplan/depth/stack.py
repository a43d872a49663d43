"""Run a stack of layers on the tape: a few layers run, the others are copies in the log; all may read one tensor from outside.

Of six equal layers two run; `copies` puts the others where the mark of the last layer is:

    forward     layer 0 | 4 copies of layer 5 | layer 5
    backward    layer 5 | 4 copies of layer 5 | layer 0
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from peftplan.depth.copies import Stack
from peftplan.depth.sections import paired, placed
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Log, Node, Operand, Outputs, Parameter, Tensor

if TYPE_CHECKING:
    from peftplan.depth.skipped import Skipped


class Runner(Protocol):
    """What a stack uses of the model whose layers it runs (`memory.model.Model`)."""

    tape: Tape
    stacks: list[Stack]
    on_host: list[tuple[Dims, str, int]]
    micro_batch: int
    pass_name: str
    """Tells the forwards of a step apart, each of which has its own stacks."""

    @property
    def hosted(self) -> bool:
        """Whether the inputs of checkpointed layers wait on the host."""

    @property
    def keeps_last(self) -> bool:
        """Whether that of the last one stays on the card all the same."""

    @property
    def last_apart(self) -> bool:
        """Whether the last layer is run beside the others of its kind, since its backward differs."""

    @property
    def every_layer(self) -> bool:
        """Whether each layer is run, since no two are alike."""

    def leaving_out(self, stack: str, layers: int) -> Skipped | None:
        """The stack, if layers between the first and the last ones are left out though none is a copy of another."""

    def arrive(self, layer: int, x: Tensor) -> Tensor:
        """What a layer, or its checkpoint, is called with: the hidden states on the layer's GPU."""

    @property
    def hooks_outside(self) -> bool:
        """Whether a checkpoint lies between the hooks of a layer, which then run once."""

    def call_layer(self, stack: str, layer: int, call: Callable[..., Outputs], x: Tensor, *others: object) -> Outputs:
        """Call a layer of a stack on the hidden states and what else it takes."""

    def call_forward(self, layer: int, call: Callable[..., Outputs], x: Tensor, *others: object) -> Outputs:
        """The same without its hooks."""

    def reached(self, stack: str, layers: int) -> tuple[bool, ...]:
        """Whether checkpointing reaches each layer of a stack."""

    def checkpoint(self, function: Callable[..., Outputs], *args: object, stays: bool = False) -> Outputs:
        """Call a checkpointed layer. `stays`: its input does not go to the host."""


class SharedNode(Node):
    """What every layer of a stack reads: its gradient is one sum, which no further layer makes anew."""

    __slots__ = ("sums",)
    sums: set[int]

    def receive(self, tape: Log, index: int, grad: Tensor) -> None:
        """Numbers the storages that hold the sum, one after the other."""
        super().receive(tape, index, grad)
        storage = self.grads[index].storage  # type: ignore[union-attr]
        if storage is not None:
            self.sums.add(storage.number)


class SharedLeaf(Parameter):
    """A tensor that asks for a gradient though nothing trains it, and that every layer of a stack reads."""

    __slots__ = ("source", "sums")
    counts = False
    source: Tensor
    sums: set[int]

    def accumulate(self, tape: Log, grad: Tensor) -> None:
        """The first gradient stays until others come: all are summed before it accumulates (`InputBuffer`)."""
        if self.grad is None:
            super().accumulate(tape, grad)
        else:
            total: list[Tensor | None] = [self.grad]
            self.grad = None
            tape.sum_into(total, 0, grad)
            self.grad = total.pop()
        number = self.grad.storage.number  # type: ignore[union-attr]
        tape.category.pop(number, None)
        self.sums.add(number)


def shared(f: Tape, x: Operand, sums: set[int]) -> Tensor:
    """A tensor from outside a stack that all its layers read; `sums` will hold the storages of its gradient."""
    node = f.record(_pass_backward, (x,))
    if node is None:
        return Tensor(x.storage, x.dims, x.dtype)
    own = SharedNode(node.sequence, node.module, node.backward, node.edges, checkpointed=node.checkpointed)
    own.sums = sums
    return Tensor(x.storage, x.dims, x.dtype, own)


def _pass_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g


def run_stack(
    model: Runner,
    kinds: tuple[int, ...],
    states: Tensor | list[Tensor],
    call: Callable[..., Outputs],
    *,
    name: str,
    checkpointed: bool,
    sums: set[int] | None = None,
    holds: bool = False,
    own: Callable[[int], tuple[object, ...]] | None = None,
    every: tuple[object, ...] | Callable[[], tuple[object, ...]] = (),
    outputs: list[Tensor] | None = None,
    behind: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Run the first and the last layer of each kind; `kinds[l]` is the kind of layer l.

    `states`: the first layer's input; a list is emptied, so that only the layers hold it (in Python 3.10 a caller holds what it
    passes). The layers between them become copies of the last of their kind (`depth.copies`). `sums`: the gradients of what all
    layers read (`shared`). `holds`: the caller keeps what every layer returns until the forward ends. `own`: further arguments of
    a layer, which it holds alone, by their names. `every`: further arguments of all layers, by position. `outputs`: holds what
    layers return besides the hidden states until the next one returns. `behind`: what the model does
    with a layer's output, outside its checkpoint.
    """
    f, x = model.tape, states.pop() if isinstance(states, list) else states
    del states
    alike = kinds
    if model.every_layer:
        kinds = tuple(range(len(kinds)))
    last = len(kinds) - 1
    if model.last_apart or (checkpointed and model.keeps_last):
        kinds = (*kinds[:-1], max(kinds) + 1)
    flags = model.reached(name, len(kinds)) if checkpointed else (False,) * len(kinds)
    of_units = name
    name = f"{name}/{model.micro_batch}" if model.micro_batch else name
    name += model.pass_name
    mixed = len(set(flags)) > 1
    if mixed and outputs is not None:  # how long they live is the next layer's matter too: each is run
        kinds = tuple(range(len(kinds)))
    sections, extra = placed(paired(kinds, flags), summing=sums is not None, mixed=mixed)
    plain = not mixed and sums is None and outputs is None and behind is None and len(set(alike)) == 1
    skipped = model.leaving_out(name, len(kinds)) if plain else None
    if skipped is not None:
        sections = [*skipped.layers]
    copies = {f"{name} {n}": {f"{name} {place}": layers for place, layers in by_place.items()} for n, by_place in extra.items()}

    def run(layer: int, of_layer: tuple[object, ...], x: Tensor, *every: object) -> Outputs:
        return model.call_layer(of_units, layer, call, x, *of_layer, *every)

    def forward(layer: int, of_layer: tuple[object, ...], x: Tensor, *every: object) -> Outputs:
        return model.call_forward(layer, call, x, *of_layer, *every)

    def recomputed(of_layer: tuple[object, ...], stays: bool, layer: int, x: Tensor, *every: object) -> Outputs:
        return model.checkpoint(forward, layer, of_layer, x, *every, stays=stays)

    stack = Stack(name, copies, set(), set() if sums is None else sums, holds)
    model.stacks.append(stack)
    for number, layer in enumerate(sections):
        x = boundary(f, x, f"{name} {number}") if skipped is None else skipped.passes(f, x, layer)
        arrived = model.arrive(layer, x)
        of_layer = own(layer) if own else ()
        beside = every() if callable(every) else every
        stays = model.keeps_last and layer == last
        if flags[layer] and model.hosted and not stays and not model.micro_batch:
            count = 1 + sum(map(len, extra.get(number, {}).values()))
            count += len(skipped.missing) if skipped is not None and layer == skipped.low else 0
            model.on_host += [(y.dims, y.dtype, count) for y in (x, *beside) if type(y) is Tensor]
        if flags[layer] and model.hooks_outside:
            result = model.call_layer(of_units, layer, partial(recomputed, of_layer, stays), arrived, *beside)
        elif flags[layer]:
            result = model.checkpoint(run, layer, of_layer, arrived, *beside, stays=stays)
        else:
            result = run(layer, of_layer, arrived, *beside)
        x = result if isinstance(result, Tensor) else result[0]
        if outputs is not None and not isinstance(result, Tensor):
            outputs[:] = result[1:]
        del result, arrived, beside
        if behind is not None:
            x = behind(layer, x)
        if x.storage is not None:
            stack.passed.add(x.storage.number)
    return boundary(f, x, f"{name} end") if skipped is None else skipped.passes(f, x, len(kinds))


def boundary(f: Tape, x: Tensor, what: str) -> Tensor:
    """A mark in the log where forward passes, and another where the gradient does."""
    f.mark(what)
    return Tensor(x.storage, x.dims, x.dtype, f.record(_boundary_backward, (x,), what))


def _boundary_backward(f: Tape, node: Node, saved: tuple[str], g: Tensor) -> Tensor:
    f.mark(saved[0])
    return g

"""A stack of layers: a few of them run, the others are copies in the log, and all may read one tensor from outside."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise

from peftplan.depth.copies import Stack
from peftplan.depth.periods import checkpointed_layers, paired, sections_of_periods
from peftplan.memory import units
from peftplan.memory.model import Model
from peftplan.memory.parts import Outputs
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Log, Node, Parameter, Tensor


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
        """The first gradient stays; later ones are added in place."""
        super().accumulate(tape, grad)
        number = self.grad.storage.number  # type: ignore[union-attr]
        tape.category.pop(number, None)
        self.sums.add(number)


def shared(f: Tape, x: Tensor, sums: set[int]) -> Tensor:
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
    model: Model,
    kinds: tuple[int, ...],
    x: Tensor,
    call: Callable[..., Outputs],
    *,
    name: str,
    checkpointed: bool,
    sums: set[int] | None = None,
    holds: bool = False,
    own: Callable[[int], tuple[object, ...]] | None = None,
    every: tuple[object, ...] | Callable[[], tuple[object, ...]] = (),
    outputs: list[Tensor] | None = None,
) -> Tensor:
    """Run the first layer of each kind, then the last of each; `kinds[l]` is the kind of layer l.

    The layers between them become copies of the last of their kind (`depth.copies`). `sums`: the gradients of what all
    layers read (`shared`). `holds`: the caller keeps what every layer returns until the forward ends. `own`: further arguments of
    a layer, which it holds alone, by their names. `every`: further arguments of all layers, by position. `outputs`: holds what
    layers return besides the hidden states until the next one returns.
    """
    f = model.tape
    if model.units.every_layer:
        kinds = tuple(range(len(kinds)))
    flags = reached(model, name, len(kinds)) if checkpointed else (False,) * len(kinds)
    name = f"{name}/{model.micro_batch}" if model.micro_batch else name
    mixed = len(set(flags)) > 1
    if mixed and outputs is not None:  # how long they live is the next layer's matter too: each is run
        kinds = tuple(range(len(kinds)))
    sections, extra, at = _placed(paired(kinds, flags), summing=sums is not None, mixed=mixed)
    copies = {f"{name} {number}": layers for number, layers in extra.items()}
    places = {f"{name} {number}": f"{name} {place}" for number, place in at.items()}

    def run(layer: int, of_layer: tuple[object, ...], x: Tensor, *every: object) -> Outputs:
        try:
            if not model.units.every_layer:
                return call(layer, x, *of_layer, *every)
            out = call(layer, model.units.enter_with(units.layer(layer), x), *of_layer, *every)
            hidden, *others = out if isinstance(out, tuple) else (out,)
            hidden = model.units.leave(units.layer(layer), hidden)
            return (hidden, *others) if others else hidden
        finally:
            model.layer_locals.clear()

    stack = Stack(name, places, copies, set(), set() if sums is None else sums, holds)
    model.stacks.append(stack)
    for number, layer in enumerate(sections):
        x = boundary(f, x, f"{name} {number}")
        of_layer = own(layer) if own else ()
        beside = every() if callable(every) else every
        if flags[layer] and model.running.hosted and not model.micro_batch:
            model.on_host += [(y.dims, y.dtype, 1 + len(extra.get(number, ()))) for y in (x, *beside) if type(y) is Tensor]
        result = model.checkpoint(run, layer, of_layer, x, *beside) if flags[layer] else run(layer, of_layer, x, *beside)
        x = result if isinstance(result, Tensor) else result[0]
        if outputs is not None and not isinstance(result, Tensor):
            outputs[:] = result[1:]
        del result, beside
        if x.storage is not None:
            stack.passed.add(x.storage.number)
    return boundary(f, x, f"{name} end")


def reached(model: Model, stack: str, layers: int) -> tuple[bool, ...]:
    """Whether checkpointing reaches each layer of a stack."""
    before = sum(len(block.layers) for block in model.arch.blocks if block.stack == "encoder") if stack == "decoder" else 0
    return checkpointed_layers(layers, before=before, every=model.running.every_n_layers)


def _placed(kinds: tuple[int, ...], *, summing: bool, mixed: bool) -> tuple[list[int], dict[int, list[int]], dict[int, int]]:
    """The layers that run; section → the layers that are copies of it; section → the section before which they go."""
    in_runs = _in_runs(kinds)
    if mixed and not in_runs:
        return sections_of_periods(kinds, summing=summing)
    sections, copies = sections_of(kinds, summing=summing)
    return sections, copies, {section: section if in_runs else len(set(kinds)) for section in copies}


def sections_of(kinds: tuple[int, ...], *, summing: bool = False) -> tuple[list[int], dict[int, list[int]]]:
    """The layers that run, first of each kind and then last of each; section → the layers that are copies of it.

    In the order of the layers where those of a kind follow each other. `summing`: the layer before the last as well, where all
    add to one gradient.
    """
    first = {kind: layer for layer, kind in reversed([*enumerate(kinds)])}
    last = {kind: layer for layer, kind in enumerate(kinds) if layer != first[kind]}
    before = _second_last(kinds, first, last) if summing else {}
    sections = [*sorted(first.values()), *sorted(before.values()), *sorted(last.values())]
    if _in_runs(kinds):
        sections.sort()
    copied = [layer for layer in range(len(kinds)) if layer not in sections]
    return sections, {
        sections.index(before.get(kind, layer)): [n for n in copied if kinds[n] == kind] for kind, layer in last.items()
    }


def _in_runs(kinds: tuple[int, ...]) -> bool:
    """Whether all layers of a kind follow each other."""
    return 1 + sum(a != b for a, b in pairwise(kinds)) == len(set(kinds))


def _second_last(kinds: tuple[int, ...], first: dict[int, int], last: dict[int, int]) -> dict[int, int]:
    """The layer before the last of each kind: in backward the first that adds to a sum, above everything still kept."""
    layers_of_kind: dict[int, int] = {}
    for layer, kind in enumerate(kinds):
        if kind in last and first[kind] < layer < last[kind]:
            layers_of_kind[kind] = layer
    return layers_of_kind


def boundary(f: Tape, x: Tensor, what: str) -> Tensor:
    """A mark in the log where forward passes, and another where the gradient does."""
    f.mark(what)
    return Tensor(x.storage, x.dims, x.dtype, f.record(_boundary_backward, (x,), what))


def _boundary_backward(f: Tape, node: Node, saved: tuple[str], g: Tensor) -> Tensor:
    f.mark(saved[0])
    return g


def kinds_of(model: Model, stack: str = "decoder") -> tuple[int, ...]:
    """The kind of each layer of a stack: its block, and which tensors it has that other layers lack."""
    block_of = {layer: index for index, b in enumerate(model.arch.blocks) if b.stack == stack for layer in b.layers}
    every = len(block_of)
    partial = [p.layers for p in model.parameters.all if p.layers is not None and len(p.layers) < every]
    if any(_interleaved(layers, every) for layers in partial):
        return tuple(range(every))
    seen: dict[tuple[int, ...], int] = {}
    return tuple(
        seen.setdefault((block_of[layer], *(layer in layers for layers in partial)), len(seen)) for layer in sorted(block_of)
    )


def _interleaved(layers: Collection[int], every: int) -> bool:
    """Whether layers with and without a tensor alternate, so that no layer can be a copy of a distant one."""
    return sum((layer in layers) != (layer - 1 in layers) for layer in range(1, every)) > 1

"""A mixer between its projections, as its code was recorded: a list of allocations in place of operations.

A record holds for one class of a modeling file; its sizes are products of named ones, so that it serves all widths, lengths and
batches. `4bclgrp` allocates numbers of 4 bytes, as many as the product of the sizes called b, c, l, g, r and p; `-3` ends the
third allocation, `-x` and `-g` the input and the gradient, as far as the mixer holds them; `!` stands where the last projection
is called, while the mixer's names still hold what ends behind it. `checkpointed` is a forward whose saved tensors are dropped,
`training` one that keeps them, `backward` follows that. Source: `data/recorded_functions`, made from the code of
transformers by `tools/recorded_functions.py`. Left out: lengths that are no multiple of a chunk take as much as the next one that
is, and a copy of the result's gradient less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple, TypedDict

from peftplan.arch.blocks import StateSpace
from peftplan.arrays import Derived, Size
from peftplan.datafiles import load
from peftplan.errors import NeedsTraceError
from peftplan.ledger import Dim
from peftplan.memory.models.style import Call
from peftplan.memory.state_space import Chunks
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Parameter, Tensor

FOLDER = "recorded_functions"
DTYPE_OF = {"1": "bool", "2": "bf16", "4": "fp32", "8": "int64"}
"""The first letter of an event → a dtype of so many bytes."""
ENDS, CALLS = "-", "!"
PROJECTIONS = ("in_proj.", "out_proj.")


class Variant(TypedDict, total=False):
    """A record of one set of dtypes: events, and which allocations are the result and gradients."""

    checkpointed: str
    checkpointed_output: int
    training: str
    training_output: int
    backward: str
    to_input: int
    gradients: dict[str, int]


class OneMore(Derived):
    """One more than another size."""

    of: Derived

    def __new__(cls, of: Derived) -> OneMore:
        """The size called by what it counts."""
        self = super().__new__(cls, f"{of}+1")
        self.of = of
        return self

    def __getnewargs__(self) -> tuple[Derived]:
        """What a copy is made of."""
        return (self.of,)

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """Their number at these sizes, which may be arrays as well as integers."""
        return self.of.at(sizes) + 1


class InChunks(Derived):
    """The tokens of a sequence whose last chunk is whole, and a number more."""

    of: Chunks
    more: int

    def __new__(cls, of: Chunks, more: int) -> InChunks:
        """The size called by what it counts."""
        self = super().__new__(cls, f"{of}·{of.tokens}+{more}")
        self.of, self.more = of, more
        return self

    def __getnewargs__(self) -> tuple[Chunks, int]:  # type: ignore[override]
        """What a copy is made of."""
        return self.of, self.more

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """Their number at these sizes, which may be arrays as well as integers."""
        return self.of.at(sizes) * self.of.tokens + self.more


class Kept(NamedTuple):
    """What a forward leaves for backward: the record, its sizes, names of what it keeps, and those tensors where no checkpoint
    keeps them, what trains, and dims and dtype of the input."""

    variant: Variant
    named: Mapping[str, Dim]
    names: tuple[str, ...]
    tensors: dict[str, Tensor]
    trained: list[tuple[str, Parameter]]
    dims: Dims
    dtype: str


def named_sizes(c: Call, space: StateSpace, projected: Dim, taps: int) -> dict[str, Dim]:
    """The letters of a mixer's record → its sizes."""
    chunks = Chunks(c.model.seq, space.chunk_size)
    return {
        "b": "b",
        "c": chunks,
        "l": space.chunk_size,
        "g": space.groups,
        "r": space.num_heads // space.groups,
        "p": space.head_dim,
        "n": space.state_size,
        "x": space.channels,
        "z": projected,
        "C": OneMore(chunks),
        "S": InChunks(chunks, taps - 1),
        "k": taps,
    }


def mixer(c: Call, name: str, x: Tensor, *, dtype: str) -> Tensor:
    """The mixer `name` of a layer from its projection on, which nothing else may hold, through the last one.

    `dtype`: that of the hidden states. Raises NeedsTraceError for dtypes that were not recorded.
    """
    f, space, taps = c.at(name), c.block.state_space, c.model.part(f"{c.style.stack}.{name}.conv1d", c.number).own_weight
    assert space is not None
    parameters = dict(_parameters(c, name))
    trained = [(part, p) for part, p in parameters.items() if p.trainable]
    release = f"-{c.model.running.scan}" if c.model.running.scan else ""
    dtypes = {p.dtype for part, p in parameters.items() if not (part == "norm.weight" and p.dtype == dtype == "bf16")}
    normed = c.model.arch.model_type == "falcon_h1" and "norm.weight" in parameters  # that of others always is
    chunks = "-one-chunk" if c.model.length(c.model.seq) == space.chunk_size else ""
    record = f"{c.model.arch.model_type}{'-1' if space.groups == 1 else ''}{'-normed' if normed else ''}{chunks}{release}"
    if f.offloaded is not None or len(dtypes) > 1 or (trained and len(trained) < len(parameters)):
        raise NeedsTraceError(f"a mixer of model type {c.model.arch.model_type} with weights of more than one kind")
    rows = "several" if f.several else "one"
    kind = (dtype, x.dtype, dtypes.pop(), f.autocast or "none", "trains" if trained else "frozen", rows)
    variant = _variants(record).get("/".join(kind))
    if variant is None or (trained and not {part for part, _ in trained} <= variant["gradients"].keys()):
        raise NeedsTraceError(f"a mixer of model type {c.model.arch.model_type} with these dtypes or weights")
    width = taps.dims[-1]
    assert isinstance(width, int)
    named = named_sizes(c, space, x.dims[-1], width)
    node = f.record(_mixer_backward, (x, *(p for _, p in trained)))
    first = node is not None and node.checkpointed and not f.replays  # what it keeps is made again
    keeps = node is not None and not first
    events, _, after = variant["training" if keeps else "checkpointed"].partition(CALLS)
    tensors: dict[str, Tensor] = {}
    _run(f, events, tensors, named)
    output = str(variant["training_output" if keeps else "checkpointed_output"])
    names = _saved(record, variant["training"], variant["backward"])
    out = tensors[output] if output in names else tensors.pop(output)
    result = Tensor(out.storage, (*x.dims[:-1], space.width), out.dtype, node)
    del out
    if node is not None:
        node.releases = True
        node.context = Kept(variant, named, names, tensors if keeps and not node.checkpointed else {}, trained, x.dims, x.dtype)
        if first:
            f.keep(node, *(Tensor(None, (), dtype) for _ in names))
        elif node.checkpointed or f.replays:
            f.keep(node, *(x.detach() if name == "x" else tensors[name] for name in names))
        elif "x" in names:
            tensors["x"] = x.detach()
    result = c.linear(f"{name}.out_proj", result)
    _run(f, after, tensors, named)
    if node is None or first or f.replays:
        tensors.clear()
    return result


def _parameters(c: Call, name: str) -> Iterator[tuple[str, Parameter]]:
    """The mixer's own parameters, by the names that the record has for them."""
    prefix = f"{c.style.stack}.{name}."
    for family in c.model.parameters.all:
        part = family.name.removeprefix(prefix)
        own = part != family.name and not part.startswith(PROJECTIONS)
        if own and family.layers is not None and c.number in family.layers:
            yield part, c.model.parameter(family, c.number)


@cache
def _variants(record: str) -> dict[str, Variant]:
    return load(f"{FOLDER}/{record}.json", dict[str, Variant])


@cache
def _saved(record: str, training: str, backward: str) -> tuple[str, ...]:
    """What backward finds: allocations of forward by number, and `x`."""
    ended = {event[1:] for event in training.split() if event.startswith(ENDS)}
    num_allocations = sum(not event.startswith((ENDS, CALLS)) for event in training.split())
    before = {"x", *map(str, range(1, num_allocations + 1))} - ended
    return tuple(event[1:] for event in backward.split() if event.startswith(ENDS) and event[1:] in before)


def _run(f: Tape, events: str, tensors: dict[str, Tensor], named: Mapping[str, Dim], num_before: int = 0) -> None:
    """Allocate and free. `num_before`: how many allocations came before."""
    number = num_before
    for event in events.split():
        if event.startswith(ENDS):
            tensors.pop(event[1:], None)
            continue
        number += 1
        dims = tuple(named[letter] for letter in event[1:])
        tensors[str(number)] = f.new(dims, DTYPE_OF[event[0]], "of the mixer")


def _mixer_backward(f: Tape, node: Node, saved: list[Tensor] | tuple[()], grads: list[Tensor]) -> Gradients:
    kept = node.context
    assert isinstance(kept, Kept)
    node.context = None
    tensors = kept.tensors or dict(zip(kept.names, saved, strict=True))
    if isinstance(saved, list):
        saved.clear()
    tensors["g"] = grads.pop()
    num_allocations = sum(not event.startswith((ENDS, CALLS)) for event in kept.variant["training"].split())
    _run(f, kept.variant["backward"], tensors, kept.named, num_allocations)
    to_input = tensors.pop(str(kept.variant["to_input"]))
    gradients = [tensors.pop(str(kept.variant["gradients"][name])) for name, _ in kept.trained]
    both = zip(gradients, kept.trained, strict=True)
    return [Tensor(to_input.storage, kept.dims, kept.dtype), *(Tensor(g.storage, p.dims, p.dtype) for g, (_, p) in both)]

"""A layer that allocates what was recorded of one (`job.compiled_layers`): a list of events in place of the layer's code.

Source: unsloth 2026.10.9, models/_block_compile.py (`_wrap`). Left out: the indices of attention's blocks, below 0.3 MB for 8,192
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from peftplan.arch.modules import Architecture
from peftplan.arch.text_part import is_in_text_part
from peftplan.arrays import Derived, Size, larger
from peftplan.dtypes import ITEMSIZE
from peftplan.errors import NoEngineError
from peftplan.job.compiled_layers import Recorded
from peftplan.ledger import Dim
from peftplan.memory.fused_attention import FLASH_BLOCK, MASK_MULTIPLE
from peftplan.memory.models.style import Call
from peftplan.memory.timed import FLUSHED_BYTES
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Parameter, Tensor

CHUNK = 256
"""Tokens of a chunk of Mamba 2, of which a row has whole ones."""
TOKENS: dict[str, Dims] = {
    "": (),
    "t": ("b", "s"),
    **{f"t%{multiple}": (f"b·s%{multiple}",) for multiple in (32, FLASH_BLOCK)},
    **{f"r%{multiple}": ("b", f"s%{multiple}") for multiple in (FLASH_BLOCK, CHUNK)},
    "q": ("b·s", f"b·s>{MASK_MULTIPLE}"),
    "a": ("b·s", f"b·s%{MASK_MULTIPLE}"),
    "p": ("b", "s", "s"),
    "m": ("b", "s", f"s>{MASK_MULTIPLE}"),
}
"""What stands behind a size in the record → the dims that it is multiplied by."""
UNTIMED: Mapping[int, Dims | None] = MappingProxyType({})
LAST_PASS = "/1"
INDICES = 4
"""Matrices of a mask of blocks: kv_indices, full_kv_indices, q_indices, full_q_indices."""
SIZE = re.compile(r"(\d+)(.*)")
Tensors = dict[int, Tensor]
"""The number of an allocation in the record → its tensor."""


class AtLeast(Derived):
    """The tokens of a batch, but so many at least."""

    fewest: int

    def __new__(cls, fewest: int) -> AtLeast:
        """Named by the number."""
        named = super().__new__(cls, f"b·s^{fewest}")
        named.fewest = fewest
        return named

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The larger of both."""
        return larger(sizes["b·s"], self.fewest)


class LayerState(NamedTuple):
    """What a layer's forward leaves for its backward: the events of backward, and the tensors that are alive.

    `num_before`: the allocations of forward. `trained`: what gets a gradient. `tuned`: after which allocations kernels are timed.
    `kept`: the layer's input, where no checkpoint holds it. `handed_on`: the model's list of what layers hand on.
    """

    events: list[str]
    tensors: Tensors
    num_before: int
    trained: list[Parameter]
    tuned: Mapping[int, Dims | None]
    kept: Tensor | None
    handed_on: list[Tensor]


class Blocks(Derived):
    """Blocks of flex attention in a row."""

    def __new__(cls) -> Blocks:
        """Named by the tokens of a block."""
        return super().__new__(cls, f"b·s/{FLASH_BLOCK}")

    def __getnewargs__(self) -> tuple[()]:  # type: ignore[override]
        """What a copy is made of."""
        return ()

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The last one may not be full."""
        return sizes[f"b·s%{FLASH_BLOCK}"] // FLASH_BLOCK


def recorded_layer(c: Call, x: Tensor) -> Tensor:
    """A layer that allocates what was recorded. Raises NoEngineError for cards before compute capability 8.0."""
    f, running = c.at(), c.model.running
    assert running.recorded is not None
    if not running.flash:  # there Unsloth runs in fp16 with parts in fp32, and compiles parts of layers
        raise NoEngineError("Unsloth's compiled layers on a card before compute capability 8.0 (no formula yet)")
    last = max(layer for block in c.model.arch.blocks for layer in block.layers)
    timed = last if running.recorded.timed is None else running.recorded.timed
    trained = [p for p in _parameters(c) if p.trainable]
    node = f.record(_backward, (x, *trained))
    f.products.append((len(f.log), "cuBLAS"))
    events = running.recorded.of_layer(c.number)
    forward, _, backward = events.training.partition("|")
    num_forward = len(_allocations(forward))
    tuned = {
        n: copied
        for n, copied in map(_timed, running.recorded.tuned)
        if running.tunes and (n > num_forward if c.number == timed else c.number == 0)
    }
    if running.recorded.of_pairs:  # each kernel is timed once: in the first forward, and in the backward of the last
        tuned = {n: copied for n, copied in tuned.items() if (n > num_forward) is (c.model.pass_name == LAST_PASS)}
    tensors: Tensors = {}
    handed_on = c.model.handed_on if running.recorded.rows else []  # left out where rows become one: reserved bytes are above
    if node is None:
        bare = running.recorded.bare if running.peft_type is None else ""
        if tuned and not bare:  # Unsloth tries the layer with a graph first
            _run(f, forward.split(), tensors, tuned)
            tensors.clear()
        _run(f, (bare or events.forward).split(), tensors)
        out = next(tensor for tensor in tensors.values() if len(tensor.dims) > 1 and tensor.dims[-1] == _dims(events.result)[-1])
        handed_on += _besides(out, tensors)
    else:
        _run(f, forward.split(), tensors)
        out = tensors.pop(events.output)
        freed = {-int(event) for event in events.training.split() if event.startswith("-")}
        for number in tensors.keys() - freed if running.recorded.scheme else ():
            del tensors[number]  # a scale, which takes the place of the one before; else the input's gradient will lie in it
        kept = None if running.recorded.checkpointed else x.detach()
        node.context = LayerState(backward.split(), tensors, num_forward, trained, tuned, kept, handed_on)
    return Tensor(out.storage, x.dims, _dtype(out, x.dims), node)


def _besides(result: Tensor, tensors: Tensors) -> list[Tensor]:
    """What a layer leaves per token besides its result, or the gradient of its input."""
    return [tensor for tensor in tensors.values() if len(tensor.dims) > 1 and tensor is not result]


def _timed(tuned: int | str) -> tuple[int, Dims | None]:
    """After which allocation kernels are timed, and the dims of a copy that one of them writes over."""
    number, _, copied = str(tuned).partition(":")
    return int(number), _dims(copied) if copied else None


def _dtype(recorded: Tensor, dims: Dims) -> str:
    """The dtype of hidden states of these dims, of which the record says the bytes of a token."""
    return "fp32" if recorded.dims[-1] == ITEMSIZE["fp32"] * dims[-1] else "bf16"


def _parameters(c: Call) -> Iterator[Parameter]:
    for family in c.model.parameters.all:
        in_text = is_in_text_part(c.model.arch, family.name) or c.block.stack == "encoder"
        if family.layers is not None and c.number in family.layers and in_text:
            yield c.model.parameter(family, c.number)


def _allocations(events: str) -> list[str]:
    return [event for event in events.split() if not event.startswith("-")]


def _run(
    f: Tape, events: Iterable[str], tensors: Tensors, tuned: Mapping[int, Dims | None] = UNTIMED, num_before: int = 0
) -> None:
    """Allocate and free. `num_before`: how many allocations came before."""
    number = num_before
    for event in events:
        if event.startswith("-"):
            tensors.pop(-int(event))
            continue
        number += 1
        tensors[number] = f.new(_dims(event), "uint8", "of the compiled layer")
        if number in tuned:
            flushed = f.new((FLUSHED_BYTES,), "uint8", "written over the cache")
            copied = f.new(dims, "uint8", "written over") if (dims := tuned[number]) else None
            del flushed, copied


def _dims(event: str) -> Dims:
    matched = SIZE.fullmatch(event)
    assert matched is not None
    size, unit = matched.groups()
    if unit.startswith("t^"):
        return (AtLeast(int(unit[2:])), int(size))
    return (*TOKENS[unit], int(size))


def scales(recorded: Recorded) -> list[Dims]:
    """What a forward leaves besides its result: scales of fake quantization, which last until the next."""
    forward = recorded.forward.split()
    freed = {-int(event) for event in forward if event.startswith("-")}
    allocated = [event for event in forward if not event.startswith("-")]
    left = [event for number, event in enumerate(allocated, 1) if number not in freed]
    result = recorded.of_layer(1).result
    left.remove(next(event for event in left if event.partition("^")[0] == result))
    return [_dims(event) for event in left]


def masks_of_blocks(f: Tape, arch: Architecture) -> list[Tensor]:
    """The masks of flex attention, one for each kind of it, which stay: which blocks of keys a block of queries attends to and
    the reverse, in part and in full (unsloth_zoo 2026.10.9, flex_attention/utils.py, `reused_compiled_create_block_mask`)."""
    num_kinds = len({block.attentions[0].window for block in arch.blocks})
    return [f.new((Blocks(), Blocks()), "int32", "mask of blocks") for _ in range(num_kinds * INDICES)]


def left_by_first_step(f: Tape, arch: Architecture, *, seq: Dim, dtype: str) -> list[Tensor]:
    """Queries, keys and values of a layer, and a gradient of its input, in cycles of Python's objects that the first step over
    tiles leaves (rehearsed). They stay until Python collects garbage, which it did not do in the steps after it."""
    a = arch.blocks[0].attentions[0]
    widths = (a.num_attention_heads * a.head_dim, *(a.num_key_value_heads * a.head_dim,) * 2, arch.hidden_size)
    return [f.new(("b", seq, width), dtype, "left by the first step") for width in widths]


def _backward(f: Tape, node: Node, saved: object, g: Tensor) -> Gradients:
    assert isinstance(node.context, LayerState)
    events, tensors, num_before, trained, tuned, _kept, handed_on = node.context
    node.context = None
    f.products.append((len(f.log), "cuBLAS"))  # of a thread of its own
    _run(f, events, tensors, tuned, num_before)
    widths = [ITEMSIZE[dtype] * g.dims[-1] for dtype in ("bf16", "fp32")]  # not keys and values that layers hand on
    of_input = next(tensor for tensor in tensors.values() if len(tensor.dims) > 1 and tensor.dims[-1] in widths)
    handed_on += _besides(of_input, tensors)
    gradients = [tensor for tensor in tensors.values() if len(tensor.dims) == 1]
    to_input = Tensor(of_input.storage, g.dims, _dtype(of_input, g.dims))
    return [to_input, *(_gradient_of(f, parameter, gradients) for parameter in trained)]


def _gradient_of(f: Tape, parameter: Parameter, gradients: list[Tensor]) -> Tensor:
    """The first of the gradients with as many bytes as the parameter, taken out of them: the record does not name them."""
    nbytes = ITEMSIZE[parameter.dtype] * prod(dim for dim in parameter.dims if isinstance(dim, int))
    gradient = next(tensor for tensor in gradients if tensor.dims == (nbytes,))
    gradients.remove(gradient)
    assert gradient.storage is not None
    f.dims[gradient.storage.number], f.dtypes[gradient.storage.number] = parameter.dims, parameter.dtype
    return Tensor(gradient.storage, parameter.dims, parameter.dtype)

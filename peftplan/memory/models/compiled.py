"""A decoder whose layers torch compiles whole: each allocates what was recorded of one (`job.compiled_layers`).

A batch is one row without padding, as Unsloth makes it. Source: unsloth 2026.10.9, models/_block_compile.py (`_wrap`).
Left out: the indices of attention's blocks, below 0.3 MB for 8,192 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from peftplan.arch.text_part import is_in_text_part
from peftplan.arrays import Derived, Size, larger
from peftplan.dtypes import ITEMSIZE
from peftplan.errors import NoEngineError
from peftplan.job.compiled_layers import MASK, Recorded
from peftplan.job.kernel_facts import Norm
from peftplan.job.kernels import INT8_INT4
from peftplan.memory import fake_quantized, fused_layers
from peftplan.memory.calls import inputs
from peftplan.memory.fused_attention import FLASH_BLOCK, MASK_MULTIPLE
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.style import Call, Style
from peftplan.memory.timed import FLUSHED_BYTES
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Parameter, Tensor

NORM = Norm("torch, inductor's RMSNorm", reuses_gradient=False)
TOKENS: dict[str, Dims] = {
    "": (),
    "t": ("b", "s"),
    **{f"t%{multiple}": (f"b·s%{multiple}",) for multiple in (32, FLASH_BLOCK)},
    f"r%{FLASH_BLOCK}": ("b", f"s%{FLASH_BLOCK}"),
    "q": ("b·s", f"b·s>{MASK_MULTIPLE}"),
}
"""What stands behind a size in the record → the dims that it is multiplied by."""
UNTIMED: Mapping[int, Dims | None] = MappingProxyType({})
LAST_PASS = "/1"
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
    `kept`: the layer's input, where no checkpoint holds it.
    """

    events: list[str]
    tensors: Tensors
    num_before: int
    trained: list[Parameter]
    tuned: Mapping[int, Dims | None]
    kept: Tensor | None


def compiled_layers(model: Model) -> Tensor:
    """Embedding, rotary tables of each kind of attention, the recorded layers, and the final norm."""
    f = model.tape
    if not model.running.flash:  # there Unsloth runs in fp16 with parts in fp32, and compiles parts of layers
        raise NoEngineError("Unsloth's compiled layers on a card before compute capability 8.0 (no formula yet)")
    assert model.running.recorded is not None
    embedded = x = _beside_towers(model, _inputs(model))
    f.module = "model"
    if model.running.recorded.multiplied:
        x = ops.scale(f, x)
    else:
        del embedded
    states = [x]
    del x
    attentions = {b.attentions[0].window: b.attentions[0] for b in model.arch.blocks if b.attentions[0].positions == "rotary"}
    widths = [a.rotary_dim or a.head_dim for a in attentions.values()]
    if model.arch.model_type == "gpt_oss":  # one for both kinds of attention, as wide as half a head
        widths = [widths[0] // 2]
    f.module = "model.rotary_emb"
    rows = 1 if model.running.recorded.of_pairs or model.running.of_completions else "b"  # without positions in the batch
    tables = [f.new((rows, "s", width), states[0].dtype, name) for width in widths for name in ("cos", "sin")]
    if MASK in model.running.recorded.training:  # each kind of attention gets a mask: of a row's documents, or of rows apart
        f.module = "model"
        tables += [f.new(("b", "s", "s") if model.running.recorded.rows else ("b·s", "b·s"), "bool", "mask") for _ in attentions]
    decoder = model.arch.input_embedding.rpartition(".")[0]  # type: ignore[union-attr]
    of_stack = [m.name for m in model.arch.modules if m.layers is None and m.name.rpartition(".")[0] == decoder]
    style = Style(layer=_layer, norm=_norm, final_norm=next(name for name in of_stack if name.endswith("norm")))
    return run_layers(model, style, states, lambda _: tuple(tables), masks={})


def _inputs(model: Model) -> Tensor:
    """The embeddings; with a scheme that has them, of the fake-quantized table."""
    assert model.running.recorded is not None
    assert model.arch.input_embedding is not None
    if model.running.recorded.scheme != INT8_INT4:
        return inputs(model)
    f = model.tape
    f.module = model.arch.input_embedding
    table = fake_quantized.table(f, model.part(f.module), model.scales)
    return model.asking_gradient(ops.embedding(f, table, ("b", "s"), None))


def _beside_towers(model: Model, x: Tensor) -> Tensor:
    """The embeddings, among which the features of towers stand that train beside the text part: their weights have gradients."""
    outside = [p for p in model.parameters.all if p.trainable and not is_in_text_part(model.arch, p.name)]
    trained = [model.parameter(p, layer) for p in outside for layer in p.layers or (None,)]
    if not trained:
        return x
    return Tensor(x.storage, x.dims, x.dtype, model.tape.record(_to_towers, (x, *trained), trained))


def _to_towers(f: Tape, node: Node, saved: tuple[list[Parameter]], g: Tensor) -> Gradients:
    return [g, *(f.new(p.dims, p.dtype, "gradient") for p in saved[0])]


def _norm(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    f, weight = model.tape, model.part(name, layer).own_weight
    f.module = name
    assert model.running.recorded is not None
    normed = fused_layers.rms_norm(f, NORM, x, weight, dtype="fp32" if model.running.recorded.wide_norm else None)
    if model.running.recorded.first is None:
        return normed
    narrow = f.to(normed, model.running.dtype)
    return normed if model.running.holds_hidden_states else narrow  # GRPO reads the last of the hidden states (models/rl.py:2089)


def _layer(c: Call, x: Tensor) -> Tensor:
    f, running = c.at(), c.model.running
    assert running.recorded is not None
    last = max(layer for block in c.model.arch.blocks for layer in block.layers)
    trained = [p for p in _parameters(c) if p.trainable]
    node = f.record(_backward, (x, *trained))
    f.products.append((len(f.log), "cuBLAS"))
    events = running.recorded.of_layer(c.number)
    forward, _, backward = events.training.partition("|")
    num_forward = len(_allocations(forward))
    tuned = {
        n: copied
        for n, copied in map(_timed, running.recorded.tuned)
        if running.tunes and (n > num_forward if c.number == last else c.number == 0)
    }
    if running.recorded.of_pairs:  # each kernel is timed once: in the first forward, and in the backward of the last
        tuned = {n: copied for n, copied in tuned.items() if (n > num_forward) is (c.model.pass_name == LAST_PASS)}
    tensors: Tensors = {}
    if node is None:
        if tuned:  # Unsloth tries the layer with a graph first
            _run(f, forward.split(), tensors, tuned)
            tensors.clear()
        _run(f, events.forward.split(), tensors)
        out = next(tensor for tensor in tensors.values() if len(tensor.dims) > 1 and tensor.dims[-1] == _dims(events.result)[-1])
    else:
        _run(f, forward.split(), tensors)
        out = tensors.pop(events.output)
        freed = {-int(event) for event in events.training.split() if event.startswith("-")}
        for number in tensors.keys() - freed if running.recorded.scheme else ():
            del tensors[number]  # a scale, which takes the place of the one before; else the input's gradient will lie in it
        kept = x.detach() if running.recorded.of_pairs else None
        node.context = LayerState(backward.split(), tensors, num_forward, trained, tuned, kept)
    return Tensor(out.storage, x.dims, _dtype(out, x.dims), node)


def _timed(tuned: int | str) -> tuple[int, Dims | None]:
    """After which allocation kernels are timed, and the dims of a copy that one of them writes over."""
    number, _, copied = str(tuned).partition(":")
    return int(number), _dims(copied) if copied else None


def _dtype(recorded: Tensor, dims: Dims) -> str:
    """The dtype of hidden states of these dims, of which the record says the bytes of a token."""
    return "fp32" if recorded.dims[-1] == ITEMSIZE["fp32"] * dims[-1] else "bf16"


def _parameters(c: Call) -> Iterator[Parameter]:
    for family in c.model.parameters.all:
        in_text = is_in_text_part(c.model.arch, family.name)
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
    size, unit = SIZE.fullmatch(event).groups()  # type: ignore[union-attr]
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


def _backward(f: Tape, node: Node, saved: object, g: Tensor) -> Gradients:
    assert isinstance(node.context, LayerState)
    events, tensors, num_before, trained, tuned, _kept = node.context
    node.context = None
    _run(f, events, tensors, tuned, num_before)
    of_input = next(tensor for tensor in tensors.values() if len(tensor.dims) > 1)
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

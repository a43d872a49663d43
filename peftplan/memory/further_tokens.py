"""Further tokens of Nemotron 3 and Qwen 3.5 (multi-token prediction): hidden states of each depth, and a loss of each.

A depth joins the hidden states of the one before with embeddings of tokens that are one place further on, and runs the same
layers, which are checkpoints only where ranks divide experts. The loop projects its result to logits of its own, and drops them
once it has their loss.
Source: nemo_automodel 0.7.0, components/models/common/mtp/mtp.py (`MTPModule.forward`), components/models/nemotron_v3/mtp.py
(`NemotronV3MTPSublayer.forward`), qwen3_5/model.py (`Qwen3_5DenseMTPSublayer.forward`), components/loss/mtp.py
(`calculate_mtp_loss`). Left out: numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.job.further_tokens import OF_QWEN, STACK
from peftplan.job.loss_sizes import CUT_APART, NO_UPCAST
from peftplan.memory.cut_apart import hidden_and_last
from peftplan.memory.heads import logits_of
from peftplan.memory.loss import cross_entropy
from peftplan.memory.model import Model
from peftplan.memory.models.automodel_nemotron import STYLE, attention, mixture
from peftplan.memory.models.automodel_vision import GATED, gated_layer, joined_table
from peftplan.memory.models.qwen3_5 import STYLE as OF_ATTENTION
from peftplan.memory.models.qwen3_5 import layer as attending_layer
from peftplan.memory.models.style import Call
from peftplan.memory.models.vision_language import tables_of_grids
from peftplan.memory.units import EMBEDDING, FURTHER, further
from peftplan.tape import ops
from peftplan.tape.shaping import cat
from peftplan.tape.tensors import Tensor


def logits_and_depths(model: Model, x: Tensor) -> tuple[Tensor, ...]:
    """The logits of every position, or hidden states and logits of the last where the loss reads the head itself, and the hidden
    states of each depth."""
    own = hidden_and_last(model, x) if model.running.loss == CUT_APART else (Tensor(None, (), "fp32"), logits_of(model, x))
    depths, of_depth = [], _depth
    if model.arch.model_type in OF_QWEN:
        _words, of_depth = _embedded(model), _attending_depth  # of which the mask's shape is taken
    for _ in range(model.running.mtp_depths):
        x = of_depth(model, x)
        depths.append(x)
    return *own, *depths


def _depth(model: Model, x: Tensor) -> Tensor:
    """The layers of a depth, of which the last one ends in a norm."""
    embedded = _embedded(model)
    sparse = next(block for block in model.arch.blocks if block.mlp.variant == "moe")
    blocks = (next(block for block in model.arch.blocks if block.attentions), sparse)
    calls = [Call(model, STYLE._replace(stack=f"{STACK}{n}"), block, n, (), None) for n, block in enumerate(blocks)]
    first, last = calls
    recomputes = model.running.checkpointing and model.running.kernels.exchange is not None
    states = [*model.units.enter_with_all(further(first.style.stack), x, embedded)]
    del x, embedded
    x = model.units.leave(further(first.style.stack), _run(_joined, first, states, recomputes=recomputes))
    states = [model.units.enter_with(further(last.style.stack), x)]
    del x
    return model.units.leave(further(last.style.stack), _run(_mixed, last, states, recomputes=recomputes))


def _run(part: Callable[[Call, list[Tensor]], Tensor], c: Call, states: list[Tensor], *, recomputes: bool) -> Tensor:
    """A layer, which takes what it reads out of the list; a checkpoint keeps that."""
    if not recomputes:
        return part(c, states)
    out = c.model.checkpoint(lambda *xs: part(c, [*xs]), *states)
    assert isinstance(out, Tensor)
    return out


def _joined(c: Call, states: list[Tensor]) -> Tensor:
    embedded, x = states.pop(), states.pop()
    e, h = c.norm("enorm", embedded), c.norm("hnorm", x)
    both = cat(c.at(), (e, h), (*h.dims[:-1], 2 * int(h.dims[-1])))
    del embedded, e, h
    x = c.linear("eh_proj", both)
    del both
    return ops.add(c.at(), x, attention(c, c.norm("norm", x)))


def _mixed(c: Call, states: list[Tensor]) -> Tensor:
    x = states.pop()
    x = ops.add(c.at(), x, mixture(c, c.norm("norm", x)))
    return c.norm("final_layernorm", x)


def _embedded(model: Model) -> Tensor:
    assert model.arch.input_embedding is not None
    model.units.enter(EMBEDDING)
    return model.units.leave(EMBEDDING, model.embedding(model.arch.input_embedding, ("b", "s")))


def _attending_depth(model: Model, x: Tensor) -> Tensor:
    """A layer of transformers' attention, or of the tool's before experts, which is a checkpoint where others are. It has rotary
    tables of its own."""
    embedded = _embedded(model)
    block = next(block for block in model.arch.blocks if block.delta_rule is None)
    mixes = block.mlp.variant == "moe"
    c = Call(model, (GATED if mixes else OF_ATTENTION)._replace(stack=f"{STACK}0"), block, 0, (), None)
    x, embedded = model.units.enter_with_all(FURTHER, x, embedded)
    out = model.checkpoint(_attended, c, x, embedded) if mixes and model.running.checkpointing else _attended(c, x, embedded)
    assert isinstance(out, Tensor)
    return model.units.leave(FURTHER, out)


def _attended(c: Call, x: Tensor, embedded: Tensor) -> Tensor:
    """What the layer gives behind its last norm."""
    mixes = c.block.mlp.variant == "moe"
    e, h = c.norm("enorm", embedded), c.norm("hnorm", x)
    both = cat(c.at(), (e, h), (*h.dims[:-1], 2 * int(h.dims[-1])))
    x = c.linear("eh_proj", both)
    del both, e, h
    tables = (joined_table(c.model, x.dtype),) if mixes else tables_of_grids(c.model, x.dtype, by_sections=False)
    x = (gated_layer if mixes else attending_layer)(c._replace(tables=tables), x)
    return c.norm("final_layernorm", x)


def with_losses(model: Model, loss: Tensor, depths: list[Tensor]) -> Tensor:
    """The loss of the model's own logits, and those of all depths beside it."""
    f = model.tape
    total: Tensor | None = None
    for x in depths:
        of_depth = cross_entropy(f, _scored(model, x), dtype=x.dtype if model.running.loss == NO_UPCAST else "fp32")
        total = of_depth if total is None else ops.add(f, total, of_depth)
    return loss if total is None else ops.add(f, loss, ops.scale(f, total))


def _scored(model: Model, x: Tensor) -> Tensor:
    """Logits of a depth, by a call of the head that is a forward of its own (`iter_forward_root`). Where the head trains in
    Transformer Engine's function, the gradient of its other call is added in place."""
    f, name = model.tape, model.arch.output_embedding
    assert name is not None
    f.linear_in_python = model.running.kernels.dense is not None and model.part(name).own_weight.node is not None
    logits = logits_of(model, x)
    f.linear_in_python = False
    model.units.end_forward()
    return logits

"""Further tokens of Nemotron 3 and Qwen 3.5 (multi-token prediction): hidden states of each depth, and a loss of each.

A depth joins the hidden states of the one before with embeddings of tokens that are one place further on, and runs the same
layers, which are no checkpoints. The loop projects its result to logits of its own, and drops them once it has their loss.
Source: nemo_automodel 0.7.0, components/models/common/mtp/mtp.py (`MTPModule.forward`), components/models/nemotron_v3/mtp.py
(`NemotronV3MTPSublayer.forward`), qwen3_5/model.py (`Qwen3_5DenseMTPSublayer.forward`), components/loss/mtp.py
(`calculate_mtp_loss`). Left out: numbers of tokens.
"""

from __future__ import annotations

from peftplan.job.further_tokens import STACK
from peftplan.memory.heads import logits_of
from peftplan.memory.loss import cross_entropy
from peftplan.memory.model import Model
from peftplan.memory.models.automodel_nemotron import STYLE, attention, mixture
from peftplan.memory.models.qwen3_5 import STYLE as OF_ATTENTION
from peftplan.memory.models.qwen3_5 import layer as attending_layer
from peftplan.memory.models.style import Call
from peftplan.memory.models.vision_language import tables_of_grids
from peftplan.memory.units import EMBEDDING, FURTHER
from peftplan.tape import ops
from peftplan.tape.shaping import cat
from peftplan.tape.tensors import Tensor


def logits_and_depths(model: Model, x: Tensor) -> tuple[Tensor, ...]:
    """The logits of every position, and the hidden states of each depth."""
    logits = logits_of(model, x)
    depths, of_depth = [], _depth
    if model.arch.model_type == "qwen3_5":
        _words, of_depth = _embedded(model), _attending_depth  # of which the mask's shape is taken
    for _ in range(model.running.mtp_depths):
        x = of_depth(model, x)
        depths.append(x)
    return Tensor(None, (), "fp32"), logits, *depths


def _depth(model: Model, x: Tensor) -> Tensor:
    """The layers of a depth, of which the last one ends in a norm."""
    assert model.arch.input_embedding is not None
    embedded = model.embedding(model.arch.input_embedding, ("b", "s"))
    sparse = next(block for block in model.arch.blocks if block.mlp.variant == "moe")
    blocks = (next(block for block in model.arch.blocks if block.attentions), sparse)
    calls = [Call(model, STYLE._replace(stack=f"{STACK}{n}"), block, n, (), None) for n, block in enumerate(blocks)]
    first, last = calls
    e, h = first.norm("enorm", embedded), first.norm("hnorm", x)
    both = cat(first.at(), (e, h), (*h.dims[:-1], 2 * int(h.dims[-1])))
    del embedded, e, h
    x = first.linear("eh_proj", both)
    del both
    for call, part in zip(calls, (attention, mixture), strict=True):
        x = ops.add(call.at(), x, part(call, call.norm("norm", x)))
    return last.norm("final_layernorm", x)


def _embedded(model: Model) -> Tensor:
    assert model.arch.input_embedding is not None
    model.units.enter(EMBEDDING)
    return model.units.leave(EMBEDDING, model.embedding(model.arch.input_embedding, ("b", "s")))


def _attending_depth(model: Model, x: Tensor) -> Tensor:
    """A layer of transformers' attention, which has rotary tables of its own."""
    embedded = _embedded(model)
    block = next(block for block in model.arch.blocks if block.delta_rule is None)
    x, embedded = model.units.enter_with_all(FURTHER, x, embedded)
    c = Call(model, OF_ATTENTION._replace(stack=f"{STACK}0"), block, 0, (), None)
    e, h = c.norm("enorm", embedded), c.norm("hnorm", x)
    both = cat(c.at(), (e, h), (*h.dims[:-1], 2 * int(h.dims[-1])))
    x = c.linear("eh_proj", both)
    del both, e, h
    tables = tables_of_grids(model, x.dtype, by_sections=False)
    x = attending_layer(c._replace(tables=tables), x)
    return model.units.leave(FURTHER, c.norm("final_layernorm", x))


def with_losses(model: Model, loss: Tensor, depths: list[Tensor]) -> Tensor:
    """The loss of the model's own logits, and those of all depths beside it."""
    f = model.tape
    total: Tensor | None = None
    for x in depths:
        of_depth = cross_entropy(f, logits_of(model, x))
        total = of_depth if total is None else ops.add(f, total, of_depth)
    return loss if total is None else ops.add(f, loss, ops.scale(f, total))

"""Nemotron 3's further tokens (multi-token prediction): hidden states of each depth behind the logits, and a loss of each.

A depth joins the hidden states of the one before with embeddings of tokens that are one place further on, and runs the same
layers, which are no checkpoints. The loop projects its result to logits of its own, and drops them once it has their loss.
Source: nemo_automodel 0.7.0, components/models/common/mtp/mtp.py (`MTPModule.forward`), components/models/nemotron_v3/mtp.py
(`NemotronV3MTPSublayer.forward`), components/loss/mtp.py (`calculate_mtp_loss`). Left out: numbers of tokens.
"""

from __future__ import annotations

from peftplan.job.further_tokens import STACK
from peftplan.memory.heads import logits_of
from peftplan.memory.loss import cross_entropy
from peftplan.memory.model import Model
from peftplan.memory.models.automodel_nemotron import STYLE, attention, mixture
from peftplan.memory.models.style import Call
from peftplan.tape import ops
from peftplan.tape.shaping import cat
from peftplan.tape.tensors import Tensor


def logits_and_depths(model: Model, x: Tensor) -> tuple[Tensor, ...]:
    """The logits of every position, and the hidden states of each depth."""
    logits = logits_of(model, x)
    depths = []
    for _ in range(model.running.mtp_depths):
        x = _depth(model, x)
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


def with_losses(model: Model, loss: Tensor, depths: list[Tensor]) -> Tensor:
    """The loss of the model's own logits, and those of all depths beside it."""
    f = model.tape
    total: Tensor | None = None
    for x in depths:
        of_depth = cross_entropy(f, logits_of(model, x))
        total = of_depth if total is None else ops.add(f, total, of_depth)
    return loss if total is None else ops.add(f, loss, ops.scale(f, total))

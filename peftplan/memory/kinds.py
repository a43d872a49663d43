"""Which layers of a model are alike, so that a few of them stand for all (`depth`)."""

from __future__ import annotations

from collections.abc import Collection

from peftplan.depth import sections
from peftplan.memory.model import Model


def kinds_of(model: Model, stack: str = "decoder") -> tuple[int, ...]:
    """The kind of each layer of a stack: layers of one block that have the same tensors are of one kind."""
    block_of = {layer: index for index, b in enumerate(model.arch.blocks) if b.stack == stack for layer in b.layers}
    if model.running.recorded is not None and (model.running.recorded.others or model.running.kernels.decoder is not None):
        return tuple(map(model.running.recorded.kind, sorted(block_of)))
    some = [p.layers for p in model.parameters.all if p.layers is not None and len(p.layers) < len(block_of)]
    partial = [layers for layers in some if not block_of.keys().isdisjoint(layers)]
    if any(block.delta_rule is not None for block in model.arch.blocks):
        partial = [layers for layers in partial if not _of_blocks(model, layers)]
    return sections.kinds(block_of, partial)


def _of_blocks(model: Model, layers: Collection[int]) -> bool:
    """Whether a layer's block says if it has a tensor of these layers."""
    return all({*layers}.intersection(block.layers) in (set(), {*block.layers}) for block in model.arch.blocks)

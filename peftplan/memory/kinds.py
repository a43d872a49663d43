"""Which layers of a model are alike, so that a few of them stand for all (`depth`)."""

from __future__ import annotations

from peftplan.depth import sections
from peftplan.memory.model import Model


def kinds_of(model: Model, stack: str = "decoder") -> tuple[int, ...]:
    """The kind of each layer of a stack: layers of one block that have the same tensors are of one kind."""
    block_of = {layer: index for index, b in enumerate(model.arch.blocks) if b.stack == stack for layer in b.layers}
    if model.running.recorded is not None and (model.running.recorded.others or model.running.kernels.decoder is not None):
        return tuple(map(model.running.recorded.kind, sorted(block_of)))
    return sections.kinds(
        block_of, [p.layers for p in model.parameters.all if p.layers is not None and len(p.layers) < len(block_of)]
    )

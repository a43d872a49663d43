"""The two sides of the layer that an adapter wraps."""

from __future__ import annotations

from peftplan.memory.parts import Part


def sides(part: Part) -> tuple[int, int]:
    """Inputs and outputs of a linear layer or a Conv1D."""
    assert part.weight is not None
    first, second = part.weight.dims
    assert isinstance(first, int)
    assert isinstance(second, int)
    return (first, second) if part.kind == "Conv1D" else (second, first)

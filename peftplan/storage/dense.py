"""An unquantized weight: one tensor in its own dtype."""

from __future__ import annotations

from peftplan.ledger import Allocation


def dense(*, dtype: str, shape: tuple[int, ...]) -> tuple[Allocation, ...]:
    """The one tensor of an unquantized weight: itemsize × ∏ shape bytes."""
    return (Allocation("weight", dtype, shape),)

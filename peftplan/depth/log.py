"""The log of a traced run: its storages, and when each is allocated and freed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from peftplan.ledger import Category

AUTOGRAD = "autograd"
"""The module of autograd nodes that belong to no forward: accumulation of gradients."""


@dataclass(slots=True, eq=False)
class Storage:
    """One allocation. `segment` numbers the runs of forward code and of backward code in which it was made and freed."""

    id: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    phase: str
    segment: int
    in_forward: bool
    category: Category | None = None
    name: str | None = None
    freed_segment: int | None = None
    ones: bool = False
    """Whether every element is known to equal 1."""
    stream: int = 0
    """The CUDA stream on which it was made, whose blocks the allocator keeps apart."""


class Moment(NamedTuple):
    """One line of the log: `alloc` or `free` of a storage, with the phase and the module."""

    kind: str
    storage: Storage
    phase: str
    module: str


def category_of(record: Storage) -> Category:
    """What a storage is: said (a parameter, a gradient, a state, logits), else activations if it was made by forward code and
    outlived it (something saved it for backward), else temporaries."""
    if record.category is not None:
        return record.category
    return "activations" if record.in_forward and record.freed_segment != record.segment else "temporaries"

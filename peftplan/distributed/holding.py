"""What one rank stores between steps."""

from __future__ import annotations

from typing import NamedTuple

from peftplan.ledger import Category, Line, Place
from peftplan.parameters import Parameters

FLOATS = ("fp64", "fp32", "fp16", "bf16")


class Holding(NamedTuple):
    """What a rank holds: its parameters, and other lines that last from step to step."""

    parameters: Parameters
    """The parameters that the optimizer updates, which give gradients and states their shapes and dtypes, and the frozen ones."""
    beside: tuple[Line, ...] = ()
    states_of: Parameters | None = None
    """The parameters that give optimizer states their shapes, if not `parameters`."""
    on_tape: Category = "gradients"
    """What the step makes and frees."""
    device: int | None = None
    """Of a `device_map`, the GPU that holds it; None: one of them."""
    rank: int | None = None
    """Where ranks hold unlike parts, the one that holds these; None: the one that is counted for all, or one of them."""


def place_of(offload: str | None) -> Place:
    return "device" if offload in (None, "none") else "host"

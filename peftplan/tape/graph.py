"""The autograd graph of a tape: what a checkpointed call leaves in place of what they save, and the order of backward.

Source: torch, csrc/autograd/engine.cpp (order), input_buffer.cpp (sums), utils/checkpoint.py (`_CheckpointFrame`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from peftplan.tape.tensors import Node, Operand, Parameter

RELEASED = ("released",)
"""Takes the place of what a node saved once a nested backward has run it."""


class StopRecomputationError(Exception):
    """Raised when every saved tensor of a checkpointed layer has been recomputed."""


class Frame:
    """A checkpointed call: how many tensors it would have saved, and those that its recomputation has made again."""

    __slots__ = ("alive", "count", "inputs", "recomputed", "replayed", "rerun")

    def __init__(self) -> None:
        self.count = 0
        self.alive: set[int] = set()
        self.replayed = 0
        self.recomputed: dict[int, Operand] | None = None
        self.rerun: Callable[..., object] | None = None
        self.inputs: Callable[[], tuple[object, ...]] = tuple


class Place:
    """Stands for a saved tensor of a checkpointed layer until recomputation makes it; a place that nobody holds is not filled."""

    __slots__ = ("frame", "number")

    def __init__(self, frame: Frame, number: int) -> None:
        self.frame = frame
        self.number = number
        frame.alive.add(number)

    def __del__(self) -> None:
        self.frame.alive.discard(self.number)


def reachable(roots: Iterable[Node | Parameter | None]) -> list[Node]:
    """Every node that gradients of the roots reach, in the order of forward. Counts the gradients that each weight will get."""
    seen: set[Node] = set()
    stack: list[Node] = []
    uses: dict[Parameter, int] = {}

    def reach(parent: Node | Parameter | None) -> None:
        if isinstance(parent, Parameter):
            if parent.counts:
                parent.uses = uses[parent] = uses.get(parent, 0) + 1
        elif parent is not None and parent not in seen:
            seen.add(parent)
            stack.append(parent)

    for root in roots:
        reach(root)
    while stack:
        for edge in stack.pop().edges:
            if edge is not None:
                reach(edge[0])
    return sorted(seen, key=_sequence_of)


def _sequence_of(node: Node) -> float:
    return node.sequence

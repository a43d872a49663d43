"""The autograd graph of a tape: the order of backward, and the placeholders that a checkpointed call saves.

Source: torch, csrc/autograd/engine.cpp (order), input_buffer.cpp (sums), utils/checkpoint.py (`_CheckpointFrame`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from peftplan.tape.tensors import Node, Operand, Parameter, Tensor

RELEASED = ("released",)
"""Replaces the saved tensors of a node that a nested backward has run."""


class StopRecomputationError(Exception):
    """Raised when every saved tensor of a checkpointed layer has been recomputed."""


class Frame:
    """A checkpointed call: how many tensors its operations save, and which of them have been recomputed."""

    __slots__ = ("alive", "chosen", "count", "inputs", "recomputed", "replayed", "rerun")

    def __init__(self) -> None:
        self.count = 0
        self.alive: set[int] = set()
        self.replayed = 0
        self.recomputed: dict[int, Operand] | None = None
        self.rerun: Callable[..., object] | None = None
        self.inputs: Callable[[], tuple[object, ...]] = tuple
        self.chosen: list[tuple[Tensor, ...]] = []
        """What recomputation finds instead of making it again (`CheckpointPolicy.MUST_SAVE`)."""


class Place:
    """Placeholder for a saved tensor of a checkpointed layer. Recomputation fills only the places that are still referred to."""

    __slots__ = ("frame", "number")

    def __init__(self, frame: Frame, number: int) -> None:
        self.frame = frame
        self.number = number
        frame.alive.add(number)

    def __del__(self) -> None:
        self.frame.alive.discard(self.number)


def reachable(roots: Iterable[Node | Parameter | None]) -> list[Node]:
    """Every node that the gradients of the roots reach, in forward order. Also sets how many gradients each weight will get."""
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


def _sequence_of(node: Node) -> tuple[int, int]:
    return node.sequence

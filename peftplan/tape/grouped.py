"""What a module saves goes to the host as a group, once the next one has run, and comes back before that one's backward.

    forward     layer 0 | layer 1 | free group 0 | layer 2 | free group 1 … ; the group of the last module stays
    backward    reload group 1 | layer 2 | reload group 0 | layer 1 | layer 0

The modules are FSDP2's units but for embeddings: each layer and the head; accelerate finds no final norm under peft's model
(utils/fsdp_utils.py, `_find_final_norm`). A group comes back on a stream of its own, as one contiguous copy of each view of a
storage that was saved. Weights stay, and so does what is saved between modules.

Source: ms-swift 4.6.0, callbacks/activation_cpu_offload.py (`AsyncDoubleBufferGroupOffloadHandler`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peftplan.tape.offloaded import Log
from peftplan.tape.tensors import Dims, Node, Parameter, Tensor

RELOADS = 4
"""The stream of the copies that come back, beside those of FSDP2's collectives."""


class Kept(NamedTuple):
    """A saved tensor's place in its group."""

    group: int
    number: int
    dims: Dims
    dtype: str
    node: Node | Parameter | None
    result: int


class Grouped:
    """The groups of one step."""

    def __init__(self, tape: Log) -> None:
        self.tape = tape
        self.current: int | None = None
        """The group of the module that runs now."""
        self.entered = 0
        self.groups: dict[int, dict[int, Tensor]] = {}
        """What is on the card, by its place in its group."""
        self.away: dict[int, dict[int, tuple[Tensor, object]]] = {}
        """Groups on the host: by its place, a tensor without a storage, and which view of which storage it was."""
        self.leaving: list[int] | None = None

    def enter(self) -> None:
        """Before a module's forward."""
        self.current = self.entered
        self.entered += 1
        self.groups[self.current] = {}

    def leave(self) -> int:
        """After it. Returns the group that comes back before its backward."""
        assert self.current is not None
        before, self.current = self.current - 1, None
        if before >= 0:
            self.away[before] = {
                place: (Tensor(None, value.dims, value.dtype), self._view(value))
                for place, value in self.groups.pop(before).items()
            }
        return before

    def pack(self, value: object) -> object:
        """What a node keeps of a tensor that it saves."""
        if self.current is None or not isinstance(value, Tensor) or value.storage is None:
            return value
        group = self.groups[self.current]
        group[len(group)] = value.detach()
        return Kept(self.current, len(group) - 1, value.dims, value.dtype, value.node, value.index)

    def _view(self, value: Tensor) -> object:
        assert value.storage is not None
        return value.storage.number, value.dtype, value.dims, self.tape.is_permuted(value)

    def reload(self, number: int) -> None:
        """Bring a group back, if there is one."""
        copies: dict[object, Tensor] = {}
        for place, (value, view) in self.away.pop(number, {}).items():
            if view not in copies:
                copies[view] = self.tape.new(value.dims, value.dtype, "to")
                self.tape.streams[copies[view].storage.number] = RELOADS  # type: ignore[union-attr]
            self.groups.setdefault(number, {})[place] = copies[view]

    def unpacked(self, saved: Sequence[object], node: Node | None = None) -> tuple[object, ...]:
        """Saved tensors for the node that is about to run, which goes on without them."""
        if any(type(value) is Kept for value in saved):
            self.leaving = []
        return tuple(self._popped(value) if type(value) is Kept else value for value in saved)

    def _popped(self, kept: Kept) -> Tensor:
        storage = self.groups[kept.group].pop(kept.number).storage
        return Tensor(storage, kept.dims, kept.dtype, kept.node, kept.result)

    def take_leaving(self) -> list[int] | None:
        """Whether what the node saved goes when it has run; as `Offloaded` says it."""
        leaving, self.leaving = self.leaving, None
        return leaving

    def ran(self, earlier: list[int]) -> None:
        """A node has run."""

    def inputs(self, args: tuple[object, ...]) -> Callable[[], tuple[object, ...]]:
        """The arguments of a checkpoint's second run: nothing of them is offloaded."""
        return lambda: args

    def end_backward(self) -> None:
        """All groups are empty."""
        self.groups.clear()
        self.entered = 0

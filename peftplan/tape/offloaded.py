"""Saved tensors that go to host memory while forward runs on, and come back one node before backward needs them no more.

    forward     the last `STASH` tensors that were saved wait on the card for their copies
    saved twice a tensor that another operation saves while it waits there stays on the card until backward has passed both
    backward    a tensor comes back on a stream of its own, and goes when the next node that got one back has run

Source: trl, models/activation_offloading.py (`OffloadActivations`); axolotl 0.19.0,
core/trainers/mixins/activation_checkpointing.py (`_patch_trl_offload_compute_stream_clone`). Left out: tensors under 1 KB, which
stay on the card, unless their dims are numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from peftplan.dtypes import ITEMSIZE
from peftplan.tape.tensors import Dims, Node, Parameter, Tensor

STASH = 5
"""`max_fwd_stash_size`."""
LEAST_BYTES = 1024
"""`min_offload_size`."""
COPIES = 1
"""The stream of the copies."""


class Away(NamedTuple):
    """A saved tensor's place on the host."""

    number: int
    dims: Dims
    dtype: str
    node: Node | Parameter | None
    result: int


class Log(Protocol):
    """The part of a tape that is used here."""

    nested: bool
    streams: dict[int, int]

    def new(self, dims: Dims, dtype: str, op: str) -> Tensor:
        """Allocate a tensor."""

    def view_of(self, tensor: Tensor) -> Tensor:
        """Mark a gradient as a view."""

    def is_permuted(self, x: Tensor | None) -> bool:
        """Whether the elements of x do not lie in the order of its dims."""


class Offloaded:
    """What one step has saved on the host."""

    def __init__(self, tape: Log) -> None:
        self.tape = tape
        self.saved = 0
        """How many tensors operations have saved, weights included."""
        self.stash: dict[int, Tensor] = {}
        """Those whose copies may not be complete, by their numbers."""
        self.on_card: set[tuple[int, str]] = set()
        """Storage and dtype of what waits there, or was saved twice."""
        self.twice: set[tuple[int, str]] = set()
        self.back: dict[int, Tensor] = {}
        """What has come back, until the next node has run; of a nested backward, until the next checkpoint's has."""
        self.leaving: list[int] | None = None
        """What goes when the node that is about to run has run; None if nothing came back for it."""
        self.latest: Node | None = None
        """The last node that got tensors back, with what comes after it: it lasts until the next backward."""

    def pack(self, value: object) -> object:
        """What a node keeps of a tensor that it saves."""
        if type(value) is Parameter:
            self.saved += 1
        if not isinstance(value, Tensor) or value.storage is None:
            return value
        self.saved += 1
        if self.tape.is_permuted(value):
            value = self.tape.new(value.dims, value.dtype, "clone")
        assert value.storage is not None
        key = value.storage.number, value.dtype
        if key in self.on_card:
            self.twice.add(key)
            return value
        if _is_small(value):
            return value
        for number in [number for number in self.stash if number <= self.saved - STASH]:
            self._drop(number)
        self.stash[self.saved] = value.detach()
        self.on_card.add(key)
        return Away(self.saved, value.dims, value.dtype, value.node, value.index)

    def _drop(self, number: int) -> None:
        value = self.stash.pop(number)
        assert value.storage is not None
        key = value.storage.number, value.dtype
        if key not in self.twice:
            self.on_card.discard(key)

    def inputs(self, args: tuple[object, ...]) -> Callable[[], tuple[object, ...]]:
        """Saves the input of a checkpoint that is not reentrant, beside an empty tensor (`_NoopSaveInputs`).

        Returns what gives the arguments of the second run.
        """
        self.saved += 1
        at = next(index for index, x in enumerate(args) if type(x) is Tensor)
        packed = tuple(self.pack(x) if index == at else x for index, x in enumerate(args))
        return lambda: self.unpacked(packed)

    def unpacked(self, saved: Sequence[object], node: Node | None = None) -> tuple[object, ...]:
        """Saved tensors on the card again, for the node that is about to run; `node`: it is known, and in no nested backward."""
        if any(type(value) is Away for value in saved):
            self.leaving = self.leaving or ([] if self.tape.nested else [*self.back])
            self.latest = node or self.latest
        return tuple(self._fetched(value) if type(value) is Away else value for value in saved)

    def take_leaving(self) -> list[int] | None:
        """What goes when the node that runs now has run."""
        leaving, self.leaving = self.leaving, None
        return leaving

    def _fetched(self, away: Away) -> Tensor:
        if away.number in self.stash:
            value = self.tape.view_of(self.stash[away.number])  # what a hook returns is copied without its bytes
            return Tensor(value.storage, away.dims, away.dtype, away.node, away.result)
        copy = self.tape.new(away.dims, away.dtype, "to")
        assert copy.storage is not None
        self.tape.streams[copy.storage.number] = COPIES
        self.tape.view_of(copy)  # `as_strided`, which refers to what it views
        self.back[away.number] = copy
        return Tensor(copy.storage, away.dims, away.dtype, away.node, away.result)

    def ran(self, earlier: list[int]) -> None:
        """A node that got tensors back has run."""
        for number in [*self.stash]:
            self._drop(number)
        for number in earlier:
            self.back.pop(number, None)

    def end_backward(self) -> None:
        """Nothing waits any more."""
        self.saved = 0
        self.back.clear()
        self.stash.clear()
        self.on_card.clear()
        self.twice.clear()


def _is_small(x: Tensor) -> bool:
    nbytes = ITEMSIZE[x.dtype]
    for dim in x.dims:
        if not isinstance(dim, int):
            return False
        nbytes *= dim
    return nbytes < LEAST_BYTES

"""What a model is loaded onto: a device that tensors are allocated on, and one that only counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from peftplan.arrays import larger
from peftplan.units import round512

Handle = TypeVar("Handle")


class Memory(Protocol[Handle]):
    """A device that tensors are loaded onto."""

    def allocate(self, nbytes: int) -> Handle:
        """Allocate a tensor; returns its handle."""

    def keep(self, sizes: tuple[int, ...], /) -> None:
        """Allocate tensors that stay."""

    def release(self, tensor: Handle, /) -> None:
        """Free a tensor."""

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`."""


class Loader(Protocol):
    """Loads a model tensor by tensor."""

    def __call__(self, memory: Memory[Handle], /) -> None:
        """Load it."""


def peak_of(load: Loader) -> int:
    """Bytes of the tensors at the highest level of loading."""
    level = Level()
    load(level)
    return level.peak


def left_by(load: Loader) -> int:
    """Bytes of the tensors that loading leaves."""
    level = Level()
    load(level)
    return level.now


STEP = 4
"""Bytes of a step in an optimizer's state: one number in fp32."""


def move_states(memory: Memory[Handle], sizes: Iterable[int]) -> None:
    """accelerate moves states that a constructor made, of these sizes, to the device; torch moves all but the steps back to their
    tensors on the host (accelerate, optimizer.py, `AcceleratedOptimizer`; torch, optim/optimizer.py, `load_state_dict`)."""
    moved = []
    for nbytes in sizes:
        memory.keep((STEP,))
        moved.append(memory.allocate(nbytes))
    for handle in moved:
        memory.release(handle)


class Level:
    """A memory that only counts."""

    def __init__(self) -> None:
        self.now = self._highest = 0
        self._rises = False

    @property
    def peak(self) -> int:
        """The most bytes so far."""
        return larger(self._highest, self.now)

    def allocate(self, nbytes: int) -> int:
        """Count a tensor; what frees it is its size."""
        nbytes = round512(nbytes)
        self.now += nbytes
        self._rises = True
        return nbytes

    def keep(self, sizes: tuple[int, ...], /) -> None:
        """Count tensors for good."""
        for nbytes in sizes:
            self.allocate(nbytes)

    def release(self, tensor: int, /) -> None:
        """Count one less."""
        if self._rises:  # the level is highest where it turns
            self._highest, self._rises = self.peak, False
        self.now -= tensor

    def empty_cache(self) -> None:
        """Nothing."""


class Whole(Generic[Handle]):
    """A memory where what is loaded for good is held by handles, but for the first so many of some sizes, which stay."""

    def __init__(self, memory: Memory[Handle], stays: Mapping[tuple[int, ...], int]) -> None:
        self.memory, self.stays = memory, Counter(stays)
        self.handles: dict[int, list[Handle]] = {}

    def allocate(self, nbytes: int) -> Handle:
        """Allocate a tensor."""
        return self.memory.allocate(nbytes)

    def keep(self, sizes: tuple[int, ...], /) -> None:
        """Allocate tensors that stay until their shards are made."""
        if self.stays[sizes]:
            self.stays[sizes] -= 1
            self.memory.keep(sizes)
        else:
            for nbytes in sizes:
                self.handles.setdefault(nbytes, []).append(self.memory.allocate(nbytes))

    def drop(self, sizes: Iterable[int]) -> None:
        """Free what was loaded first of each size."""
        for nbytes in sizes:
            self.memory.release(self.taken(nbytes))

    def taken(self, nbytes: int) -> Handle:
        """What was loaded first of a size; a new tensor where all of them stay."""
        handles = self.handles.get(nbytes)
        return handles.pop(0) if handles else self.memory.allocate(nbytes)

    def release(self, tensor: Handle, /) -> None:
        """Free a tensor."""
        self.memory.release(tensor)

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`."""
        self.memory.empty_cache()

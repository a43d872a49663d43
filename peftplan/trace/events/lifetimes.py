"""The log of a traced step: the storages that are on the device, and when each is allocated and freed.

Each storage has a weak reference, whose callback is the free. Bytes are those of the storage; rounding is the reader's.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from peftplan.depth.log import Moment, Storage
from peftplan.dtypes import parse_dtype
from peftplan.ledger import Category


def on_rank(tensor: torch.Tensor) -> torch.Tensor:
    """What a rank holds of a tensor: of a DTensor its shard."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


class Ref(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a torch storage that knows its record."""

    __slots__ = ("empty", "node", "record")
    record: Storage
    empty: bool
    """Whether the storage was resized to nothing, which freed its memory, or lies on the host."""
    node: int | None
    """Number of the autograd node whose backward made it."""


class Lifetimes:
    """What is alive, and the log. Who runs, and on which stream, a subclass tells."""

    def __init__(self, *, is_logits: Callable[[torch.Tensor], bool]) -> None:
        self.log: list[Moment] = []
        self.phase = "load"
        self.began: list[tuple[int, str]] = [(0, "load")]
        self._is_logits = is_logits
        self._live: dict[int, Ref] = {}
        self._segment = 0
        self._in_forward = False
        self._paused = 0
        self._count = 0
        self.on_begin: Callable[[], None] = lambda: None
        """Called whenever a phase begins."""

    @property
    def module(self) -> str:
        """The module that is running."""
        raise NotImplementedError

    def stream(self) -> int:
        """The CUDA stream that operations run on now; one GPU has only the default one."""
        return 0

    def begin(self, phase: str) -> None:
        """Begin a phase. The log that follows belongs to it."""
        self.phase = phase
        self.began.append((len(self.log), phase))
        self.on_begin()

    def _add(self, storage: torch.UntypedStorage, tensor: torch.Tensor, *, op: str) -> Storage:
        record = Storage(
            id=self._count,
            nbytes=storage.nbytes(),
            shape=tuple(tensor.shape),
            dtype=parse_dtype(tensor.dtype),
            op=op,
            module=self.module,
            phase=self.phase,
            segment=self._segment,
            in_forward=self._in_forward,
            category="logits" if self._is_logits(tensor) else None,
            stream=self.stream(),
        )
        self._count += 1
        key = storage._cdata
        reference = Ref(storage, lambda ref: self._freed(key, ref))
        reference.record, reference.empty = record, False
        node = torch._C._current_autograd_node()
        reference.node = None if node is None else node._sequence_nr()
        self._live[key] = reference
        self.log.append(Moment("alloc", record, self.phase, record.module))
        return record

    def _replaces(self, reference: Ref) -> bool:
        """Whether a storage that goes lives on as another one, which is taken out of the log."""
        return False

    def _freed(self, key: int, reference: Ref) -> None:
        if self._live.get(key) is reference:
            del self._live[key]
        if not self._replaces(reference) and not reference.empty:
            self.end(reference.record)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has been resized: to nothing, which frees its memory, or from nothing, as FSDP does for a gathered weight."""
        reference = self._live.get(storage._cdata)
        if reference is None or reference.empty == (not storage.nbytes()):
            return
        reference.empty = not reference.empty
        if reference.empty:
            self.end(reference.record)
        else:
            reference.record = replace(
                reference.record, id=self._count, module=self.module, phase=self.phase, segment=self._segment,
                in_forward=self._in_forward, freed_segment=None, stream=self.stream(), category="gathered_weights",
            )  # fmt: skip
            self._count += 1
            self.log.append(Moment("alloc", reference.record, self.phase, self.module))

    def register(self, tensor: torch.Tensor, category: Category, name: str, *, op: str = "load") -> None:
        """Set the category and name of a tensor's storage. A storage that was not seen yet counts as allocated now."""
        with torch._C.DisableTorchFunction():
            tensor = on_rank(tensor)
            storage = tensor.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is None and self._paused:
                return
            record = known.record if known is not None else self._add(storage, tensor, op=op)
        record.category, record.name = category, name

    def on_host(self, tensor: torch.Tensor) -> None:
        """Take the storage of a tensor for one in host memory."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            self._add(storage, tensor, op="host")
        self.log.pop()
        self._live[storage._cdata].empty = True

    def sees(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's storage is on the device."""
        with torch._C.DisableTorchFunction():
            known = self._live.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.empty

    def made_by(self, tensor: torch.Tensor) -> str:
        """The operation that allocated a tensor's storage; empty if it was not seen."""
        with torch._C.DisableTorchFunction():
            known = self._live.get(tensor.untyped_storage()._cdata)
        return "" if known is None else known.record.op

    def of_ones(self, tensor: torch.Tensor) -> bool:
        """Whether every element of a tensor is known to be one."""
        known = self._live.get(tensor.untyped_storage()._cdata)
        return known is not None and known.record.ones

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Remove tensors that are not on the device from the log."""
        references = [self._live.pop(on_rank(tensor).untyped_storage()._cdata, None) for tensor in tensors]
        freed = {id(reference.record) for reference in references if reference is not None}
        if freed:
            positions = [at for at, moment in enumerate(self.log) if id(moment.storage) in freed]
            self.began[:] = [(start - bisect_left(positions, start), phase) for start, phase in self.began]
            self.log[:] = [moment for moment in self.log if id(moment.storage) not in freed]

    def passing(self, *, nbytes: int, shape: tuple[int, ...], dtype: str, op: str, category: Category | None = None) -> Storage:
        """Record an allocation that no tensor of the trace shows; `end` frees it."""
        record = Storage(
            self._count, nbytes, shape, dtype, op, self.module, self.phase, self._segment, self._in_forward, category
        )
        self._count += 1
        self.log.append(Moment("alloc", record, self.phase, record.module))
        return record

    def end(self, record: Storage) -> None:
        """Free what `passing` recorded, or a storage."""
        record.freed_segment = self._segment
        self.log.append(Moment("free", record, self.phase, self.module))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record no new storage: for host tensors."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

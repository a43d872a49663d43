"""What DDP sends in flat tensors: the weights when it is made, and buckets of gradients.

They do not repeat with the layers. So a log has a note of each tensor that is sent, and the flat tensors are made from the notes
of the whole depth, by torch's own function. Source: torch, nn/parallel/distributed.py (`_ddp_init_helper`), distributed/utils.py
(`_sync_module_states`), csrc/distributed/c10d/reducer.cpp (`rebuild_buckets`), comm.cpp (`broadcast_coalesced`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size

from peftplan.depth.log import Moment, Storage
from peftplan.libraries.quantized import TORCH_DTYPES
from peftplan.memory.synced import BROADCAST_BUCKET, send

SENT, REDUCED, BUILT, READY, REBUILT = (f"ddp: {what}" for what in ("sent", "reduced", "built", "ready", "rebuilt"))
"""Notes in a log: a tensor that rank 0 sends; a parameter whose gradient is reduced, in the order of the model; all are said; a
gradient in the order in which they arrive, of which the last step's decides; the buckets follow that order from here on."""
NOTES = frozenset((SENT, REDUCED, BUILT, READY, REBUILT))


@dataclass
class _Flats:
    """The log with flat tensors in place of its notes."""

    first: Sequence[int]
    later: Sequence[int]
    log: list[Moment] = field(default_factory=list)
    noted: dict[str, list[Storage]] = field(default_factory=lambda: {note: [] for note in NOTES})
    buckets: list[Storage] = field(default_factory=list)
    number: int = 0
    at: Moment | None = None

    def note(self, moment: Moment) -> None:
        """Take a note; make what it asks for."""
        self.at, op = moment, moment.storage.op
        self.noted[op].append(moment.storage)
        if op == BUILT:
            send(self, flat_sizes(self.noted[SENT], (BROADCAST_BUCKET,), alone=False))
            self.buckets = [self.allocate(nbytes) for nbytes in flat_sizes(self.noted[REDUCED], self.first)[::-1]]
        elif op == REBUILT:
            for bucket in self.buckets:
                self.release(bucket)
            self.buckets = [
                self.allocate(nbytes) for nbytes in flat_sizes(self.noted[READY][-len(self.noted[REDUCED]) :], self.later)
            ]

    def allocate(self, nbytes: int) -> Storage:
        """A flat tensor."""
        assert self.at is not None
        self.number += 1
        _, noted, phase, module = self.at
        flat = Storage(
            -self.number, nbytes, (nbytes,), "uint8", noted.op, module, phase, noted.segment, noted.in_forward, "communication"
        )
        self.log.append(Moment("alloc", flat, phase, module))
        return flat

    def release(self, flat: Storage) -> None:
        """Free it."""
        assert self.at is not None
        self.log.append(Moment("free", flat, self.at.phase, self.at.module))

    def keep(self, sizes: tuple[int, ...]) -> None:
        """Make flat tensors that stay."""
        for nbytes in sizes:
            self.allocate(nbytes)

    def empty_cache(self) -> None:
        """Does nothing."""


def flat_sizes(tensors: Iterable[Storage], limits: Sequence[int], *, alone: bool = True) -> list[int]:
    """Bytes of each flat tensor of these; 0 for one of a single tensor that need not be flat (`alone`)."""
    every = list(tensors)
    with torch.device("meta"):
        like = [torch.empty(s.shape, dtype=_dtype(s.dtype)) for s in every]
    groups = _compute_bucket_assignment_by_size(like, list(limits))[0] if like else []
    return [sum(every[i].nbytes for i in group) if alone or len(group) > 1 else 0 for group in groups]


def _dtype(name: str) -> torch.dtype:
    """Buffers have dtypes that no weight has."""
    dtype: torch.dtype = TORCH_DTYPES.get(name) or getattr(torch, name)
    return dtype


def with_flats(
    log: Sequence[Moment], began: Sequence[tuple[int, str]], *, first: Sequence[int], later: Sequence[int]
) -> tuple[list[Moment], list[tuple[int, str]]]:
    """The log with flat tensors in place of its notes, and where its phases begin then.

    `first`, `later`: bytes at which buckets are full, before and after their order is known.
    """
    flats, places = _Flats(first, later), []
    for moment in log:
        places.append(len(flats.log))
        if moment.storage.op not in NOTES:
            flats.log.append(moment)
        elif moment.kind == "alloc":
            flats.note(moment)
    places.append(len(flats.log))
    return flats.log, [(places[start], phase) for start, phase in began]

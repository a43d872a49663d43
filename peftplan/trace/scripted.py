"""Behaviour of a hand-written program that no option expresses (`job.script`), in a trace and in the replayed log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import patch

import torch

from peftplan.allocator.events import Event
from peftplan.depth.log import category_of
from peftplan.libraries.replacing import replaced
from peftplan.trace.result import Traced


@contextmanager
def repeating_kv(repeats: bool) -> Iterator[None]:
    """Make transformers' sdpa attention repeat keys and values itself, as without torch's grouped-query kernels."""
    if not repeats:
        yield
        return
    with patch("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *_: False):
        yield


@contextmanager
def masking_unpadded(masks: bool) -> Iterator[None]:
    """transformers' masks as 4.54 to 4.57 made them for a batch that has none (`job.script`: `masks_unpadded`)."""
    older = {
        "transformers.masking_utils.find_packed_sequence_indices": _number_of_sequence,
        "transformers.masking_utils.remap_positions_for_packed_sequence": lambda function, position_ids: function,
    }
    with replaced(older if masks else {}):
        yield


def _number_of_sequence(position_ids: torch.Tensor) -> torch.Tensor:
    """`find_packed_sequence_indices` before `versions.PACKED_POSITIONS_CHECKED`."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def events_of(traced: Traced, *, empties_cache: bool) -> Sequence[Event]:
    """The log for the allocator's replay."""
    return traced.emptied(with_empty_cache(traced) if empties_cache else traced.events)


def with_empty_cache(traced: Traced) -> list[Event]:
    """The log with `empty_cache()` after every step, before the gradients of that step are freed."""
    events: list[Event] = []
    position = 0
    for at in [at for (_, before), (at, phase) in pairwise(traced.began) if (before, phase) == ("step", "forward")]:
        end = at
        while traced.log[end - 1].kind == "alloc":  # the next batch
            end -= 1
        start = end
        while traced.log[start - 1].kind == "free":
            start -= 1
        gradients = [i for i in range(start, end) if category_of(traced.log[i].storage) == "gradients"]
        others = [i for i in range(start, end) if i not in set(gradients)]
        events += traced.events[position:start]
        events += [*(traced.events[i] for i in others), Event("empty_cache", phase="warmup")]
        events += [traced.events[i] for i in gradients]
        position = end
    return [*events, *traced.events[position:]]

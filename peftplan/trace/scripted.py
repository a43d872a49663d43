"""Behaviour of a hand-written program that no option expresses (`job.script`), in a trace and in the replayed log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch

from peftplan.allocator.events import Event
from peftplan.depth.log import category_of
from peftplan.libraries.quantized import TORCH_DTYPES
from peftplan.libraries.replacing import replaced
from peftplan.trace.result import Traced


@contextmanager
def repeating_kv(repeats: bool) -> Iterator[None]:
    """Make transformers' sdpa attention repeat keys and values itself, as without torch's grouped-query kernels, and flash-attn's
    too, as classes of their own did (`versions.KV_GROUPED`).
    """
    if not repeats:
        yield
        return
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.sdpa_attention import repeat_kv
    from transformers.modeling_utils import AttentionInterface

    def repeated(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        return flash_attention_forward(module, query, key, value, *args, **kwargs)

    with (
        patch("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *_: False),
        patch.dict(AttentionInterface._global_mapping, {"flash_attention_2": repeated}),
    ):
        yield


def cache_rotary(model: torch.nn.Module, dtype: str) -> None:
    """Give each layer the cosines and sines of all positions that it kept before `versions.ROTARY_UNCACHED`."""
    attentions: list[Any] = [module for module in model.modules() if hasattr(module, "num_key_value_groups")]
    for attention in attentions:
        for name in ("cos_cached", "sin_cached"):
            rows = attention.config.max_position_embeddings
            table = torch.empty(rows, attention.head_dim, dtype=TORCH_DTYPES[dtype], device="meta")
            attention.register_buffer(name, table, persistent=False)


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

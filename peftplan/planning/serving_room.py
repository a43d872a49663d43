"""Whether what is served fits a card, and how many adapters, tokens and sequences do: exact, by bisection on serving's own sums.

    needed(n, T, b) = base + n · adapter + shared + cache(b, T) + step(b, T) + workspaces + context of the card

n adapters, T tokens of each sequence in the cache, b sequences; step is what decoding one token holds for a moment
(`deployment.decoding`), workspaces are cuBLAS's. Each term grows with n, T and b, so the largest size that fits is where the sum
first exceeds its limit. Left out: what serving leaves out, such as the prompt's activations.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from peftplan.planning.serving_result import Cache, Loaded
from peftplan.planning.serving_verdict import Limits, ServingVerdict
from peftplan.planning.verdicts import capability
from peftplan.results.verdict import TIGHT

if TYPE_CHECKING:
    from peftplan.hardware.gpus import Gpu

MOST_ADAPTERS = 2**20
MOST_SEQUENCES = 2**20
MOST_TOKENS = 2**24
"""Where a search ends that meets no limit of the card or of the model."""


class Served(NamedTuple):
    """What is served: bytes that are loaded, and the cache at any size; sizes that cannot vary have no bound.

    `cache_at`: (sequences, tokens) → the cache, None where the model has none or its bytes are not known. `step_at`: a cache and
    the sequences → what a step of decoding holds for a moment.
    """

    loaded: Loaded
    batch_size: int
    context: int
    cache_at: Callable[[int, int], Cache | None]
    step_at: Callable[[Cache, int], int]
    adapters_bound: int | None
    context_bound: int | None

    def needed(self, *, adapters: int | None = None, context: int | None = None, batch_size: int | None = None) -> int:
        """Device bytes at other sizes than those asked for, without workspaces and the CUDA context."""
        sequences = batch_size or self.batch_size
        cache = self.cache_at(sequences, context or self.context)
        loaded = self.loaded if adapters is None else replace(self.loaded, adapters=adapters)
        stored = loaded.base + loaded.all_adapters
        return stored + (cache.num_bytes + self.step_at(cache, sequences) if cache else 0)


def verdict_on(card: Gpu, served: Served) -> ServingVerdict:
    """The verdict on one card."""
    from peftplan.hardware.context import context_for_verdict, cublas_workspace_bytes
    from peftplan.hardware.usable import usable_bytes

    usable, context = usable_bytes(card), context_for_verdict(card)
    workspaces = cublas_workspace_bytes(capability(card)).bytes or 0
    needed = served.needed() + workspaces + context.bytes
    cache = served.cache_at(served.batch_size, served.context)
    left = usable.bytes - needed
    room = usable.bytes - context.bytes - workspaces
    return ServingVerdict(
        gpu=card.id,
        usable_bytes=usable.bytes,
        usable_source=usable.why,
        verdict="does_not_fit" if left < 0 else "fits" if left >= TIGHT * usable.bytes else "tight",
        needed_bytes=needed,
        step_bytes=served.step_at(cache, served.batch_size) if cache else 0,
        workspace_bytes=workspaces,
        context_bytes=context.bytes,
        context_source=context.why,
        context_assumed=context.assumed,
        most=_limits(served, int(room - TIGHT * usable.bytes)),
        most_tight=_limits(served, room),
    )


def _limits(served: Served, room: int) -> Limits:
    """The largest sizes that need at most `room` bytes."""
    cached = served.context_bound is not None
    sizes: dict[str, tuple[int | None, Callable[[int], int]]] = {
        "adapters": (served.adapters_bound, lambda n: served.needed(adapters=n)),
        "context": (served.context_bound, lambda n: served.needed(context=n)),
        "batch_size": (MOST_SEQUENCES if cached else None, lambda n: served.needed(batch_size=n)),
    }
    most = {name: None if bound is None else _most(needed, room=room, bound=bound) for name, (bound, needed) in sizes.items()}
    bounded = tuple(name for name, (bound, _) in sizes.items() if bound is not None and most[name] == bound)
    return Limits(**most, bounded=bounded)


def _most(needed: Callable[[int], int], *, room: int, bound: int) -> int:
    """The largest n up to `bound` that needs at most `room` bytes; 0 where not even 1 does."""
    return bisect_left(range(1, bound + 1), True, key=lambda n: needed(n) > room)

"""The cards of a request, and whether a job fits each; the catalogue is read only where a card is named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peftplan.errors import InputError
from peftplan.planning.result import TIGHT, Peaks, Verdict

if TYPE_CHECKING:
    from peftplan.hardware.gpus import Gpu


def capability(cards: list[Gpu]) -> str:
    """The CUDA compute capability of the first card, whose kernels a trace takes; a default where it has none."""
    from peftplan.hardware.context import DEFAULT_CAPABILITY

    stated = cards[0].compute_capability if cards else None
    return stated if stated and stated[0].isdigit() else ".".join(map(str, DEFAULT_CAPABILITY))


def find_cards(gpu: str | Iterable[str] | None) -> list[Gpu]:
    """The cards named by `gpu`: one name, several, or none. Raises InputError or UnknownNameError for what names no card."""
    names = (gpu,) if isinstance(gpu, str) else () if gpu is None else tuple(gpu) if isinstance(gpu, Iterable) else (gpu,)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise InputError("gpu", wrong[0], "accepted: names of cards (`peftplan gpus`), or capacities such as 24GiB")
    if not names:
        return []
    from peftplan.hardware.gpus import find_gpu

    return [find_gpu(name) for name in names]


def verdict(card: Gpu, static_bytes: int, peaks: Peaks | None, *, hasty: bool = False) -> Verdict:
    """Reserved bytes and the context, where it is known, against what a program can get of the card.

    Where they are more, the job runs, tightly, if the allocator gets by once it gives cached memory back: a replay with that
    capacity says so. Without a peak only a shortfall is certain: `static_bytes` is a lower bound, as is an incomplete peak.
    `hasty`: peaks whose tensors alone are more are not replayed.
    """
    from peftplan.hardware.context import context_bytes
    from peftplan.hardware.usable import usable_bytes

    usable = usable_bytes(card)
    context = context_bytes(card).bytes if card.capacity_bytes is None else None
    if peaks is not None and peaks.replay and not (hasty and peaks.allocated + (context or 0) > usable.bytes):
        peaks = peaks.replayed
    needed = static_bytes if peaks is None else (peaks.reserved or peaks.allocated) + (context or 0)
    headroom = usable.bytes - needed
    if headroom < 0 and peaks is not None and peaks.runs_within is not None and not peaks.incomplete:
        least = usable.bytes - peaks.allocated - (context or 0)
        if least >= 0 and peaks.runs_within(usable.bytes - (context or 0)):
            return Verdict(card.id, usable.bytes, usable.why, "tight", least, context)
    if headroom < 0:
        word = "does_not_fit"
    elif peaks is None or peaks.incomplete:
        word = "unknown"
    else:
        word = "fits" if headroom >= TIGHT * usable.bytes else "tight"
    return Verdict(card.id, usable.bytes, usable.why, word, headroom, context)

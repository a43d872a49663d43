"""The events of a run: what was allocated and freed, in order, with labels."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Kind = Literal["alloc", "free", "empty_cache", "mark"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Event(NamedTuple):
    """One event. `id` names an allocation while it lives; `nbytes` is what was asked for, before rounding.

    Labels are opaque; every event carries its phase, frees too.
    """

    kind: Kind
    id: int = 0
    nbytes: int = 0
    stream: int = 0
    phase: str = ""
    op: str = ""
    module: str = ""
    category: str = ""
    name: str = ""

"""Whether what is served fits a card, as data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Limits(NamedTuple):
    """The largest number of adapters, of tokens in the cache of each sequence, and of sequences, the others as asked for.

    0 where nothing fits, None where there is none, or where its bytes are not known. `bounded` names those whose search ended
    before the card was full: at the positions of the model, or at 2²⁰ adapters and sequences.
    """

    adapters: int | None
    context: int | None
    batch_size: int | None
    bounded: tuple[str, ...] = ()


class ServingVerdict(NamedTuple):
    """Whether what is served fits one card: `fits` leaves at least 5 % of the usable bytes, `tight` less, `does_not_fit` none.

    `needed_bytes` are base, adapters and cache, temporaries of decoding a token (`step_bytes`), cuBLAS's workspaces and
    the CUDA context. `most` are the largest sizes that fit, `most_tight` those that leave less than 5 %.
    """

    gpu: str
    usable_bytes: int
    usable_source: str
    verdict: str
    needed_bytes: int
    step_bytes: int
    workspace_bytes: int
    context_bytes: int
    context_source: str
    context_assumed: bool
    most: Limits
    most_tight: Limits

    @property
    def headroom_bytes(self) -> int:
        """What is left of the usable bytes; negative where more is needed."""
        return self.usable_bytes - self.needed_bytes

    def to_dict(self) -> dict[str, object]:
        """One entry of `gpus` in the JSON."""
        facts = {name: value for name, value in self._asdict().items() if name not in ("gpu", "most", "most_tight")}
        limits = {name: {**limits._asdict(), "bounded": [*limits.bounded]} for name, limits in self._limits()}
        return {"name": self.gpu, **facts, "headroom_bytes": self.headroom_bytes, **limits}

    def _limits(self) -> Iterable[tuple[str, Limits]]:
        return (("most", self.most), ("most_tight", self.most_tight))

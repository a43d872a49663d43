"""What would make a job fit a card, as data: each change with what it saves."""

from __future__ import annotations

from typing import NamedTuple

FITS = ("fits", "tight")


class Advice(NamedTuple):
    """One change, or several together. `tensor_bytes` are those of the tensors at the peak, and `saving_bytes` how many fewer.

    Of what was replayed, `verdict`, `peak_allocated` and `headroom_bytes` are what `estimate` says with these options, and
    `saving_bytes` is the difference of the peaks. What was not replayed may fit (`verdict` None), or its tensors alone are too
    large (`does_not_fit`). Beside keys of a file that raise the peak, or may, what fits without them may fit.
    """

    options: dict[str, object]
    saving_bytes: int
    tensor_bytes: int
    verdict: str | None
    peak_allocated: int | None = None
    headroom_bytes: int | None = None

    def to_dict(self) -> dict[str, object]:
        """One entry of a card's `advice` in the JSON."""
        return self._asdict()


class Advised(NamedTuple):
    """What is said of a card that a job does not fit."""

    changes: tuple[Advice, ...] = ()
    """The first one makes the job fit, if any does; then by what they save."""
    weights_alone: int | None = None
    """Bytes of the base's weights, however they are stored here, where these alone are more than the card has."""
    smallest_card: str | None = None
    """The smallest card that the job fits as it is; only looked for where no change helps."""
    several_gpus: Advice | None = None
    """The fewest GPUs of the card that run a job of one GPU, divided by FSDP2; only looked for where no change helps that leaves
    the method, its target modules and the data as they are."""
    everything: bool = False
    """Whether all was searched."""
    lower_bound: bool = False
    """Whether the job may need more than its peak says: what fits without that may fit, `smallest_card` too."""

    def saving_from(self, peak: int) -> Advised:
        """With the savings of replayed changes counted from the job's own peak, which is replayed too."""

        def counted(change: Advice) -> Advice:
            after = change.peak_allocated
            return change if after is None else change._replace(saving_bytes=peak - after)

        several = None if self.several_gpus is None else counted(self.several_gpus)
        return self._replace(changes=tuple(map(counted, self.changes)), several_gpus=several)

    def uncertain(self) -> Advised:
        """For a job of which a part is not counted, such as keys of its file: what fits without it may fit."""

        def may_fit(change: Advice) -> Advice:
            return change._replace(verdict=None, headroom_bytes=None) if change.verdict in FITS else change

        several = None if self.several_gpus is None else may_fit(self.several_gpus)
        return self._replace(changes=tuple(map(may_fit, self.changes)), several_gpus=several, lower_bound=True)

    def rows(self, most: int | None = None) -> tuple[Advice, ...]:
        """The changes, at most so many, and several GPUs last."""
        return (*self.changes[:most], *([] if self.several_gpus is None else [self.several_gpus]))

    @property
    def counted(self) -> bool:
        """Whether the job has formulas, so that something can be said."""
        return self._replace(lower_bound=False) != Advised()

    @property
    def helps(self) -> bool:
        """Whether some change makes the job fit, or may though it was replayed."""
        replayed = (change.verdict for change in self.changes if change.peak_allocated is not None)
        return any(verdict is None or verdict in FITS for verdict in replayed)

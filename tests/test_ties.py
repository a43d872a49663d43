"""Where two phases, or two moments of one, peak alike, the earlier one counts: of results, of formulas and of a trace."""

from __future__ import annotations

import pytest

from peftplan.ledger import Ledger, Line
from peftplan.memory.timeline import Kind, Timeline
from peftplan.memory.waves import waves_of
from peftplan.results.peaks import PHASES, Peaks


def of(nbytes: int) -> Ledger:
    """A ledger of so many bytes."""
    return Ledger((Line("x", "activations", "uint8", (nbytes,), 1, "a test"),))


@pytest.mark.parametrize(("largest", "phase"), [(PHASES, "load"), (PHASES[1:], "forward"), (("backward", "step"), "backward")])
def test_of_phases_that_peak_alike_the_earlier_one_is_named(largest: tuple[str, ...], phase: str) -> None:
    peaks = Peaks(ledgers={name: of(1024 if name in largest else 512) for name in reversed(PHASES)})
    assert (peaks.phase, peaks.allocated) == (phase, 1024)


TWO_MICRO_BATCHES = (("forward", 0, 2), ("backward", 2, 4), ("forward", 4, 6))


@pytest.mark.parametrize(
    ("windows", "times", "peaks"),
    [
        (TWO_MICRO_BATCHES, 3, {"forward": (1536, 1), "backward": (1536, 3)}),
        ((("forward", 0, 6),), 3, {"forward": (1536, 1)}),
        ((("forward", 0, 200),), 100, {"forward": (1536, 1)}),
    ],
    ids=("of two micro-batches", "of one phase", "of many layers"),
)
def test_of_moments_that_peak_alike_the_earlier_one_counts(
    windows: tuple[tuple[str, int, int], ...], times: int, peaks: dict[str, tuple[int, int]]
) -> None:
    """One tensor is made and freed again and again."""
    counts, move_of = (1, -1), (0, 1) * times
    timeline = Timeline(
        kinds=(Kind("x", "activations", "fp32", (128,)),),
        sources=("a test",),
        events=((0, 1), (0, -1)) * times,
        windows=windows,
        sizes=((512, ()),),
        size_of=(0,),
        moves=((0, 1), (0, -1)),
        move_of=move_of,
        waves=waves_of(move_of, counts, windows),
    )
    assert timeline.peaks({}, standing=1024) == peaks


def test_a_trace_names_what_is_alive_at_the_earlier_moment() -> None:
    pytest.importorskip("torch")
    from peftplan.depth.log import Moment, Storage
    from peftplan.trace.events.peaks import Window, peaks

    first, second = (Storage(n, 512, (128,), "fp32", f"op {n}", "", "forward", 0, True) for n in (1, 2))
    log = [Moment(kind, storage, "forward", "") for storage in (first, second) for kind in ("alloc", "free")]
    (alive,) = peaks(log, [Window("forward", 0, 4)])["forward"].alive
    assert alive.op == "op 1"

"""Verdicts at their edges, by hand: 1 GiB = 1,073,741,824 bytes, of which 5 % are 53,687,091.2."""

from __future__ import annotations

import pytest

from peftplan.hardware.gpus import find_gpu
from peftplan.memory.ledger import Ledger, Line
from peftplan.planning.result import PHASES, Peaks
from peftplan.planning.verdicts import verdict

ALIVE = Ledger((Line("w", "weights", "uint8", (512,), 1, "by hand"),))


def peaks(reserved: int, *incomplete: str) -> Peaks:
    return Peaks(dict.fromkeys(PHASES, ALIVE), reserved, "by hand", incomplete)


@pytest.mark.parametrize(
    ("reserved", "left", "word"),
    [
        (1_020_054_732, 53_687_092, "fits"),
        (1_020_054_733, 53_687_091, "tight"),
        (1_073_741_824, 0, "tight"),
        (1_073_741_825, -1, "does_not_fit"),
    ],
)
def test_a_peak_against_a_capacity(reserved: int, left: int, word: str) -> None:
    found = verdict(find_gpu("1GiB"), 512, peaks(reserved))
    assert (found.headroom_bytes, found.verdict) == (left, word)


def test_an_incomplete_peak_is_a_lower_bound() -> None:
    assert verdict(find_gpu("1GiB"), 512, peaks(2**20, "a value")).verdict == "unknown"
    assert verdict(find_gpu("1GiB"), 512, peaks(2**31, "a value")).verdict == "does_not_fit"


def test_without_a_peak_only_a_shortfall_is_certain() -> None:
    assert verdict(find_gpu("1GiB"), 2**30, None).verdict == "unknown"
    assert verdict(find_gpu("1GiB"), 2**30 + 512, None).verdict == "does_not_fit"


def test_a_known_context_is_taken_off() -> None:
    # T4: CUDA reports 14,912 MiB, and a training process held a context of 140.875 MiB = 147,718,144 bytes
    found = verdict(find_gpu("t4"), 512, peaks(10**9))
    assert found.headroom_bytes == 14_912 * 2**20 - 10**9 - 147_718_144

"""Peaks added up wave by wave, against the plain sum of every event."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod

import pytest

from peftplan import estimate
from peftplan.analytic.compiled import last_step
from peftplan.analytic.instant import InstantPeaks
from peftplan.memory import packed_waves
from peftplan.memory.packed_waves import added_up
from peftplan.memory.timeline import Timeline
from peftplan.memory.waves import waves_of

Windows = Sequence[tuple[str, int, int]]


def plain(move_of: Sequence[int], moves: Sequence[int], windows: Windows, standing: int) -> dict[str, tuple[int, int]]:
    """Phase → the highest of all levels in its windows, and the first event that reaches it."""
    levels = list(accumulate((moves[move] for move in move_of), initial=standing))
    by_phase: dict[str, tuple[int, int]] = {}
    for phase, start, end in windows:
        best = max(levels[start : end + 1])
        if best > by_phase.get(phase, (-1, 0))[0]:
            by_phase[phase] = best, levels.index(best, start)
    return by_phase


@pytest.mark.parametrize("seed", range(40))
def test_random_events(seed: int) -> None:
    """Layers of a few events that repeat, tensors without bytes, windows of one phase twice, and empty ones."""
    dice = random.Random(seed)
    counts = [dice.choice((-2, -1, 1, 1, 3)) for _ in range(6)]
    sizes = [dice.choice((0, 1, 5, 7)) for _ in counts]
    layers = [[dice.randrange(6) for _ in range(dice.randint(0, 9))] for _ in range(3)]
    move_of = [move for _ in range(dice.randint(0, 90)) for move in dice.choice(layers)]
    ends = sorted(dice.randint(0, len(move_of)) for _ in range(4))
    windows = [(dice.choice("ab"), start, end) for start, end in pairwise(ends)]
    moves = [count * size for count, size in zip(counts, sizes, strict=True)]
    assert waves_of(move_of, counts, windows).peaks(moves, 11) == plain(move_of, moves, windows, 11)


@pytest.mark.skipif(packed_waves.levels is None, reason="no compiled module was built")
@pytest.mark.parametrize("seed", range(40))
def test_random_events_added_up_by_the_compiled_module(seed: int) -> None:
    dice = random.Random(seed)
    sizes = [(dice.choice((0, 1, 700)), dice.choice(((), ("b",), ("b", "s"), ("s",)))) for _ in range(6)]
    moves = [(size, dice.choice((-2, -1, 1, 1, 3))) for size in range(6)]
    move_of = [move for _ in range(dice.randint(0, 90)) for move in dice.choices(range(6), k=dice.randint(0, 9))]
    ends = sorted(dice.randint(0, len(move_of)) for _ in range(4))
    windows = tuple((dice.choice("ab"), start, end) for start, end in pairwise(ends))
    waves = waves_of(move_of, [count for _, count in moves], windows)
    timeline = Timeline((), (), (), windows, sizes=tuple(sizes), size_of=(3, 1, 1, 0), moves=tuple(moves), waves=waves)
    named = {"b": dice.randint(1, 9), "s": dice.randint(1, 5000)}
    interpreted = timeline.peaks(named, 11), list(timeline.requested(named))
    assert added_up(timeline, named, 11) is not None
    assert (timeline.peaks(named, 11), list(timeline.requested(named))) == interpreted
    other = {"b": 7, "s": 123}
    rounded = [-(-nbytes * prod(other[name] for name in names) // 512) * 512 for nbytes, names in sizes]
    assert timeline.peaks(other, 5) == plain(move_of, [count * rounded[size] for size, count in moves], windows, 5)
    large = {"b": 1, "s": 1 << 70}
    assert timeline.peaks(large, 11) == timeline._replace(waves=waves._replace()).peaks(large, 11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "qlora", "gpus": 8, "strategy": "fsdp2", "quant_storage": "bf16"},
        {"method": "full", "gpus": 2, "strategy": "zero2"},
        {"method": "full", "gpus": 2},
        {"method": "ia3", "trainer": "trl"},
        {"method": "full", "gradient_checkpointing": False, "trainer": "plain"},
    ],
)
def test_a_step_of_a_model(options: dict[str, object]) -> None:
    peaks = estimate("qwen3-0.6b", **options).peaks
    assert isinstance(peaks, InstantPeaks)
    compiled, named = last_step(peaks.inventory, peaks.compute_capability)
    timeline = compiled.timeline
    sizes = [-(-nbytes // 512) * 512 for nbytes in timeline._evaluated(named)]
    moves = [count * sizes[place] for place, count in timeline.moves]
    assert timeline.peaks(named, 7) == plain(timeline.move_of, moves, timeline.windows, 7)


def test_layers_are_added_up_once() -> None:
    """Eighty layers of four waves: two stretches hold them, with and without what comes before the first."""
    layer = (0, 1, 3, 2, 3, 4, 0, 5, 3)
    counts = (1, 1, 1, -1, -2, -1)
    waves = waves_of((0, 1, *layer * 80), counts, [("forward", 0, 722)])
    assert len(waves.stretches) <= 3
    assert sum(map(len, waves.stretches)) < 20

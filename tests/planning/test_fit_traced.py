"""`fit --engine trace` and `compare --engine trace`: few traces, and what they say is what direct traces say."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

import peftplan
from peftplan.planning.fit_traced import largest_traced
from peftplan.planning.largest import Largest, Probe
from tests.cli.run import run

NEO: dict[str, Any] = {
    "model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "hidden_size": 64, "num_layers": 2, "num_heads": 4,
    "intermediate_size": 256, "vocab_size": 512, "max_position_embeddings": 256, "window_size": 64,
    "attention_types": [[["global", "local"], 1]], "tie_word_embeddings": True,
}  # fmt: skip
"""A family without formulas."""


def card(limit: int, sizes: list[int]) -> Callable[[int], Probe]:
    """A card that takes sizes up to `limit`, ten bytes each."""

    def probe(size: int) -> Probe:
        sizes.append(size)
        return Probe(size <= limit, 10 * size, 10 * size, 10 * limit + 5)

    return probe


@pytest.mark.parametrize("seed", range(40))
def test_the_largest_size_is_found_from_any_guess(seed: int) -> None:
    dice = random.Random(seed)
    smallest, ceiling = dice.choice((1, 1, 100)), dice.choice((100, 1000, 70_000))
    limit, guess = dice.randint(0, ceiling + 10), dice.randint(0, ceiling + 10)
    sizes: list[int] = []
    answer = largest_traced(card(limit, sizes), smallest=smallest, ceiling=ceiling, guess=guess)
    if limit < smallest:
        assert answer == Largest(0, smallest)
    else:
        assert answer == Largest(min(limit, ceiling), min(limit, ceiling), bounded=limit >= ceiling)
    assert len(sizes) == len(set(sizes)) <= 40
    assert all(smallest <= size <= ceiling for size in sizes)


def test_a_right_guess_takes_two_traces() -> None:
    sizes: list[int] = []
    assert largest_traced(card(12, sizes), smallest=1, ceiling=1000, guess=12).size == 12
    assert sorted(sizes) == [12, 13]


def test_a_job_without_formulas_is_fitted_by_traces() -> None:
    pytest.importorskip("transformers")
    job: dict[str, Any] = {"method": "lora", "seq_len": 128, "trainer": "plain"}
    with pytest.raises(peftplan.RefusedError, match="no formula for activations of model type gpt_neo; add --engine trace"):
        peftplan.fit(NEO, gpu="1GiB", **job)
    told: list[str] = []
    result = peftplan.fit(NEO, gpu="1GiB", engine="trace", progress=lambda what, share: told.append(what), **job)
    (plan,) = result.plans
    verdicts = [
        peftplan.estimate(NEO, gpu="1GiB", engine="trace", batch_size=size, **job).gpus[0].verdict
        for size in (plan.batch_size, plan.batch_size + 1)
    ]
    assert verdicts[0] == "fits" != verdicts[1]
    assert plan.binding is not None
    assert told[0].startswith("batch size 4: ")
    assert result.to_dict()["engine"] == "trace"


def test_traced_methods_are_compared() -> None:
    pytest.importorskip("transformers")
    result = peftplan.compare(NEO, methods=("lora", "full"), gpu="t4", engine="trace", seq_len=128, batch_size=2)
    for row in result.rows:
        alone = peftplan.estimate(NEO, method=row.method, gpu="t4", engine="trace", seq_len=128, batch_size=2)
        assert alone.peaks is not None
        assert (row.peak_allocated, row.needed_bytes) == (alone.peaks.allocated, alone.gpus[0].needed_bytes)
    assert result.to_dict()["engine"] == "trace"
    assert result.rows[0].adapter_bytes


def test_a_sweep_says_what_traces_instead() -> None:
    for module in ("numpy", "transformers", "torch"):
        pytest.importorskip(module)
    done = run("sweep", "gpt2", "--engine", "trace")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("peftplan: --engine: 'trace' is not valid; accepted: analytic; `peftplan estimate --engine trace`")
    rows = peftplan.sweep(NEO, batch_size=[1, 2], seq_len=128).records()
    assert all("no formula for activations of model type gpt_neo; `peftplan estimate" in row["error"] for row in rows)

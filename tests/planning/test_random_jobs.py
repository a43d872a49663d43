"""A seeded sample of `tools.random_jobs`: the formulas against the trace, and counts against peft's own."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from tools.random_adapters import compare_counts
from tools.random_draws import draw_job
from tools.random_jobs import outcome, report

SEED, JOBS, ADAPTERS = 7, 10, 20


@pytest.mark.parametrize("number", range(JOBS))
def test_a_random_job_is_within_the_tolerances(number: int) -> None:
    answer = outcome(number, draw_job(SEED, number))
    said = "\n".join(report([answer]))
    assert answer.kind() != "one alone", said
    assert answer.beyond() <= 1, said


def test_random_adapter_configs_have_pefts_counts() -> None:
    assert [said.text for said in compare_counts(SEED, ADAPTERS) if said.fault] == []

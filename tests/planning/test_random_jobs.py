"""A seeded sample of `tools.random_jobs`: the formulas against the trace, and counts against peft's own."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from tools.random_adapters import compare_counts, draw_adapter
from tools.random_draws import draw_job
from tools.random_jobs import outcome, report

SEED, JOBS, ADAPTERS = 7, 10, 20


@pytest.mark.parametrize("number", range(JOBS))
def test_a_random_job_is_within_the_tolerances(number: int) -> None:
    answer = outcome(number, draw_job(SEED, number))
    text = "\n".join(report([answer]))
    assert answer.kind() != "one alone", text
    assert answer.beyond() <= 1, text


def test_random_adapter_configs_have_pefts_counts() -> None:
    assert [row.text for row in compare_counts(SEED, ADAPTERS) if row.fault] == []


def test_every_drawn_adapter_has_a_model_that_is_read() -> None:
    """Among them DistilBERT's: a width of the MLP that its class does not read is drawn again."""
    drawn = [draw_adapter(31, number)[0] for number in range(60)]
    assert any(config["model_type"] == "distilbert" and config["hidden_dim"] != 3072 for config in drawn)


def test_a_drawn_vocabulary_holds_the_special_tokens_of_the_configs_class() -> None:
    """A padding index beyond the vocabulary is refused by torch, so that the job would score nothing."""
    transformers = pytest.importorskip("transformers")
    for number in range(12):
        config = draw_job(2026, number, model_types=["whisper"]).config
        of_class = transformers.WhisperConfig(**config)
        assert max(of_class.pad_token_id, of_class.bos_token_id, of_class.decoder_start_token_id) < config["vocab_size"], number

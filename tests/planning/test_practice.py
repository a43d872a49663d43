"""Advice from practice: every row has a source, names what exists here, and is found by topic, method and option."""

from __future__ import annotations

import json

import pytest

import peftplan
from peftplan.errors import InputError
from peftplan.job.setup import Setup
from peftplan.methods import METHODS, config_class, method_named
from peftplan.planning.practice import practices
from tests.cli.run import run


def test_every_row_names_its_source_and_known_methods() -> None:
    for row in peftplan.practices():
        assert row.title
        assert row.year >= 2021
        assert row.url.startswith("https://")
        assert set(row.methods) <= METHODS.keys()
        assert row.advice.endswith(".")
        assert row.where
        assert 2 <= len(row.says.split()) <= 20


def test_options_exist() -> None:
    for row in peftplan.practices():
        for method in row.methods if row.option else ():
            fields = {**Setup.model_fields, **config_class(method_named(method)).model_fields}
            known = row.option in fields or row.option in config_class(method_named(method)).no_effect
            assert known, (row.option, method)


@pytest.mark.parametrize(
    ("about", "topics"),
    [("rank", {"rank"}), ("r", {"rank"}), ("learning-rate", {"learning rate"}), ("lora_alpha", {"alpha"}), ("ia3", {"method"})],
)
def test_rows_are_found(about: str, topics: set[str]) -> None:
    assert {row.topic for row in peftplan.practices(about)} == topics


def test_an_unknown_word_is_one_line() -> None:
    done = run("advise", "ranks")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "did you mean rank" in done.err


@pytest.mark.parametrize("model", ["llama-3.1-8b", "meta-llama/Llama-3.1-8B"])
def test_a_model_is_told_from_a_wrong_word(model: str) -> None:
    with pytest.raises(
        InputError, match="is not valid; it is a model, and this advice is the same for all models; accepted: method, targets"
    ):
        practices(model)


def test_advice_is_told_apart_from_numbers() -> None:
    out = run("advise", "qlora").out
    assert out.splitlines()[0] == "Advice published by others; none of peftplan's numbers depend on it."
    assert "https://arxiv.org/abs/2305.14314" in out
    (row, *_) = json.loads(run("advise", "dropout", "--format", "json").out)
    assert (row["option"], row["value"], row["methods"]) == ("lora_dropout", 0.1, ["qlora"])

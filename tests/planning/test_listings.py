"""Lists of models, cards and methods from Python: what the commands list, as records."""

from __future__ import annotations

import json
import sys

import pytest

import peftplan
from tests.cli.run import run


def test_models_are_those_of_the_command() -> None:
    listed = json.loads(run("models", "qwen3", "--format", "json").out)
    assert [model.name for model in peftplan.models("qwen3")] == [row["name"] for row in listed]
    assert peftplan.models("qwen3").records()[0]["num_parameters"] == listed[0]["num_parameters"]


def test_cards_say_what_a_program_can_get() -> None:
    (card, *_) = peftplan.gpus("a100-40gb")
    listed = json.loads(run("gpus", "a100-40gb", "--format", "json").out)
    assert (card.id, card.usable_bytes) == (listed[0]["id"], listed[0]["usable_bytes"])


def test_methods_are_called_though_a_package_has_their_name() -> None:
    names = [method.name for method in peftplan.methods()]
    assert names[:2] == ["full", "lora"]
    assert names == list(peftplan.methods.METHODS)


def test_a_table_without_pandas_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(peftplan.PeftplanError, match="to_dataframe needs pandas: pip install pandas"):
        peftplan.models("qwen3").to_dataframe()


def test_a_table_has_a_row_per_record() -> None:
    pytest.importorskip("pandas")
    assert list(peftplan.methods().to_dataframe()["name"]) == [method.name for method in peftplan.methods()]

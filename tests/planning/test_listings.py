"""Lists of models, cards and methods from Python: what the commands list, as records."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

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


@pytest.mark.parametrize("wrong", [1, float("nan"), b"x", {1: 2}, [[]], len])
@pytest.mark.parametrize(
    "ask",
    [
        peftplan.models,
        peftplan.gpus,
        peftplan.practices,
        peftplan.read_config,
        peftplan.configs,
        lambda wrong: peftplan.estimate(config=wrong),
        peftplan.advice,
        peftplan.explain,
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(ask: Callable[[Any], object], wrong: Any) -> None:
    with pytest.raises(peftplan.InputError) as error:
        ask(wrong)
    assert "\n" not in str(error.value)


def test_the_class_of_a_script_is_public() -> None:
    now, before = (
        peftplan.estimate("smollm2-135m", script=script).peaks
        for script in (peftplan.Script(), peftplan.Script(transformers="4.40"))
    )
    assert now is not None
    assert before is not None
    assert before.allocated > now.allocated
    with pytest.raises(peftplan.InputError, match=r"accepted: a peftplan\.Script"):
        peftplan.estimate("smollm2-135m", script=1)  # type: ignore[arg-type]

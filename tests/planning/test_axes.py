"""Axes of a grid: which values lists, ranges and text stand for, and what is none."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import InputError
from peftplan.planning.axes import Each, separated, values_of


@pytest.mark.parametrize(
    ("value", "values"),
    [
        ("1,2,4", [1, 2, 4]),
        ("512:2048:512", [512, 1024, 1536, 2048]),
        ("512:2047:512", [512, 1024, 1536]),
        ("3:5", [3, 4, 5]),
        ("7:7", [7]),
        ("1,2,4:16:4", [1, 2, 4, 8, 12, 16]),
        ("1, 2,1", [1, 2]),
        ([1, "2,4", "8:16:8"], [1, 2, 4, 8, 16]),
        (range(1, 4), [1, 2, 3]),
        ([True, False], [True, False]),
        ([1, True], [1, True]),
        ("0:0.1:0.05", [0.0, 0.05, 0.1]),
        (["nf4", None], ["nf4", None]),
        ("bf16,fp16", ["bf16", "fp16"]),
    ],
)
def test_values_of_an_option(value: Any, values: list[Any]) -> None:
    assert list(values_of("seq_len", value) or ()) == values


@pytest.mark.parametrize("value", [1, "1", "nf4", None, "C:/models/llama", {"a": 1}, 1.5])
def test_a_single_value_is_no_axis(value: Any) -> None:
    assert values_of("model", value) is None


def test_a_list_is_one_value_of_an_option_that_takes_lists() -> None:
    assert values_of("target_modules", "q_proj,v_proj") is None
    assert values_of("target_modules", ["q_proj", "v_proj"]) is None
    assert list(values_of("target_modules", [["q_proj"], ["q_proj", "v_proj"]]) or ()) == [["q_proj"], ["q_proj", "v_proj"]]
    assert list(values_of("target_modules", Each(("attention", "q_proj,v_proj"))) or ()) == ["attention", "q_proj,v_proj"]


def test_arrays_are_axes() -> None:
    numpy = pytest.importorskip("numpy")
    assert list(values_of("r", numpy.array([8, 16])) or ()) == [8, 16]
    assert values_of("r", numpy.array(8)) is None


def test_one_value_in_a_list_is_no_axis() -> None:
    assert separated({"r": [8], "seq_len": "512:1024:512", "method": "lora"}) == (
        {"seq_len": range(512, 1025, 512)},
        {"r": 8, "method": "lora"},
    )


def test_a_range_is_not_written_out() -> None:
    values = values_of("seq_len", "1:1000000000")
    assert isinstance(values, range)
    assert len(values) == 10**9


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("512:256:64", "ends before it begins"),
        ("512:1024:0", "step must be above 0"),
        ("512:1024:-64", "step must be above 0"),
        ("512:x", "START:STOP"),
        ("1:2:3:4", "START:STOP"),
        ("1,,2", "commas between them"),
        (",", "commas between them"),
        ([], "at least one value"),
        (range(0), "at least one value"),
        ([[1], 2], "a list of values"),
        ("1:9999999,5", "one range alone"),
    ],
)
def test_what_is_no_value_is_said_in_one_line(value: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        values_of("seq_len", value)

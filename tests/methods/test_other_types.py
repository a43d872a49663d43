"""The peft types without formulas here: by name through the same call, counted by the installed peft."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("peft")

import peft

import peftplan
from peftplan import datafiles
from peftplan.methods import METHODS, OTHER_PEFT_TYPES
from tests.cli.run import run

ROWS = (datafiles.DATA / "published" / "peft_metamath.jsonl").read_text(encoding="utf-8").splitlines()


def test_every_type_of_peft_has_a_name() -> None:
    if peft.__version__ != datafiles.load("peft_targets.json", dict)["peft"]:
        pytest.skip("another version of peft has other types")
    ours = {method.peft_type for method in METHODS.values()} - {None}
    assert ours | set(OTHER_PEFT_TYPES) == {t.value for t in peft.PeftType}
    assert not ours & set(OTHER_PEFT_TYPES)


def test_a_name_counts_as_the_published_run_did() -> None:
    rows = {row["experiment"]: row for row in map(json.loads, ROWS)}
    published = rows["miss/llama-3.2-3B-default"]
    estimate = peftplan.estimate("llama-3.2-3b", method="MiSS", r=64)
    assert (estimate.trainable_parameters, estimate.total_parameters) == (
        published["num_trainable_params"],
        published["num_total_params"],
    )
    assert estimate.method["name"] == "miss"


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (("--r", "4"), {"r": 4}),
        (("--target-modules", "q_proj,v_proj"), {"target_modules": ["q_proj", "v_proj"]}),
        (("--target-modules", "all-linear"), {"target_modules": "all-linear"}),
        (("--modules-to-save", "lm_head"), {"modules_to_save": ["lm_head"]}),
        (("--exclude-modules", "v_proj"), {"exclude_modules": ["v_proj"]}),
    ],
)
def test_options_of_the_command_line_are_no_text_to_peft(options: tuple[str, ...], same: dict[str, Any]) -> None:
    """peft compares `r` with numbers, and reads the letters of a `modules_to_save` that is one string as names."""
    typed = json.loads(run("estimate", "qwen3-0.6b", "--method", "hra", *options, "--format", "json").out)
    estimate = peftplan.estimate("qwen3-0.6b", method="hra", **same)
    assert typed["trainable_parameters"] == estimate.trainable_parameters


def test_a_number_that_is_none_is_one_line() -> None:
    done = run("estimate", "qwen3-0.6b", "--method", "hra", "--r", "four")
    assert done.err == "peftplan: --r must be a whole number (got 'four')\n"


def test_an_option_that_peft_does_not_know_is_one_line() -> None:
    with pytest.raises(peftplan.PeftplanError, match=r"^[^\n]*nonsense[^\n]*$"):
        peftplan.estimate("llama-3.2-3b", method="miss", nonsense=1)

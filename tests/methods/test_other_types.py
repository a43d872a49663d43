"""The peft types without formulas here: by name through the same call, counted by the installed peft."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft")

import peft

import peftplan
from peftplan import datafiles
from peftplan.methods import METHODS, OTHER_PEFT_TYPES

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


def test_an_option_that_peft_does_not_know_is_one_line() -> None:
    with pytest.raises(peftplan.PeftplanError, match=r"^[^\n]*nonsense[^\n]*$"):
        peftplan.estimate("llama-3.2-3b", method="miss", nonsense=1)

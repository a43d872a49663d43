"""A trainer is a record of facts: its name is compared nowhere else, and the records say what the names stand for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import peftplan
from peftplan.errors import InputError
from peftplan.job.trainer_words import TrainerName
from peftplan.job.trainers import CHUNKED, DEFAULT, TRAINERS

PACKAGE = Path(peftplan.__file__).parent
HOME = PACKAGE / "job" / "trainers.py"
NOT_OF_TRAINERS = ("variant",)
"""Names of what else may be called as a trainer is: an MLP's variant is `plain` too."""


def compared(tree: ast.AST) -> Iterator[str]:
    """Where a string that is a trainer's name is compared, matched, or takes a part of a condition."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            of_others = any(isinstance(side, ast.Attribute) and side.attr in NOT_OF_TRAINERS for side in sides)
            texts = () if of_others else [n for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant)]
        elif isinstance(node, ast.MatchValue):
            texts = [n for n in ast.walk(node) if isinstance(n, ast.Constant)]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            texts = [key for key in node.value.keys if isinstance(key, ast.Constant)]
        else:
            continue
        yield from (f"{text.lineno}: {text.value}" for text in texts if text.value in TRAINERS)


def test_no_other_code_compares_a_trainers_name() -> None:
    assert [
        f"{file.relative_to(PACKAGE)}:{where}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != HOME
        for where in compared(ast.parse(file.read_text(encoding="utf-8")))
    ] == []


@pytest.mark.parametrize(
    "planted",
    [
        "clips = setup.trainer != 'plain'",
        "if setup.trainer in ('trl', 'plain'): pass",
        "match setup.trainer:\n    case 'trl': pass",
        "f = {'plain': 1, 'trl': 2}[setup.trainer]",
        "x = 'qlora-paper' == name",
    ],
)
def test_a_planted_comparison_is_found(planted: str) -> None:
    assert [*compared(ast.parse(planted))]


def test_each_name_has_its_record() -> None:
    assert set(get_args(TrainerName)) == TRAINERS.keys()
    assert all(trainer.name == name for name, trainer in TRAINERS.items())
    assert DEFAULT in TRAINERS


def test_the_chunked_loss_is_its_trainers_default() -> None:
    assert TRAINERS[CHUNKED["trainer"]].defaults.loss == CHUNKED["loss"]


@pytest.mark.parametrize("version", ["99.0", "0.5", "0.20.0", "0.190"])
def test_a_release_that_was_not_read_is_refused(version: str) -> None:
    """Later ones counted as today's, and earlier ones as 0.19."""
    with pytest.raises(InputError, match=r"accepted: 0\.19 or 0\.21, which were read"):
        peftplan.estimate("smollm2-135m", method="lora", trainer="axolotl", tool_version=version)

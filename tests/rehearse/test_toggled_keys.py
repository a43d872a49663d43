"""Keys that are said not to change memory were toggled: in a rehearsal, or in the tool's resolved config."""

from __future__ import annotations

from collections import Counter
from functools import cache
from importlib import import_module
from typing import Any

import pytest

from peftplan.job.configs.facts import facts
from peftplan.job.configs.plan import Tool
from peftplan.job.configs.with_file import EVALUATED
from tests.job.configs.published import plan, records
from tools.toggled_keys import REASONS, TOOLS, jobs, keys, rows

ROWS = rows()
REHEARSED = [row for row in ROWS if row["by"] == "rehearsal"]
OFTEN = 5
"""Published files that have a key."""
OF_COMMITS = ("nemo-automodel", "axolotl")
"""Tools whose table is of a commit or of a newer release: rows are of the release before it."""


@cache
def often() -> dict[Tool, set[str]]:
    """Tool → the keys without effect that as many of its files have."""
    files: Counter[tuple[Tool, str]] = Counter()
    for record in records():
        read = plan(record)
        if read.kind == "training":
            files.update((read.tool, key) for key in read.ignored)
    return {tool: {key for (of, key), count in files.items() if of == tool and count >= OFTEN} for tool, _ in files}


def test_each_key_of_many_files_was_toggled() -> None:
    toggled = {(row["tool"], key) for row in ROWS for key in keys(row)}
    left = {tool: sorted(key for key in names if (tool, key) not in toggled) for tool, names in often().items()}
    assert {tool: names for tool, names in left.items() if names} == {}


@pytest.mark.parametrize("row", REHEARSED, ids=[f"{row['tool']}-{len(list(keys(row)))}" for row in REHEARSED])
def test_both_sides_of_a_rehearsal_hold_the_same(row: dict[str, Any]) -> None:
    """Reserved bytes may differ by one segment of small tensors (2 MiB): of DPO with `rpo_alpha`, the loss of a token. Allocated
    bytes may differ by one number that a loop keeps, a block of 512 bytes: the loss that NeMo Automodel validates, and what
    torchtune logs."""
    first, second = row["peaks"]
    assert abs(first["allocated"] - second["allocated"]) in ((0, 512) if row["tool"] in ("nemo-automodel", "torchtune") else (0,))
    assert abs(first["reserved"] - second["reserved"]) in ((0, 2 * 2**20) if "rpo_alpha" in keys(row) else (0,))


@pytest.mark.parametrize("row", REHEARSED, ids=[f"{row['tool']}-{len(list(keys(row)))}" for row in REHEARSED])
def test_what_is_toggled_is_read_as_without_effect(row: dict[str, Any]) -> None:
    plans = [import_module(TOOLS[row["tool"]].jobs).plan(job) for job in jobs(row)]
    of_evaluation = {key for each in plans for key, read in each.read.items() if read.option in (EVALUATED, "")}
    assert set(keys(row)) <= {key for each in plans for key in each.ignored} | of_evaluation
    options = [{name: value for name, value in each.options.items() if name != EVALUATED} for each in plans]
    assert options[0] == options[1]


def test_fields_of_a_resolved_config_that_differ_are_without_effect() -> None:
    decide = []
    for row in ROWS:
        for field in {field for fields in row.get("fields", {}).values() for field in fields}:
            known = facts(row["tool"]).known(field)
            if known is not None and "ignored" not in known.row:
                decide.append((row["tool"], field))
    assert decide == []


def test_rows_are_of_the_release_that_is_read_and_say_why_nothing_ran() -> None:
    for row in ROWS:
        assert row["tool"] in OF_COMMITS or row["release"].startswith(facts(row["tool"]).version)
        assert row["by"] in ("rehearsal", "resolved config") or row["why"] in REASONS
        assert ("peaks" in row) is (row["by"] == "rehearsal")
        assert ("fields" in row) is (row["by"] == "resolved config")

"""Every command in every format, compared with what it printed when somebody last looked at it (tests/cli/golden.py)."""

from __future__ import annotations

import pytest

from tests.cli.golden import CASES, GOLDEN, output


@pytest.mark.parametrize("name", CASES)
def test_output_is_what_it_was(name: str) -> None:
    assert output(name) == (GOLDEN / name).read_text(encoding="utf-8"), (
        "if meant: python -m tests.cli.golden, and read the difference"
    )


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_output_is_clean(name: str) -> None:
    columns, _ = CASES[name]
    text = (GOLDEN / name).read_text(encoding="utf-8")
    assert "\x1b" not in text, "escape codes where no terminal is"
    assert text.endswith("\n")
    lines = text.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert columns is None or max(map(len, lines)) <= columns

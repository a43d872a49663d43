"""Where lines of text end: a number stays beside its unit, and what follows the first line stands further in."""

from __future__ import annotations

import re

import pytest
from rich.text import Text

from peftplan.report import screen, terminal
from peftplan.report.tabular import Column
from tests.cli.run import run

PARTED = re.compile(r"[\d.,]*\d\n *(?:[KMGT]iB|B|M|bytes|tokens|%|ms)(?!\w)")
SENTENCE = "It needs 20.17 GiB of 23.52 GiB, 8.03 B parameters, 4,096 tokens and 16,060,522,496 bytes; 5 % is left after 12 ms."


@pytest.mark.parametrize("columns", range(30, 100))
def test_a_line_does_not_end_between_a_number_and_its_unit(columns: int) -> None:
    text = screen.folded(SENTENCE, columns)
    assert PARTED.search(text) is None
    assert " ".join(text.split()) == SENTENCE
    assert max(map(len, text.split("\n"))) <= columns


@pytest.mark.parametrize("columns", range(80, 125))
def test_rich_keeps_them_together_too(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = terminal.console()
    grid = terminal.table(Column("name"), Column("words"))
    grid.add_row("a name", SENTENCE)
    terminal.show(out, (SENTENCE, Text(SENTENCE, style="bold"), grid))
    printed = capsys.readouterr().out
    assert PARTED.search(printed) is None
    assert printed.count("20.17 GiB") == 3


def test_a_list_hangs_below_its_mark() -> None:
    assert screen.folded("first line is long\n  - and so is this", 12) == "first line\n  is long\n  - and so\n    is this"


@pytest.mark.parametrize("columns", [80, 86, 92, 98])
@pytest.mark.parametrize(
    "command",
    [
        "fit llama-2-70b --gpu rtx-4090 --methods qlora",
        "fit llama-3.1-8b --gpu rtx-4090 --keep method,loss",
        "estimate llama-2-70b --gpu rtx-4090 -v",
        "serve llama-3.1-8b --gpu l4",
    ],
)
def test_commands_do_so(command: str, columns: int) -> None:
    done = run(*command.split(), columns=columns)
    assert done.code == 0
    assert PARTED.search(done.out) is None


@pytest.mark.parametrize("columns", [120, 140])
def test_no_word_of_a_table_is_broken_beside_long_names(columns: int) -> None:
    done = run("fit", "llama-3.1-70b", "--gpu", "2xrtx-4090", columns=columns)
    assert "activations" in done.out
    assert not re.search(r"\b(activation|optimizer_states)\s*$", done.out, re.MULTILINE)

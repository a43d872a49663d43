"""`--help` is short and starts with examples that run; `--help-all` lists every option."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from peftplan.cli import COMMANDS, LazyGroup, cli
from tests.cli.run import run

TINY = Path(__file__).parent / "tiny.json"
NOT_RUN = {
    "measure": "needs a GPU",
    "check": "takes seconds",
    "replay": "needs the extra trace",
    "rehearse": "needs a program",
    "configs": "needs files",
}
"""Commands whose examples are only parsed here."""
OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.52 GiB of which "
    "1.00 GiB is free. Including non-PyTorch memory, this process has 22.00 GiB memory in use. Of the allocated memory 20.00 GiB "
    "is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but unallocated."
)


def command(name: str) -> click.Command:
    assert isinstance(cli, LazyGroup)
    loaded = cli.get_command(click.Context(cli), name)
    assert loaded is not None
    return loaded


def examples(name: str) -> list[str]:
    """The lines of a command's help that call it."""
    lines = (line.strip() for line in (command(name).help or "").splitlines())
    return [line for line in lines if re.search(rf"(?:^|\| |\()peftplan {name}\b", line)]


EVERY_EXAMPLE = [(name, line) for name in COMMANDS for line in examples(name)]


def test_every_command_has_two_examples() -> None:
    assert [name for name in COMMANDS if len(examples(name)) < 2] == []
    assert len(re.findall(r"^  peftplan (?:estimate|fit) ", run("--help").out, re.M)) == 2


@pytest.mark.parametrize(("name", "line"), EVERY_EXAMPLE, ids=[line for _, line in EVERY_EXAMPLE])
def test_an_example_runs(name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = line[line.index("peftplan ") :].replace(')"', "")
    arguments = shlex.split(called.partition(" > ")[0], comments=True)[1:]
    if name in NOT_RUN:
        command(name).make_context(name, arguments[1:])
        return
    config = json.loads(TINY.read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "train.log").write_text(OUT_OF_MEMORY, encoding="utf-8")
    arguments = ["train.log" if word == "-" else word for word in arguments]
    in_folder = [str(tmp_path / word) if word in ("./config.json", "train.log", "methods.png") else word for word in arguments]
    if name == "sweep":
        pytest.importorskip("numpy")
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    done = run(*in_folder)
    assert done.code == 0
    assert done.err == "" or (name == "sweep" and " rows in " in done.err) or (name == "export" and done.err.startswith("note: "))
    assert done.out


def options_in(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.M))


def test_help_of_estimate_is_short() -> None:
    shown = run("estimate", "--help").out
    assert len(shown.splitlines()) <= 60
    assert 12 <= len(options_in(shown)) <= 18
    assert re.search(r"^(\d+) more options: peftplan estimate --help-all$", shown, re.M)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_lists_every_option(name: str) -> None:
    loaded = command(name)
    whole = run(name, "--help-all" if "--help-all" in options_in(run(name, "--help").out) else "--help").out
    stated = {param.opts[-1] for param in loaded.params if isinstance(param, click.Option) and not param.hidden}
    missing = {spelling for spelling in stated if not re.search(rf"(?<![\w-]){spelling}(?![\w-])", whole)}
    assert missing == set()


def test_counts_and_ranges_read_as_sentences() -> None:
    assert "1 more option: peftplan replay --help-all" in run("replay", "--help").out
    assert "[x>=" not in "".join(run(name, "--help").out for name in COMMANDS)


@pytest.mark.parametrize("name", ["configs", "gpus", "advise"])
def test_help_all_is_help_where_nothing_is_rare(name: str) -> None:
    whole = run(name, "--help-all")
    assert (whole.code, whole.out) == (0, run(name, "--help").out)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_ends_in_the_middle_of_a_word(name: str) -> None:
    """The names of trainers and programs, such as trl-dpo, qlora-paper and nvidia-smi, are what a person copies."""
    whole = run(name, "--help-all", columns=80).out
    assert [line for line in whole.splitlines() if re.search(r"\w-$", line)] == []
    assert "\u2011" not in whole

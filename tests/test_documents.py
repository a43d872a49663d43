"""Every fenced block of code in README, CONTRIBUTING and docs: it runs, and prints what stands beside it.

`tools/documents.py` says how blocks are marked. A block of `python` runs line by line. A comment behind an expression is what it
gives, and so is one below it that begins with an arrow (`# → 42`), in one line or more.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import click
import pytest

from peftplan.cli import COMMANDS, LazyGroup, cli
from tools.documents import (
    BLOCK,
    FILE,
    NEEDS,
    NOT_RUN,
    PRINTED_BY,
    ROOT,
    Block,
    blocks_of,
    documents,
    printed,
    renewed,
    sessions,
    write_files,
)

ARROW = "→ "
EXTRAS = {
    "trace": ("torch", "transformers", "peft"),
    "plot": ("matplotlib", "numpy"),
    "sweep": ("numpy",),
    "hub": ("huggingface_hub",),
}


def blocks() -> Iterator[Any]:
    for path in documents():
        for number, block in enumerate(blocks_of(path.read_text(encoding="utf-8"))):
            yield pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}-{block.language}")


def check_python(body: str) -> None:
    """Runs it; every expression with a comment gives what the comment says."""
    lines = io.StringIO(body).readline
    comments = {
        token.start[0]: token.string[1:].strip() for token in tokenize.generate_tokens(lines) if token.type == tokenize.COMMENT
    }
    whole = {number for number, line in enumerate(body.splitlines(), start=1) if line.startswith("#")}
    for number in sorted(whole):
        if comments[number].startswith(ARROW):
            further = (comments[line] for line in takewhile(whole.__contains__, count(number + 1)))
            comments[number - 1] = " ".join([comments[number].removeprefix(ARROW), *further])
    names: dict[str, Any] = {}
    for statement in ast.parse(body).body:
        source = ast.get_source_segment(body, statement)
        assert source is not None
        if isinstance(statement, ast.Expr):
            value = eval(source, names)
            assert repr(value) == comments.get(statement.end_lineno or 0, repr(value)), source
        else:
            exec(source, names)


def check(block: Block, folder: Path) -> None:
    """Raises AssertionError where a block does not do what it shows, or does not say how to check it."""
    write_files(block, folder)
    if block.marker.startswith(FILE):
        return
    if block.marker.startswith(PRINTED_BY):
        assert printed(block.marker.removeprefix(PRINTED_BY), folder).rstrip() == block.body.rstrip()
    elif block.language == "python":
        check_python(block.body)
    elif block.language == "sh":
        for command in block.body.splitlines():
            printed(command, folder)
    elif block.language == "console":
        for command, output in sessions(block.body):
            assert printed(command, folder).rstrip() == output.rstrip(), command
    else:
        raise AssertionError(f"a block of {block.language or 'no language'} needs a marker")


@pytest.mark.parametrize("block", blocks())
def test_a_block_does_what_it_shows(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if block.marker.startswith(NOT_RUN):
        pytest.skip(block.marker)
    if block.marker.startswith(NEEDS):
        for module in EXTRAS[block.marker.removeprefix(NEEDS)]:
            pytest.importorskip(module)
    check(block, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "```python\n1 + 1  # 3\n```\n",
        "```python\n1 + 1\n# → 3\n```\n",
        "```python\n[1,\n 2]\n# → [1,\n#    3]\n```\n",
        "```python\n1 / 0\n```\n",
        "```sh\npeftplan estimate no-such-model\n```\n",
        "```sh\ncurl example.org\n```\n",
        "```console\n$ peftplan --version\npeftplan, version 9\n```\n",
        "<!-- printed by: peftplan --version -->\n```text\npeftplan, version 9\n```\n",
        "```text\nsomething\n```\n",
    ],
)
def test_a_block_that_is_wrong_is_noticed(text: str, tmp_path: Path) -> None:
    (block,) = blocks_of(text)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check(block, tmp_path)


def test_a_page_is_printed_anew() -> None:
    page = "<!-- file: a.txt -->\n```text\nx\n```\n\n```console\n$ peftplan --version\nold\n$ peftplan models zzz\n```\n"
    version = printed("peftplan --version", ROOT)
    assert renewed(page) == page.replace("old\n", version).replace("zzz\n", "zzz\n0 models\n")


def test_a_command_shows_its_exit_code(tmp_path: Path) -> None:
    assert printed("peftplan estimate gpt2 --gpu 1GiB --format csv --require-fit; echo $?", tmp_path).endswith("\n1\n")


def test_commands_stand_in_fences() -> None:
    """An indented command would run nowhere."""
    for path in documents():
        outside = BLOCK.sub("", path.read_text(encoding="utf-8"))
        assert not re.findall(r"^(?: {4}|\t)(?:peftplan|pip|python|import) .*", outside, re.M), path


@pytest.mark.parametrize(("number", "says"), [(1, "pip install . "), (2, "pip install -e '.[dev]'")])
def test_ci_runs_the_two_commands_that_install(number: int, says: str) -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = script[script.index("readme_command()") : script.index("\n}\n") + 3]
    command = ["bash", "-c", f"{function}readme_command {number}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert says in done.stdout


def inline_commands() -> Iterator[tuple[Path, str]]:
    """Commands that stand in a sentence or a table."""
    for path in documents():
        text = BLOCK.sub("", path.read_text(encoding="utf-8"))
        yield from ((path, " ".join(command.split())) for command in re.findall(r"`(peftplan [^`]+)`", text))


def test_commands_in_a_sentence_are_known() -> None:
    """They do not run, but their names and options are there."""
    assert isinstance(cli, LazyGroup)
    known = {name: cli.get_command(click.Context(cli), name) for name in COMMANDS}
    unknown = []
    for path, command in inline_commands():
        words = command.partition(" -- ")[0].split()[1:]
        loaded = known.get(words[0])
        options = (
            {spelling for param in loaded.get_params(click.Context(loaded)) for spelling in (*param.opts, *param.secondary_opts)}
            if loaded
            else set()
        )
        wrong = [word for word in words[1:] if word.startswith("--") and word.partition("=")[0] not in options | {"--help"}]
        if (loaded is None and words[0] not in ("--version", "COMMAND", "X", "…")) or wrong:
            unknown.append((path.relative_to(ROOT).as_posix(), command))
    assert unknown == []

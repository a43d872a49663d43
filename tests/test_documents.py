"""Every fenced block of code in README, CONTRIBUTING and docs: it runs, and prints what stands beside it.

A block of `python` runs line by line; a comment behind an expression is what it gives. A block of `sh` holds commands that end
with exit code 0; one of `console` also what they print. Other blocks, and those that cannot run here, say why in a comment of
HTML on the line before: `<!-- printed by: COMMAND -->`, `<!-- needs: trace -->`, or `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import ast
import io
import os
import re
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:^<!-- (?P<marker>[^\n]*) -->\n)?^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)
EXTRAS = {"trace": ("torch", "transformers", "peft")}
NOT_RUN, NEEDS, PRINTED_BY = "not run: ", "needs: ", "printed by: "


class Block(NamedTuple):
    """One block, and how it is marked."""

    language: str
    body: str
    marker: str


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a document."""
    return [Block(match["language"], match["body"], match["marker"] or "") for match in BLOCK.finditer(text)]


def blocks() -> Iterator[Any]:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for number, block in enumerate(blocks_of(path.read_text(encoding="utf-8"))):
            yield pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}-{block.language}")


def printed(command: str, folder: Path) -> str:
    """What `peftplan …` prints at 80 columns, without colour."""
    program, *arguments = shlex.split(command)
    assert program == "peftplan", f"only peftplan's own commands run here: {command}"
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "peftplan", *arguments]
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, ""), command
    return done.stdout


def check_python(body: str) -> None:
    """Runs it; every expression with a comment gives what the comment says."""
    lines = io.StringIO(body).readline
    comments = {
        token.start[0]: token.string[1:].strip() for token in tokenize.generate_tokens(lines) if token.type == tokenize.COMMENT
    }
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
    if block.marker.startswith(PRINTED_BY):
        assert printed(block.marker.removeprefix(PRINTED_BY), folder).rstrip() == block.body.rstrip()
    elif block.language == "python":
        check_python(block.body)
    elif block.language == "sh":
        for command in block.body.splitlines():
            printed(command, folder)
    elif block.language == "console":
        for session in block.body.removeprefix("$ ").split("\n$ "):
            command, _, output = session.partition("\n")
            assert printed(command, folder).rstrip() == output.rstrip(), command
    else:
        raise AssertionError(f"a block of {block.language or 'no language'} needs a marker")


@pytest.mark.parametrize("block", blocks())
def test_a_block_does_what_it_shows(block: Block, tmp_path: Path) -> None:
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


def test_commands_stand_in_fences() -> None:
    """An indented command would run nowhere."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        outside = BLOCK.sub("", path.read_text(encoding="utf-8"))
        assert not re.findall(r"^(?: {4}|\t)(?:peftplan|pip|python|import) .*", outside, re.M), path


@pytest.mark.parametrize(("number", "says"), [(1, "pip install . "), (2, "pip install -e '.[dev]'")])
def test_ci_runs_the_two_commands_that_install(number: int, says: str) -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = script[script.index("readme_command()") : script.index("\n}\n") + 3]
    command = ["bash", "-c", f"{function}readme_command {number}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert says in done.stdout

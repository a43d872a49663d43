"""The fenced blocks of README, CONTRIBUTING and docs, and what their commands print. `python -m tools.documents` prints it anew.

A block of `sh` holds commands that end with exit code 0, one of `console` also what they print. Others say what they are in a
comment of HTML on the line before: `<!-- printed by: COMMAND -->`, `<!-- file: NAME -->` (the blocks behind it on the page find
the file), `<!-- needs: EXTRA -->`, or `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from peftplan.cli import main

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?:^<!-- (?P<marker>[^\n]*) -->\n)?^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)
NOT_RUN, NEEDS, PRINTED_BY, FILE = "not run: ", "needs: ", "printed by: ", "file: "


class Block(NamedTuple):
    """One block, how it is marked, and the files that the page has shown before it: name → text."""

    language: str
    body: str
    marker: str
    files: dict[str, str]


def documents() -> list[Path]:
    """Every page with blocks."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    files: dict[str, str] = {}
    for match in BLOCK.finditer(text):
        marker = match["marker"] or ""
        if marker.startswith(FILE):
            files = files | {marker.removeprefix(FILE): match["body"]}
        yield Block(match["language"], match["body"], marker, files)


def write_files(block: Block, folder: Path) -> None:
    """The files of the page, in the folder that the block runs in."""
    for name, text in block.files.items():
        (folder / name).write_text(text, encoding="utf-8")


def printed(command: str, folder: Path) -> str:
    """What `peftplan …` prints at 80 columns, without colour.

    Two ends of a line are understood: `2> /dev/null` drops stderr, and `; echo $?` prints the exit code too.
    """
    call, _, shows_code = command.partition("; ")
    call, _, dropped = call.partition(" 2> ")
    program, *arguments = shlex.split(call)
    assert program == "peftplan", f"only peftplan's own commands run here: {command}"
    assert (shows_code, dropped) in (("", ""), ("echo $?", ""), ("", "/dev/null")), command
    code, out, err = _run(arguments, folder)
    if shows_code:
        return f"{out}{err}{code}\n"
    assert (code, "" if dropped else err) == (0, ""), f"{command}: {err}"
    return out


def _run(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in this process: a new one takes longer to start than most commands."""
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with patch.dict(os.environ, COLUMNS="80", NO_COLOR="1"), redirect_stdout(out), redirect_stderr(err):
            main(arguments)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 0, out.getvalue(), err.getvalue()
    finally:
        os.chdir(before)
    raise AssertionError("main always exits")


def sessions(body: str) -> Iterator[tuple[str, str]]:
    """(command, what stands below it) of a block of `console`."""
    for session in body.removeprefix("$ ").split("\n$ "):
        command, _, output = session.partition("\n")
        yield command, output


def renewed(text: str) -> str:
    """A page with what its commands print today."""
    bodies = iter([_renewed(block) for block in blocks_of(text)])

    def put(match: re.Match[str]) -> str:
        start, end = match.span("body")
        whole = match[0]
        return whole[: start - match.start()] + next(bodies) + whole[end - match.start() :]

    return BLOCK.sub(put, text)


def _renewed(block: Block) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(block, folder)
        if block.marker.startswith(PRINTED_BY):
            return printed(block.marker.removeprefix(PRINTED_BY), folder).rstrip() + "\n"
        if block.language == "console" and not block.marker.startswith(NOT_RUN):
            return "\n".join(f"$ {command}\n{printed(command, folder).rstrip()}" for command, _ in sessions(block.body)) + "\n"
    return block.body


if __name__ == "__main__":
    for page in [Path(name) for name in sys.argv[1:]] or documents():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")

"""docs/reference says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

import peftplan
from peftplan.cli import COMMANDS
from tools import reference

pytest.importorskip("numpy")
WRITTEN = reference.pages()


@pytest.mark.parametrize("file", WRITTEN)
def test_a_page_is_current(file: str) -> None:
    text = (reference.FOLDER / file).read_text(encoding="utf-8")
    assert text == WRITTEN[file], "run `python -m tools.reference`"


def test_no_page_is_left_over() -> None:
    files = {str(path.relative_to(reference.FOLDER)) for path in reference.FOLDER.rglob("*.md")}
    assert files - set(WRITTEN) == {"index.md", "coverage.md", "several-gpus.md"}


def test_every_command_and_public_name_has_its_place() -> None:
    assert {f"commands/{name}.md" for name in COMMANDS} <= WRITTEN.keys()
    names = [name for name in peftplan.__all__ if not name.startswith("__")]
    python = WRITTEN["python.md"]
    assert [name for name in names if f"### peftplan.{name}\n" not in python and f"### {name}\n" not in python] == []


def test_the_site_s_navigation_lists_every_command() -> None:
    text = (Path(reference.__file__).parents[1] / "mkdocs.yml").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"- {name}: reference/commands/{name}.md" not in text] == []


def test_a_docstring_becomes_markdown() -> None:
    assert reference.prose("see --gpu and `a --b <c>`; x<y") == "see `--gpu` and `a --b <c>`; x&lt;y"

"""Names that say nothing and phrases that no reader understands do not come back.

A local called `found` hides what it holds: `timeline`, `rows` and `allocation` say it. The phrases read as translated, or say
less than the field's own words.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = frozenset({"asked", "complained", "found", "given", "hasty", "heirs", "held", "made", "revived", "said", "such"})
PHRASES = {
    "median without sign": "median absolute error",
    "without sign": "absolute error",
    "until the peak is modelled": "no formula for this model: add --engine trace",
    "fills other holes": "places blocks differently",
    "--engine trace knows": "no formula yet: add --engine trace",
    "which has no adapter": "which peftplan does not read itself (an adapter is LoRA to every reader)",
    "type has no adapter": "type has no reader",
    "without a word": "silently",
    "by the alphabet": "alphabetically",
    "a text that": "a string that",
    "exit 1 where": "exit 1 if",
    "it cannot be read": "cannot read",
    "it is no ": "it is not a",
    "is there twice": "appears twice",
    "stands twice": "appears twice",
    "cannot be said": "is not supported",
    "could not be said": "is not supported",
    "a model is needed": "MODEL is missing",
    "accepted: text": "accepted: a string",
    "None is not valid": "is missing",
    "is no option of": "is not an option of",
}
"""What not to write → what to write."""
FOLDERS = ("peftplan", "tests", "tools", "benchmarks")
PAGES = ("README.md", "CONTRIBUTING.md", "docs")
OWN = Path(__file__).name


def bound(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that code gives to something, with its line: locals, arguments, attributes, functions, classes, imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                yield name, node.lineno
            case ast.alias(asname=str(name)):
                yield name, node.lineno
            case _:
                continue


def meaningless(source: str) -> list[tuple[str, int]]:
    """The names of a file that are in `NAMES`; case and leading underscores make no difference."""
    return [(name, line) for name, line in bound(ast.parse(source)) if name.strip("_").lower() in NAMES]


def texts(source: str) -> Iterator[tuple[str, int]]:
    """Strings, docstrings and comments of a file, white space as single blanks, with their line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT) or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
            yield " ".join(token.string.split()), token.start[0]


def python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if file.name != OWN]


def at(file: Path, line: int, what: str) -> str:
    return f"{file.relative_to(ROOT)}:{line} {what}"


def test_names_say_what_is_held() -> None:
    bad = [
        at(file, line, name)
        for file in python_files(*FOLDERS)
        for name, line in [*meaningless(file.read_text(encoding="utf-8")), (file.stem, 1)]
        if name.strip("_").lower() in NAMES
    ]
    assert bad == [], "rename: what does it hold?"


def test_phrases_are_the_field_s_own() -> None:
    lines = [(file, line, text) for file in python_files(*FOLDERS) for text, line in texts(file.read_text(encoding="utf-8"))]
    pages = [page for name in PAGES for page in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*.md"))]
    lines += [
        (page, number, text)
        for page in pages
        for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    ]
    bad = [
        at(file, line, f"{phrase!r}: write {instead!r}")
        for file, line, text in lines
        for phrase, instead in PHRASES.items()
        if phrase in text
    ]
    assert bad == []


@pytest.mark.parametrize(
    "planted",
    ["found = 1", "def f(held): ...", "self.made = 2", "for given in (): ...", "def asked(): ...", "_found = 1", "SUCH = 1"],
)
def test_a_planted_name_is_reported(planted: str) -> None:
    assert len(meaningless(planted)) == 1


def test_a_planted_phrase_is_reported() -> None:
    source = 'def f():\n    """The median without\n    sign."""\n    return f"{f} (--engine trace knows)"\n'
    prose = " ".join(text for text, _ in texts(source))
    assert {phrase for phrase in PHRASES if phrase in prose} == {"median without sign", "without sign", "--engine trace knows"}

"""What the site adds to docs/: the pages that lie at the root of the repository, and the commands behind printed blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
AT_THE_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OUT_OF_DOCS = re.compile(r"\]\((?P<up>(?:\.\./)+)(?P<file>CONTRIBUTING|CHANGELOG)\.md")
PRINTED = re.compile(r"^<!-- printed by: (?P<command>.*) -->\n```text\n", re.M)
SHORT_CODE = re.compile(r"<code>([^<\n]{1,30})</code>")
LONG_CODE = re.compile(r"<code>([^<\n]{31,})</code>")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
PRE = re.compile(r"(<pre.*?</pre>)", re.S)
PERCENT = re.compile(r"(?<=\d) %")
CELL = re.compile(r"<td([^>]*)>([^<\n]*)</td>")
SHORT_CELL = 16
"""Letters; numbers, cards and names of tools would break behind their dashes."""
ALONE = ("index.md", "tutorial.md")
"""Pages without others beside them, and so without a list of them."""
FILE = re.compile(r"^<!-- file: (?P<name>.*) -->\n```(?P<language>\w+)\n", re.M)


def moved(text: str) -> str:
    """A page of the root as one of docs/: its links lead there."""
    for old, new in AT_THE_ROOT.items():
        text = text.replace(f"]({old}", f"]({new}")
    return text.replace("](docs/", "](").replace("](README.md)", "](index.md)")


def stays_in(text: str) -> str:
    """A page of docs/: what it links at the root of the repository is a page of the site."""
    return OUT_OF_DOCS.sub(lambda match: f"]({match['up'].removeprefix('../')}{match['file'].lower()}.md", text)


def with_titles(text: str) -> str:
    """A printed block begins with the command that prints it, as in a terminal; a file has its name above it."""
    text = PRINTED.sub(lambda match: f"```console\n$ {match['command']}\n", text)
    return FILE.sub(lambda match: f'```{match["language"]} title="{match["name"]}"\n', text)


def unbroken(html: str) -> str:
    """Short code, the options of long code and short cells of tables stay in one line: they would break behind their dashes.

    A number keeps its percent sign.
    """
    html = SHORT_CODE.sub(r'<code class="unbroken">\1</code>', html)
    html = LONG_CODE.sub(lambda match: OPTION.sub(r'<span class="unbroken">\g<0></span>', match[0]), html)
    html = CELL.sub(_cell, html)
    return "".join(part if part.startswith("<pre") else PERCENT.sub("&nbsp;%", part) for part in PRE.split(html))


def _cell(match: re.Match[str]) -> str:
    return f'<td{match[1]} class="unbroken">{match[2]}</td>' if len(match[2]) <= SHORT_CELL else match[0]


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by mkdocs with a page as HTML."""
    return unbroken(html)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files of docs/."""
    from mkdocs.structure.files import File

    for old, new in AT_THE_ROOT.items():
        files.append(File.generated(config, new, content=moved((ROOT / old).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by mkdocs with the text of a page."""
    if page.file.src_uri in ALONE:
        page.meta["hide"] = ["navigation"]
    return with_titles(stays_in(markdown))

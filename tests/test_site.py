"""The documentation site: it builds without a warning, and every link leads somewhere, sections included."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peftplan
from tools import picture, site_hooks
from tools.documents import BLOCK, documents

ROOT = Path(__file__).resolve().parents[1]


def built(folder: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict`, which exits with 1 after a warning."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = built(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "index.html").exists()
    assert (tmp_path / "contributing" / "index.html").exists()
    pages = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")]
    elsewhere = {link for text in pages for link in re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]+)"', text)}
    assert elsewhere == set(), "the site loads nothing from another server"


def test_options_and_short_cells_do_not_break_behind_their_dashes() -> None:
    long = "<code>smollm2-135m --trainer plain --method full</code>"
    assert site_hooks.unbroken(long).count('<span class="unbroken">--') == 2
    assert "smollm2-135m <span" in site_hooks.unbroken(long)
    row = '<td>rtx-4090</td><td style="text-align: right;">-0.0001 %</td><td>a sentence of several words</td>'
    assert site_hooks.unbroken(row) == (
        '<td class="unbroken">rtx-4090</td><td style="text-align: right;" class="unbroken">-0.0001&nbsp;%</td>'
        "<td>a sentence of several words</td>"
    )
    assert site_hooks.unbroken("<p>within 2 %</p><pre>2 %</pre>") == "<p>within 2&nbsp;%</p><pre>2 %</pre>"


def test_the_picture_shows_what_the_command_prints() -> None:
    svg = picture.FILE.read_text(encoding="utf-8")
    lines = [line.rstrip() for line in picture.answer(coloured=False).splitlines()]
    shown = picture.texts(svg).splitlines()
    assert [line for line in lines if line not in shown] == [], "run `python -m tools.picture`"
    assert f"$ {picture.COMMAND}" in shown
    assert "http" not in re.sub(r"<!--.*?-->|http://www.w3.org/2000/svg", "", svg), "it loads nothing"


@pytest.mark.parametrize(("file", "page"), [("compare.png", "which-card.md"), ("sweep.png", "sweep.md")])
def test_a_plot_stands_below_its_command(file: str, page: str) -> None:
    text = (ROOT / "docs" / "how-to" / page).read_text(encoding="utf-8")
    assert f"](../assets/{file})" in text
    assert f"`{picture.PLOTS[file]} --plot {file}`" in text


@pytest.mark.parametrize("page", ["index.md", "reference/coverage.md"])
def test_a_page_counts_models_and_cards(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert f"{len(peftplan.models())} are built in" in text.replace("[", "")
    assert re.search(rf"\b{len(peftplan.gpus())}\b", text)


def test_a_page_of_the_root_links_into_the_site() -> None:
    text = "[a](docs/design.md) [b](CONTRIBUTING.md) [c](CHANGELOG.md#x) [d](README.md)"
    assert site_hooks.moved(text) == "[a](design.md) [b](contributing.md) [c](changelog.md#x) [d](index.md)"


def test_a_link_to_the_root_stays_in_the_site() -> None:
    assert (
        site_hooks.stays_in("[a](../CONTRIBUTING.md#check) [b](../../CHANGELOG.md)")
        == "[a](contributing.md#check) [b](../changelog.md)"
    )


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in (*documents(), ROOT / "CHANGELOG.md")])
def test_every_link_leads_to_a_file(page: str) -> None:
    """In the repository too, where a code host shows the pages."""
    path = ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", BLOCK.sub("", path.read_text(encoding="utf-8")))
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (path.parent / link).exists()] == []


def test_a_printed_block_shows_its_command() -> None:
    text = "<!-- printed by: peftplan --version -->\n```text\npeftplan, version 9\n```\n"
    assert site_hooks.with_titles(text) == "```console\n$ peftplan --version\npeftplan, version 9\n```\n"
    assert site_hooks.with_titles("<!-- file: a.json -->\n```json\n{}\n```\n") == '```json title="a.json"\n{}\n```\n'

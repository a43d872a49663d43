"""The build of the compiled replay: where there is a compiler, and where there is none."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sysconfig
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import pytest

import hatch_build
from peftplan.allocator.program import LEAVE

ROOT = Path(hatch_build.__file__).parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the source alone."""
    (tmp_path / hatch_build.SOURCE).parent.mkdir(parents=True)
    for source in (ROOT / hatch_build.SOURCE).parent.glob("_*.[ch]"):
        shutil.copy(source, tmp_path / hatch_build.SOURCE.parent)
    return tmp_path


def test_it_builds_a_module_that_python_imports(checkout: Path) -> None:
    if shutil.which("cc") is None or not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("no C compiler, or no headers of Python")
    assert hatch_build.build(checkout)
    loader = ExtensionFileLoader("_replay", str(checkout / hatch_build.MODULE))
    spec = importlib.util.spec_from_loader("_replay", loader)
    assert spec is not None
    assert importlib.util.module_from_spec(spec).EVENTS == LEAVE + 1


@pytest.mark.parametrize(("name", "value"), [("CC", "/no/such/compiler"), ("CC", "false"), ("PEFTPLAN_PURE", "1")])
def test_without_a_compiler_nothing_is_built(checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert not hatch_build.build(checkout)
    assert not (checkout / hatch_build.MODULE).exists()


def test_the_description_on_a_package_index_has_no_relative_link() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert len(targets) > 20
    url = "https://example.org/owner/name"
    published = hatch_build.description(readme, url=url, version="1.2.3")
    links = re.findall(r"\]\(([^)#]+)\)", published)
    assert len(links) == len(re.findall(r"\]\(([^)#]+)\)", readme))
    for link in links:
        assert link.startswith("https://")
        if link.startswith(url):
            kind, _, path = link.removeprefix(f"{url}/").partition("/v1.2.3/")
            assert (ROOT / path).exists(), path
            assert kind == ("raw" if path.endswith(".svg") else "blob")


def test_without_a_repository_links_are_their_text() -> None:
    text = "See [the guide](docs/index.md), [PyPI](https://pypi.org) and\n![a picture](docs/a.svg)\n"
    assert hatch_build.description(text, url=None, version="1") == "See the guide, [PyPI](https://pypi.org) and\n\n"


def test_the_repository_is_what_the_workflow_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert hatch_build.repository() is None
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://example.org")
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    assert hatch_build.repository() == "https://example.org/owner/name"

"""A tag, pyproject, CITATION.cff and the changelog say one version."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tools import release

TODAY = "2026-11-27"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Copies of the three files, before a release: the checkout may be one."""
    for name in release.PLACES:
        if not (release.ROOT / name).is_file():
            pytest.skip(f"an sdist has no {name}")
        shutil.copy(release.ROOT / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    text = re.sub(r"^(## [\d.]+) \(.*\)$", r"\1 (unreleased)", changelog.read_text(encoding="utf-8"), count=1, flags=re.M)
    changelog.write_text(text, encoding="utf-8")
    return tmp_path


def test_the_three_files_say_one_version(files: Path) -> None:
    assert len(set(release.versions(files).values())) == 1


def test_a_release_puts_version_and_date_into_each(files: Path) -> None:
    release.write("9.8.7", TODAY, files)
    assert release.disagreements("v9.8.7", files) == []
    changelog = (files / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changelog.count(f"## 9.8.7 ({TODAY})\n") == 1
    assert f"version: 9.8.7\ndate-released: {TODAY}\n" in (files / "CITATION.cff").read_text(encoding="utf-8")
    release.write("9.8.7", "2026-11-28", files)  # a day later
    assert (files / "CITATION.cff").read_text(encoding="utf-8").count("date-released") == 1


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("v9.8.8", "pyproject.toml: 9.8.7, not 9.8.8"),
        ("v9.8.8", "CITATION.cff: 9.8.7, not 9.8.8"),
        ("v9.8.8", "CHANGELOG.md: 9.8.8 has no date"),
        ("9.8.7", "9.8.7: a tag is v and a version, such as v0.1.0"),
    ],
)
def test_a_tag_that_says_otherwise_is_noticed(files: Path, tag: str, expected: str) -> None:
    release.write("9.8.7", TODAY, files)
    assert expected in release.disagreements(tag, files)


def test_the_section_of_an_earlier_release_keeps_its_name(files: Path) -> None:
    release.write("9.8.7", TODAY, files)
    before = {name: (files / name).read_text(encoding="utf-8") for name in release.PLACES}
    with pytest.raises(ValueError, match=r"the first section is the release 9\.8\.7; begin one as ## 9\.9\.0 \(unreleased\)"):
        release.write("9.9.0", TODAY, files)
    assert {name: (files / name).read_text(encoding="utf-8") for name in release.PLACES} == before


def test_a_section_without_a_date_is_not_released(files: Path) -> None:
    release.write("9.8.7", TODAY, files)
    changelog = files / "CHANGELOG.md"
    changelog.write_text(changelog.read_text(encoding="utf-8").replace(f"({TODAY})", "(unreleased)", 1), encoding="utf-8")
    assert release.disagreements("v9.8.7", files) == ["CHANGELOG.md: 9.8.7 has no date"]

"""A package that is too old is told from one that is not installed; the floors are those of pyproject.toml."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import peftplan
from peftplan.libraries import installed
from peftplan.versions import FLOORS

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def releases(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Make these packages look as if they were installed, and no other."""

    def version(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(installed, "version", version)


def test_the_floors_are_those_that_pip_reads() -> None:
    (line,) = re.findall(r"^trace = \[(.*)\]$", PYPROJECT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for package, floor in FLOORS.items():
        assert f'"{package}>={".".join(map(str, floor))}"' in line


@pytest.mark.parametrize(
    ("versions", "error", "expected"),
    [
        ({}, peftplan.MissingExtraError, r"engine: trace \(torch\) needs an optional extra"),
        ({"torch": "2.6.0+cu124", "transformers": "5.24.0", "peft": "0.21.2"}, peftplan.RefusedError,
         r"needs torch 2\.8 or newer; 2\.6\.0\+cu124 is installed"),
        ({"torch": "2.13.0", "transformers": "4.57.1", "peft": "0.21.2"}, peftplan.RefusedError,
         r"needs transformers 5\.0 or newer; 4\.57\.1 is installed"),
        ({"torch": "2.13.0", "transformers": "5.24.0", "peft": "0.18.0"}, peftplan.RefusedError, "needs peft 0.19 or newer"),
    ],
)  # fmt: skip
def test_too_old_is_not_missing(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], error: type[Exception], expected: str
) -> None:
    releases(monkeypatch, **versions)
    with pytest.raises(error, match=expected):
        peftplan.estimate("gpt2", engine="trace")


def test_newer_ones_are_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = {"torch": "2.15.0a0+git1", "transformers": "5.0.0rc1", "peft": "1.0"}
    releases(monkeypatch, **newer)
    installed.require("engine: trace")
    releases(monkeypatch, **newer | {"peft": "0.9"})
    with pytest.raises(peftplan.RefusedError, match=r"0\.9 is installed"):
        installed.require("engine: trace")

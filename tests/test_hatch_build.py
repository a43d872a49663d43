"""The build of the compiled replay: where there is a compiler, and where there is none."""

from __future__ import annotations

import importlib.util
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
    shutil.copy(ROOT / hatch_build.SOURCE, tmp_path / hatch_build.SOURCE)
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

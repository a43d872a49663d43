"""`pytest -m quick` runs what is quick, names what is not, and `--learn-quick` learns it: on a folder of three tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

FILES = {
    "tests/slow.json": "{}",
    "tests/test_a.py": """
import time
import pytest

@pytest.mark.parametrize("case", [1, 2, 3])
def test_quick(case): pass

def test_slow():
    start = time.process_time()
    while time.process_time() < start + 0.7: pass

def test_of_torch():
    pytest.importorskip("torch")

@pytest.mark.rehearse
def test_rehearsal(): pass
""",
    "tests/test_b.py": "import torch\ndef test_whole_file_of_torch(): pass\n",
    "pytest.ini": "[pytest]\nmarkers =\n quick: as here\n slow: as here\n rehearse: as here\n one_in: as here\n",
}
SLOW = "tests/test_a.py::test_slow"
PRODUCT = """
import pytest

@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", range(40))
def test_product(case): pass
"""
SHARED = """
import time
import pytest

@pytest.fixture(scope="module")
def results():
    start = time.process_time()
    while time.process_time() < start + 0.3: pass

def test_first(results): pass
def test_second(results): pass
def test_without(): pass
"""


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    shutil.copy(conftest.__file__, tmp_path / "tests" / "conftest.py")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("selected", "outcome"), [((), "SKIPPED"), (("-m", "quick"), "SKIPPED"), (("-m", "rehearse"), "PASSED")])
def test_a_rehearsal_runs_only_where_it_is_named(folder: Path, selected: tuple[str, ...], outcome: str) -> None:
    assert f"test_rehearsal {outcome}" in run(folder, *selected, "tests/test_a.py", "-k", "rehearsal")


def test_of_a_product_cases_are_drawn_unless_all_are_wanted(folder: Path) -> None:
    (folder / "tests" / "test_product.py").write_text(PRODUCT, encoding="utf-8")
    drawn = run(folder, "-m", "quick", "tests").count("test_product[")
    assert 4 <= drawn <= 18  # of 40, one in four
    assert run(folder, "-m", "quick", "tests", "--full-matrix").count("test_product[") == 40
    assert run(folder, "-m", "quick", "tests/test_product.py").count("test_product[") == 40


def test_a_slow_test_is_named_and_learned(folder: Path) -> None:
    first = run(folder, "-m", "quick")
    assert first.count("PASSED") == 4  # three cases and one that nobody has timed yet; none of torch
    assert "not so quick" in first
    assert SLOW in first.rpartition("not so quick")[2]
    run(folder, "--learn-quick")
    slow = json.loads((folder / "tests" / "slow.json").read_text(encoding="utf-8"))
    assert list(slow) == [SLOW]
    assert slow[SLOW] > 0.5
    again = run(folder, "-m", "quick")
    assert again.count("PASSED") == 3
    assert SLOW not in again
    assert "not so quick" not in again


def test_all_that_share_a_slow_fixture_are_slow(folder: Path) -> None:
    """Whichever runs first waits for it, and with the first left out that is another one."""
    (folder / "tests" / "test_shared.py").write_text(SHARED, encoding="utf-8")
    run(folder, "--learn-quick", "tests/test_shared.py")
    slow = json.loads((folder / "tests" / "slow.json").read_text(encoding="utf-8"))
    assert list(slow) == ["tests/test_shared.py::test_first", "tests/test_shared.py::test_second"]


def test_what_is_learned_of_a_file_replaces_what_was_known() -> None:
    before = {"tests/a.py::test_now_quick": 0.3, "tests/b.py::test_not_run": 0.2}
    seconds = {"tests/a.py::test_now_quick": 0.04, "tests/a.py::test_slow": 0.123}
    assert conftest.learned(before, seconds) == {"tests/a.py::test_slow": 0.12, "tests/b.py::test_not_run": 0.2}


def test_a_function_takes_what_its_cases_take_on_average() -> None:
    def report(name: str, seconds: float) -> pytest.TestReport:
        return pytest.TestReport(name, ("", 0, ""), {}, "passed", None, "call", user_properties=[(conftest.PROPERTY, seconds)])

    assert conftest.averages([report("a.py::f[1]", 0.5), report("a.py::f[2]", 0.25), report("a.py::g", 1)]) == {
        "a.py::f": 0.375,  # (0.5 + 0.25) / 2
        "a.py::g": 1,
    }

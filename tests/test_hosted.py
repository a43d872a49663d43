"""The files that a code host reads: YAML that loads, Pythons of pyproject's range, commands and paths that are there."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import module_needs_stack

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
HOST = ROOT / ".github"
if not HOST.is_dir():
    pytest.skip("an sdist has no .github", allow_module_level=True)
FORMS = sorted((HOST / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((HOST / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = dict(re.findall(r'^([\w-]+) = "([^"]*)"$', PYPROJECT, re.M))
NEWEST = (3, 14)
"""The newest Python that is released."""


def load(path: Path) -> Any:
    """The parsed file; a key that appears twice is an error, which YAML forbids and PyYAML lets pass."""

    class Strict(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{path.name}: a key appears twice among {keys}"
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Strict.add_constructor("tag:yaml.org,2002:map", mapping)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in WORKFLOWS:
        for name, job in load(path)["jobs"].items():
            yield f"{path.stem}/{name}", job


def pythons(job: dict[str, Any]) -> list[tuple[int, ...]]:
    """The versions that a job runs on: of its matrix, or of its steps."""
    of_steps = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    listed = job.get("strategy", {}).get("matrix", {}).get("python", of_steps)
    assert all(isinstance(version, str) for version in listed), "3.10 without quotes is the number 3.1"
    return [tuple(map(int, version.split("."))) for version in listed]


def test_a_key_that_stands_twice_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "twice.yml"
    path.write_text("a: 1\na: 2\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="appears twice"):
        load(path)


def test_every_python_of_the_range_is_tested() -> None:
    oldest = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    every = [(3, minor) for minor in range(oldest[1], NEWEST[1] + 1)]
    matrices = {name: pythons(job) for name, job in jobs() if "python" in job.get("strategy", {}).get("matrix", {})}
    assert matrices == {"ci/quick": every, "ci/versions": every}
    assert all(version in every for _, job in jobs() for version in pythons(job))


@pytest.mark.parametrize(("name", "job"), jobs(), ids=lambda value: value if isinstance(value, str) else "")
def test_jobs_are_whole(name: str, job: dict[str, Any]) -> None:
    assert job["runs-on"]
    assert set(job.get("needs", [])) <= {
        other.partition("/")[2] for other, _ in jobs() if other.startswith(name.partition("/")[0])
    }
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", step.get("uses", "a/b@c")), step
        for path in re.findall(r"(?:^|[ ])((?:tools/|\.ci/)[\w./]+|\w+\.py)", step.get("run", "")):
            assert (ROOT / path).is_file(), path


def test_continuous_integration_runs_what_a_checkout_runs() -> None:
    commands = {name: " && ".join(step.get("run", "") for step in job["steps"]) for name, job in jobs()}
    assert 'pytest -m "quick or slow"' in commands["ci/quick"]
    assert "sh tools/versions.sh" in commands["ci/versions"]
    assert commands["ci/everything"].endswith(".ci/run")
    assert commands["ci/full-matrix"].endswith("pytest -n auto --full-matrix")
    assert load(HOST / "workflows" / "ci.yml")[True]["schedule"][0]["cron"]  # YAML 1.1 reads `on` as true


def test_files_import_what_the_quick_job_installs() -> None:
    """Base dependencies and the names after `pip install .`; a test of anything else skips itself where that is missing."""
    commands = [step.get("run", "") for step in load(HOST / "workflows" / "ci.yml")["jobs"]["quick"]["steps"]]
    (named,) = (command.partition(" . ")[2].split() for command in commands if "pip install" in command)
    listed = PYPROJECT.partition("\ndependencies = [")[2].partition("\n]")[0]
    base = re.findall(r'^ *"(\w+)', listed, re.M)
    installed = {"yaml" if name == "pyyaml" else name for name in (*base, *named)}
    ours = {"peftplan", "tests", "tools", "benchmarks", "hatch_build"}
    allowed = sys.stdlib_module_names | installed | ours | {"typing_extensions"}  # which pydantic needs
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        if not module_needs_stack(path)
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        for name in imported(statement)
        if name.partition(".")[0] not in allowed
    ]
    assert wrong == []


def imported(statement: ast.stmt) -> list[str]:
    """The modules that one statement imports."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    return [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []


def test_a_tag_is_built_and_only_a_release_is_published() -> None:
    workflow = load(HOST / "workflows" / "publish.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}, "release": {"types": ["published"]}}  # YAML 1.1 reads `on` as true
    assert {name: job.get("if") for name, job in workflow["jobs"].items()} == {
        "pure": None,
        "compiled": None,
        "publish": "github.event_name == 'release'",
    }
    assert workflow["jobs"]["publish"]["environment"] == "pypi"
    assert [name for name, job in workflow["jobs"].items() if job.get("permissions") == {"id-token": "write"}] == ["publish"]
    assert workflow["jobs"]["publish"]["needs"] == [name for name in workflow["jobs"] if name != "publish"]
    assert "password" not in (HOST / "workflows" / "publish.yml").read_text(encoding="utf-8")
    commands = [step.get("run") for step in workflow["jobs"]["pure"]["steps"]]
    assert commands[2] == 'python tools/release.py --check "$GITHUB_REF_NAME"'  # before anything is built


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one_that_the_host_accepts(path: Path) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "title", "labels", "assignees", "body"}
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields) > 0
    assert any(part["validations"]["required"] for part in fields if "validations" in part)
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"].get("label") or part["type"] == "markdown"


def test_the_form_of_a_run_takes_a_record() -> None:
    """The names of its placeholder are those of a record that ships."""
    (field,) = [part for part in load(HOST / "ISSUE_TEMPLATE" / "measured-run.yml")["body"] if part.get("id") == "record"]
    line = (ROOT / "data" / "runs" / "fitcheck_t4.jsonl").read_text(encoding="utf-8").partition("\n")[0]
    names = re.findall(r'"(\w+)":', field["attributes"]["placeholder"])
    assert len(names) == 6
    assert all(f'"{name}":' in line for name in names)


def test_the_citation_is_of_this_version() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert [str(citation[name]) for name in ("title", "version", "license")] == [
        PROJECT[n] for n in ("name", "version", "license")
    ]

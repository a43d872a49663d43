"""NOTICE names every source of the data that ships, under the licence that its rows state, and is itself shipped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from peftplan.datafiles import DATA

ROOT = Path(__file__).parents[1]
NOTICE = (ROOT / "NOTICE").read_text(encoding="utf-8")
SOURCE = re.compile(r"^  (\S.*?) {2,}(\S.*)$", re.MULTILINE)
PACKAGE = re.compile(r"\b([a-z][\w-]*-\d+\.\d+[\d.]*) \(PyPI\)")


def section(path: str) -> dict[str, set[str]]:
    """Source → licences, of the sections whose heading names the path."""
    sources: dict[str, set[str]] = {}
    for part in NOTICE.split("\n\n"):
        heading = part.split("\n", 1)[0].partition(": ")[0]
        if any(fnmatch(path, f"{name}*") for name in heading.split(", ")):
            for source, licence in SOURCE.findall(part):
                sources.setdefault(source, set()).add(licence)
    return sources


def rows(folder: str) -> Iterator[dict[str, Any]]:
    for path in sorted((DATA / folder).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row.get("circumstances", row)


def test_every_file_of_the_data_is_in_a_section() -> None:
    files = [
        f"data/{path.relative_to(DATA).as_posix()}" for path in DATA.rglob("*") if path.is_file() and path.name != ".gitkeep"
    ]
    assert len(files) > 400
    assert [name for name in files if not section(name)] == []


def test_every_row_s_repository_and_licence() -> None:
    for folder in ("runs", "published"):
        known = section(f"data/{folder}")
        for row in rows(folder):
            if row.get("repo"):
                assert row["repo"] in known, row["repo"]
                assert row.get("licence") in known[row["repo"]], (row["repo"], row.get("licence"))
            else:
                where = str(row.get("url") or row.get("source"))
                assert any(source in where for source in known), where


def test_every_source_of_a_model() -> None:
    known = section("data/models")
    for path in sorted((DATA / "models").glob("*.json")):
        if path.name == "index.json":
            continue
        facts = json.loads(path.read_text(encoding="utf-8"))
        text = f"{facts['source']}; {facts.get('published_source') or ''}"
        named = {*(re.findall(r"(?<![\w./-])([\w-]+/[\w.-]+)(?=:[\w./])", text)), *PACKAGE.findall(text)}
        assert named <= set(known), (path.name, named - set(known))


def test_every_source_of_a_card_and_a_context() -> None:
    known = section("data/gpus.json")
    cards = json.loads((DATA / "gpus.json").read_text(encoding="utf-8"))
    assert set(cards["cited"]) <= set(known)
    contexts = json.loads((DATA / "context.json").read_text(encoding="utf-8"))["measurements"]
    for row in contexts:
        named = re.findall(r"(?<![\w./-])([\w-]+/[\w.-]+)(?=#| )", row["source"])
        assert set(named) <= set(known), row["source"]


def test_every_peer() -> None:
    peers = json.loads((DATA / "runs" / "peers.json").read_text(encoding="utf-8"))["tools"]
    known = section("data/runs/peers.json")
    assert {f"{name} {tool['version']}" for name, tool in peers.items() if name != "peftplan"} <= set(known)


def test_it_ships() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'license-files = ["LICENSE", "NOTICE"]' in project
    assert '"LICENSE", "NOTICE"]' in project.partition("[tool.hatch.build.targets.sdist]")[2].partition("[tool.ruff]")[0]


def test_every_source_of_an_alias() -> None:
    known = section("data/model_aliases.json")
    sources = json.loads((DATA / "model_aliases.json").read_text(encoding="utf-8"))["sources"].values()
    named = {source["file"].partition(":")[0]: source["licence"] for source in sources if ":" in source["file"]}
    assert named
    assert all(licence in known[name] for name, licence in named.items())

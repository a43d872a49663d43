"""The emulated card: where it cannot be built, one line says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftplan.errors import MissingExtraError, RefusedError
from peftplan.rehearse import card


def fake_torch(root: Path, *, cuda: str | None, version: str = "2.13.0") -> Path:
    (root / "torch" / "lib").mkdir(parents=True, exist_ok=True)
    text = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
    (root / "torch" / "version.py").write_text(text, encoding="utf-8")
    (root / "torch" / "__init__.py").touch()
    return root


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(card.sys, "platform", "linux")
    monkeypatch.setattr(card.platform, "machine", lambda: "x86_64")


def test_a_cpu_build_of_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_packages", lambda: fake_torch(tmp_path, cuda=None))
    with pytest.raises(RefusedError, match=r"torch 2\.13\.0 is built without CUDA"):
        card.library()


def test_an_old_torch_is_refused_by_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_packages", lambda: fake_torch(tmp_path, cuda="12.1", version="2.4.1+cu121"))
    with pytest.raises(RefusedError, match=r"torch 2\.8 or newer \(this is 2\.4\.1\+cu121\): torch._C._cuda_memorySnapshot"):
        card.library()


@pytest.mark.parametrize("there", [(), ("gcc",), ("nm",)])
def test_a_missing_compiler_is_said(there: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_packages", lambda: fake_torch(tmp_path, cuda="13.0"))
    monkeypatch.setattr(card.shutil, "which", lambda name: f"/usr/bin/{name}" if name in there else None)
    with pytest.raises(RefusedError, match="needs a C compiler and nm"):
        card.library()


def test_missing_headers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_packages", lambda: fake_torch(tmp_path, cuda="13.0"))
    monkeypatch.setattr(card.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(RefusedError, match=r"headers of CUDA 13.0"):
        card.library()


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card.platform, "machine", lambda: "aarch64")
    with pytest.raises(RefusedError, match="aarch64"):
        card.library()


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="rehearse"):
        card.library()


def test_the_container_installs_what_a_missing_compiler_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container = (Path(__file__).parents[2] / "Dockerfile").read_text(encoding="utf-8")
    monkeypatch.setattr(card, "_packages", lambda: fake_torch(tmp_path, cuda="13.0"))
    monkeypatch.setattr(card.shutil, "which", lambda name: None)
    with pytest.raises(RefusedError) as refused:
        card.library()
    packages = str(refused.value).partition("install ")[2].split(" and ")
    assert packages == ["gcc", "binutils"]
    assert all(f" {package} " in container for package in packages)


def test_another_platform_is_told_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card.sys, "platform", "darwin")
    with pytest.raises(RefusedError, match=r"darwin on x86_64\); elsewhere in a container: docs/rehearse.md"):
        card.library()

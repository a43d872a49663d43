"""An action that follows an import."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from peftplan.rehearse.inside.after_import import AfterImport


def test_an_action_runs_once_after_the_module_and_before_its_importer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_later.py").write_text("value = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []

    def act(module: object) -> None:
        seen.append(module.value)  # type: ignore[attr-defined]
        module.value = 2  # type: ignore[attr-defined]

    finder = AfterImport({"imported_later": act})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert importlib.util.find_spec("imported_later") is not None
    module = importlib.import_module("imported_later")
    assert (seen, module.value) == ([1], 2)
    assert importlib.reload(module).value == 1
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("imported_never")

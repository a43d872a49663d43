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


def test_two_actions_follow_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finder asked the other one, without end."""
    (tmp_path / "imported_for_two.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[str] = []
    finders = [AfterImport({"imported_for_two": lambda _module, name=name: seen.append(name)}) for name in ("first", "second")]
    monkeypatch.setattr(sys, "meta_path", [*finders, *sys.meta_path])
    importlib.import_module("imported_for_two")
    assert sorted(seen) == ["first", "second"]


@pytest.mark.parametrize("newest", [True, False])
def test_guards_of_old_and_new_releases_of_torch_are_left_out_for_our_functions(newest: bool) -> None:
    """torch 2.8 compares identities in `ID_MATCH`; later ones do it in `id_match_unchecked`, which that calls."""
    pytest.importorskip("torch")
    from peftplan.rehearse.inside.values import _unguarded

    guarded: list[object] = []
    name = "id_match_unchecked" if newest else "ID_MATCH"
    methods = {each: lambda self, guard: guarded.append(guard) for each in (name, "CLOSURE_MATCH")}
    builder = type("GuardBuilder", (), {"get": lambda self, guard: guard, **methods})
    _unguarded(type("guards", (), {"GuardBuilder": builder}), own={id(abs)})
    for guard in (abs, max):
        getattr(builder(), name)(guard)
    assert guarded == [max]

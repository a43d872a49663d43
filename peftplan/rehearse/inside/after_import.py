"""Calls a function once a module is imported, before the code that imported it goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterImport(MetaPathFinder):
    """A finder that finds nothing itself: it lets the others find a module, and calls its action when it has run."""

    def __init__(self, actions: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self.actions = dict(actions)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of another finder, for a name that has an action; its module's code is followed by the action."""
        if name not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_act(module: ModuleType) -> None:
            action = self.actions.pop(name, None)  # libraries also look for a spec to know whether a package is there
            run(module)
            if action is not None:
                action(module)

        spec.loader.exec_module = run_then_act  # type: ignore[method-assign]
        return spec

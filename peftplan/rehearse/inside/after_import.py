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
        """The spec of a finder behind this one, for a name that has an action; its module's code is followed by the action.

        Those before it have found nothing, and may be of this kind too, with another action for the name.
        """
        if name not in self.actions:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next((spec for finder in behind if (spec := finder.find_spec(name, path, target)) is not None), None)
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

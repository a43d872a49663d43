"""peftplan: what a fine-tuning run needs, before a GPU is rented.

Public names are resolved on first use, so that importing peftplan imports neither torch nor rich.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftplan.errors import InputError, MissingExtraError, PeftplanError, RefusedError, UnknownNameError
    from peftplan.job.configs.plan import ConfigPlan
    from peftplan.job.configs.read import read_config
    from peftplan.job.script import Script
    from peftplan.oom.diagnosis import explain_oom
    from peftplan.planning.advising import advice
    from peftplan.planning.compare import compare
    from peftplan.planning.configs import configs
    from peftplan.planning.estimate import estimate
    from peftplan.planning.explain import explain
    from peftplan.planning.export import Exported, export
    from peftplan.planning.fit import fit
    from peftplan.planning.inspection import inspect
    from peftplan.planning.listings import gpus, models
    from peftplan.planning.listings import list_methods as methods
    from peftplan.planning.practice import practices
    from peftplan.planning.serving import serving
    from peftplan.planning.serving_result import Serving
    from peftplan.planning.sweep import Sweep, sweep
    from peftplan.rehearse import rehearse
    from peftplan.results.estimate import Estimate

    __version__: str

_HOMES = {
    "ConfigPlan": "job.configs.plan",
    "Estimate": "results.estimate",
    "Exported": "planning.export",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "PeftplanError": "errors",
    "RefusedError": "errors",
    "Script": "job.script",
    "Serving": "planning.serving_result",
    "Sweep": "planning.sweep",
    "UnknownNameError": "errors",
    "advice": "planning.advising",
    "as_html": "report.notebook",
    "compare": "planning.compare",
    "configs": "planning.configs",
    "estimate": "planning.estimate",
    "explain": "planning.explain",
    "explain_oom": "oom.diagnosis",
    "export": "planning.export",
    "fit": "planning.fit",
    "gpus": "planning.listings",
    "inspect": "planning.inspection",
    "list_methods": "planning.listings",
    "models": "planning.listings",
    "practices": "planning.practice",
    "read_config": "job.configs.read",
    "serving": "planning.serving",
    "sweep": "planning.sweep",
}

__all__ = [
    "ConfigPlan",
    "Estimate",
    "Exported",
    "InputError",
    "MissingExtraError",
    "PeftplanError",
    "RefusedError",
    "Script",
    "Serving",
    "Sweep",
    "UnknownNameError",
    "__version__",
    "advice",
    "compare",
    "configs",
    "estimate",
    "explain",
    "explain_oom",
    "export",
    "fit",
    "gpus",
    "inspect",
    "methods",
    "models",
    "practices",
    "read_config",
    "rehearse",
    "serving",
    "sweep",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("peftplan")
    if name in ("methods", "rehearse"):
        return import_module(f"peftplan.{name}")  # packages that can be called
    if name not in _HOMES:
        raise AttributeError(f"module 'peftplan' has no attribute {name!r}")
    value = getattr(import_module(f"peftplan.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

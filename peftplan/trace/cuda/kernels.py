"""Kernels of optional packages that a model uses if they are installed (state-space scans, gated delta rules).

transformers decides at import, function by function (`use_kernel_func_from_hub_with_fallback`, integrations/hub_kernels.py):
the package's kernel, else torch code of the same values, which keeps far more for backward.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any


def kernel_packages(model: Any) -> tuple[str, ...]:
    """Names of the packages that the code of this model's modules asks for and does not find, sorted."""
    files = {type(module).__module__ for module in model.modules()}
    return tuple(sorted({package for file in files if file in sys.modules for package in _missing(sys.modules[file])}))


def _missing(file: Any) -> Iterator[str]:
    for function in vars(file).values():
        if inspect.isfunction(function) and function.__closure__:
            closure = inspect.getclosurevars(function).nonlocals
            if "package" in closure and closure.get("is_new_implementation") is False:
                yield str(closure["package"])

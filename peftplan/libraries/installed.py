"""Which packages of the extra `trace` are installed, and whether they are new enough. Imports nothing heavy."""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata
from importlib.metadata import PackageNotFoundError

from peftplan.errors import MissingExtraError, RefusedError
from peftplan.versions import FLOORS

version = cache(metadata.version)
"""Cached, since it opens a file."""


def require(what: str, *packages: str) -> None:
    """Raise MissingExtraError if one of the packages is not installed, RefusedError if it is too old; none: all of them."""
    for package in packages or FLOORS:
        try:
            installed = version(package)
        except PackageNotFoundError:
            raise MissingExtraError(f"{what} ({package})", "trace") from None
        if _release(installed) < FLOORS[package]:
            needed = ".".join(map(str, FLOORS[package]))
            raise RefusedError(f"{what} needs {package} {needed} or newer; {installed} is installed (pip install -U {package})")


def _release(text: str) -> tuple[int, ...]:
    """`2.10.0+cu128` → (2, 10, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])

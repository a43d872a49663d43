"""What of the extra `trace` is installed, and whether it is new enough: imports nothing heavy."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from peftplan.errors import MissingExtraError, PeftplanError, RefusedError

FLOORS: dict[str, tuple[int, ...]] = {"torch": (2, 8), "transformers": (5, 0), "peft": (0, 19)}
"""The oldest releases with which traces were run; the same as in pyproject.toml."""


def missing(what: str, *packages: str) -> PeftplanError:
    """Why `what` could not be imported: a package that is too old, with its version and the one that is needed, or none."""
    for package in packages or FLOORS:
        try:
            installed = version(package)
        except PackageNotFoundError:
            return MissingExtraError(what, "trace")
        if _release(installed) < FLOORS[package]:
            needed = ".".join(map(str, FLOORS[package]))
            return RefusedError(f"{what} needs {package} {needed} or newer, {installed} is installed: pip install -U {package}")
    return MissingExtraError(what, "trace")


def check(what: str, *packages: str) -> None:
    """Raise RefusedError where one of the packages is too old, MissingExtraError where it is not installed."""
    error = missing(what, *packages)
    if isinstance(error, RefusedError):
        raise error


def _release(text: str) -> tuple[int, ...]:
    """`2.10.0+cu128` → (2, 10, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])

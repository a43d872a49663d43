"""Integrations with other libraries, each imported on first use."""

from __future__ import annotations

NAMES = ("MemoryCallback",)


def __getattr__(name: str) -> object:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from peftplan.measure.callback import MemoryCallback
    except ImportError as error:
        from peftplan.errors import MissingExtraError

        raise MissingExtraError(f"MemoryCallback ({error.name or error})", "measure") from None
    return MemoryCallback

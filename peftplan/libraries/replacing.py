"""Stand-ins for parts of the installed packages, whichever of them their versions have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch


@contextmanager
def replaced(stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Replace objects (dotted name → stand-in) inside the block. Names that the installed version lacks are skipped."""
    with ExitStack() as stack:
        for target, stand_in in stand_ins.items():
            if _is_there(target):
                stack.enter_context(patch(target, stand_in))
        yield


def _is_there(target: str) -> bool:
    try:
        resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True

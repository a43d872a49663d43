"""The model that a file names, as peftplan knows it."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase

from peftplan.arch import catalogue
from peftplan.job.configs.facts import Facts


def named(text: str, tool: Facts) -> str:
    """A built-in name where a tool's own name, in any case, an id, or the last part of a local path is one; else the text."""
    own = tool.models.get(text) or tool.models.get(text.rpartition(".")[2])
    if own is None:
        own = next((name for known, name in tool.models.items() if known.lower() == text.lower()), None)
    if own is None:
        own = next((name for pattern, name in tool.models.items() if "*" in pattern and fnmatchcase(text, pattern)), None)
    if own is not None:
        return own
    if catalogue.find(text) is not None or os.path.exists(text):
        return text
    last = text.rstrip("/").rpartition("/")[2]
    looks_local = text.startswith(("/", "./", "../", "~", "$"))
    return last if looks_local and catalogue.find(last) is not None else text

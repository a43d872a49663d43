"""The model that a file names, as peftplan knows it."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase

from peftplan.arch import catalogue
from peftplan.job.configs.facts import Facts

SUFFIXES = ("-unsloth-bnb-4bit", "-bnb-4bit")
"""Ends of the names of repositories that store a model's weights in NF4."""


def named(text: str, tool: Facts) -> tuple[str, str | None]:
    """A built-in name where a tool's own name, in any case, an id, or the last part of a path is one; else the text.

    Behind it, what is assumed: a folder, or a repository that is not built in, holds the model whose name it has.
    """
    own = tool.models.get(text) or tool.models.get(text.rpartition(".")[2])
    if own is None:
        own = next((name for known, name in tool.models.items() if known.lower() == text.lower()), None)
    if own is None:
        own = next((name for pattern, name in tool.models.items() if "*" in pattern and fnmatchcase(text, pattern)), None)
    if own is not None:
        return own, None
    if catalogue.find(text) is not None or os.path.exists(text):
        return text, None
    last = text.rstrip("/").rpartition("/")[2]
    stored = next((last[: -len(suffix)] for suffix in SUFFIXES if last.lower().endswith(suffix)), last)
    if last == text or (entry := catalogue.find(stored)) is None:
        return text, None
    return stored, f"{text} holds {entry.repo_id}, by its name"

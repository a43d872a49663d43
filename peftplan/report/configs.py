"""What became of the keys of another tool's file, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from peftplan.errors import quoted

BOUNDS = {
    "at_most": "the peak is at most this",
    "at_least": "the peak is at least this",
    "unknown": "no peak is stated",
}
MOST_KEYS = 4
"""Keys that cannot be said, shown one by one."""


def summary(config: Mapping[str, Any]) -> str:
    """The file, its tool, and how many keys went where."""
    files = ", ".join(PurePath(file).name for file in config["files"])
    counts = f"{len(config['read'])} keys read, {len(config['ignored'])} without effect on memory"
    return f"{files} ({config['tool']} {config['version']}): {counts}"


def unsayable(config: Mapping[str, Any], *, most: int | None = MOST_KEYS) -> list[str]:
    """A line for each key that no option says, and what the peak is then."""
    keys = config["unsayable"]
    if not keys:
        return []
    lines = [f"cannot be said: {key}: {said['why']}" for key, said in list(keys.items())[:most]]
    more = len(keys) - len(lines)
    lines += [f"and {more} more keys that cannot be said: -v"] if more else []
    return [*lines, f"so {BOUNDS[config['bound']]}"]


def assumed(config: Mapping[str, Any]) -> list[str]:
    """What the file leaves open: to the tool, with file and line, and to data and launcher."""
    lines = [f"{option}: the default of {at}" for option, at in config["defaults"].items()]
    return lines + [f"{what}: {value}" for what, value in config["assumed"].items()]


def keys(config: Mapping[str, Any]) -> list[str]:
    """Every key, a line each, in its group."""
    lines = [f"read: {key}: {quoted(said['value'])} → {_arrow(said)}" for key, said in config["read"].items()]
    lines += [f"no effect: {key}: {_where(said)}" for key, said in config["ignored"].items()]
    return [*lines, *unsayable(config, most=None)]


def _arrow(said: Mapping[str, Any]) -> str:
    return " · ".join(filter(None, (said["option"], said["why"]))) or "nothing follows"


def _where(said: Mapping[str, Any]) -> str:
    return f"{said['why']} ({said['at']})" if said["at"] else str(said["why"])

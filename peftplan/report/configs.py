"""What became of the keys of another tool's file, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from peftplan.errors import quoted
from peftplan.report.tabular import Column
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.planning.configs import ConfigEntry

BOUNDS = {
    "at_most": "the peak is at most this",
    "at_least": "the peak is at least this",
    "unknown": "no peak is stated",
}
MOST_KEYS = 4
"""Keys that cannot be said, shown one by one."""

COLUMNS = (
    Column("file"),
    Column("tool", wide=True),
    Column("model"),
    Column("trainable", right=True, wide=True),
    Column("peak", right=True),
    Column("verdict"),
    Column("not said", right=True),
    Column("keys that could not be said, or why there is no peak", wide=True),
)
MOST_NAMES = 3
SIGNS = {"at_most": "≤ ", "at_least": "≥ "}


def cells(entry: ConfigEntry) -> tuple[str | int | None, ...]:
    """One file of many; without a peak, why."""
    peak = None if entry.peak_allocated is None else SIGNS.get(entry.bound or "", "") + format_bytes(entry.peak_allocated)
    names = ", ".join(entry.unsayable[:MOST_NAMES])
    more = len(entry.unsayable) - MOST_NAMES
    unsaid = f"{names} and {more} more" if more > 0 else names
    verdict = entry.verdict and entry.verdict.replace("_", " ")
    why = entry.error if entry.peak_allocated is None and not entry.unsayable else None
    model = None if entry.model is None else entry.model.rpartition("/")[2]
    file = PurePath(entry.file).name
    return (file, entry.tool, model, entry.trainable_parameters, peak, verdict, len(entry.unsayable), unsaid or why)


def summed(entries: Sequence[ConfigEntry]) -> str:
    """How many files have what."""
    training = [entry for entry in entries if entry.tool != "other"]
    counted = sum(entry.total_parameters is not None for entry in training)
    peaks = sum(entry.peak_allocated is not None for entry in training)
    exact = sum(entry.peak_allocated is not None and not entry.unsayable for entry in training)
    others = f"; {len(entries) - len(training)} other files" if len(entries) > len(training) else ""
    files = "1 file" if len(training) == 1 else f"{len(training)} files"
    return f"{files} of tools: {counted} counted, {peaks} with a peak, {exact} of them with every key said{others}"


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

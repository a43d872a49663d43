"""The launch files that a config names or a tool ships: where they are, and the options that they say."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path, PurePath
from typing import TypedDict

from peftplan.datafiles import load
from peftplan.errors import OptionError
from peftplan.job.configs.documents import Values, word
from peftplan.job.launch import accelerate, deepspeed
from peftplan.job.launch.content import content

SHIPPED = "configs/launch.json"
"""Launch files that tools ship."""


OUTSIDE = "outside the config's folder and the working directory, so not opened"
"""Why a file that a config names is not read."""


class LaunchFile(TypedDict):
    """A launch file that a tool ships: its repository and path, and what is in it."""

    source: str
    values: Values


Shipped = dict[str, dict[str, LaunchFile]]
"""Tool → name → launch file."""
FILE = re.compile(r"[\w./-]+\.(?:json|yaml)\b")
"""The path of a launch file in its source."""
OFF_BY_DEFAULT = (
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_hpz_partition_size",
)
"""Switches of ZeRO++ that files state although they are off (deepspeed, runtime/zero/config.py)."""


def path_of(path: str, file: str) -> str:
    """Where a file is that a config names: from the working directory, else from the config's folder."""
    beside = os.path.join(os.path.dirname(file), path)
    return beside if not os.path.isfile(path) and os.path.isfile(beside) else path


def in_tree(path: str, file: str) -> bool:
    """Whether a path that a config names lies beneath the working directory or the config's folder, links resolved."""
    try:
        above = Path(os.path.realpath(path)).parents
    except ValueError:  # no path at all, such as one with a null byte
        return False
    roots = {Path(os.path.realpath(os.curdir)), Path(os.path.realpath(file)).parent}
    return any(root != root.parent and root in above for root in roots)


def of_accelerate(source: object, *, file: str) -> Mapping[str, object]:
    """What accelerate's file says; DeepSpeed's file that it names is opened in the tree of the config only."""
    config = content(source, field="accelerate")
    plugin = config.get("deepspeed_config")
    own = plugin.get("deepspeed_config_file") if isinstance(plugin, Mapping) else None
    if isinstance(own, str) and not in_tree(own, file):
        raise OptionError(f"deepspeed_config_file: {own}", own, f"{OUTSIDE}; add it with another --config")
    return accelerate.options(config)


def shipped(tool: str, text: str) -> Values | None:
    """The values of a launch file that a tool ships: by its name alone, or by its path, whose last folder is the file's own."""
    files = load(SHIPPED, Shipped).get(tool.removesuffix("-v1"), {})
    path = PurePath(text)
    if not path.parent.name:
        return files[path.stem]["values"] if path.stem in files else None
    shared = {name: _shared_end(PurePath(FILE.findall(file["source"])[0]).parts, path.parts) for name, file in files.items()}
    name = max(shared, key=lambda name: shared[name], default=None)
    return None if name is None or shared[name] < 2 else files[name]["values"]


def _shared_end(one: Sequence[str], other: Sequence[str]) -> int:
    """How many last parts two paths have in common, their suffixes aside."""
    ends = zip(reversed([*one[:-1], PurePath(one[-1]).stem]), reversed([*other[:-1], PurePath(other[-1]).stem]), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))


def of_deepspeed(source: object) -> Mapping[str, object]:
    """What DeepSpeed's file says, without switches of ZeRO that are off."""
    if not isinstance(source, Mapping):
        return deepspeed.options(source)
    zero = source.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return deepspeed.options(source)
    on = {name: value for name, value in zero.items() if not (name in OFF_BY_DEFAULT and word(value) in ("false", "1", "0"))}
    return deepspeed.options({**source, "zero_optimization": on})


def of_spectrum(source: object) -> Mapping[str, object]:
    """The patterns of Spectrum's file, which its users match from the start of a parameter's name (`re.match`)."""
    listed = content(source, field="spectrum_config_path").get("unfrozen_parameters")
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise OptionError("spectrum_config_path", str(source)[:80], "accepted: a file with a list of unfrozen_parameters")
    return {"trainable": tuple(f"^(?:{each})" for each in listed)}

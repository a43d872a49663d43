"""What a tool's file says: the model, our options, the launch, and how every key is treated. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

from peftplan.job.launch import OF_FSDP

if TYPE_CHECKING:
    from peftplan.results.config_documents import ConfigDocument

Tool = Literal[
    "axolotl", "llamafactory", "llamafactory-v1", "trl", "trl-script", "torchtune", "swift", "unsloth", "transformers",
    "transformers-script", "transformers-examples", "nemo-automodel", "peft", "accelerate", "deepspeed", "other",
]  # fmt: skip
TOOLS: tuple[Tool, ...] = get_args(Tool)
ExportTool = Literal["axolotl", "llamafactory", "trl", "trl-script", "torchtune", "ms-swift", "accelerate", "deepspeed"]
"""Tools whose configs are written, as `export --to` names them."""
LOADING_AS_TOLD = ("trl-script", "transformers-script")
"""Tools whose files are programs that load the model, on a `device_map` of yours."""
LAUNCHERS: tuple[Tool, ...] = ("accelerate", "deepspeed")
"""Tools whose files say how a job is launched, not what it trains."""

Effect = Literal["lowers", "raises", "unknown"]
"""What a key does to the true peak, compared with the number that leaves it out."""
Bound = Literal["at_most", "at_least", "unknown"]
"""What a number is that leaves keys out: the true peak is at most it, at least it, or not comparable."""

NO_EFFECT = "no effect:"
"""How the remark on a key begins that the tool leaves out and that is nearly one of its own."""


class Read(NamedTuple):
    """A key that decides options."""

    value: object
    option: str
    """The options, comma-separated; `model` and names of the launch too."""
    why: str = ""


class Ignored(NamedTuple):
    """A key that does not change memory."""

    value: object
    why: str
    at: str = ""
    """The tool's file and line."""


class Unsupported(NamedTuple):
    """A key that changes memory, or may, and that no option says."""

    value: object
    why: str
    effect: Effect = "unknown"
    option: str | None = None
    """The option that takes its place where the user sets it."""


class Refused(NamedTuple):
    """A key with which the tool raises, and the change with which it runs: the plan is of the changed file."""

    value: object
    why: str
    """The tool's error, with file and line."""
    instead: Mapping[str, object]
    """Keys and their new values; None removes the key."""
    option: str | None = None
    """The option that takes its place where the user sets it."""


@dataclass(frozen=True)
class ConfigPlan:
    """What a tool's files say. Every key is in one of `read`, `ignored` and `unsupported`, but those that a change removes."""

    tool: Tool
    version: str
    """The release of the tool that reads the file: the one whose keys are known, or an older one that was named."""
    files: tuple[str, ...]
    model: str | None
    options: Mapping[str, object]
    """Our options (`method` among them), defaults of the tool included."""
    launch: Mapping[str, object] = field(default_factory=dict)
    """How many processes run, and how they share the model."""
    read: Mapping[str, Read] = field(default_factory=dict)
    ignored: Mapping[str, Ignored] = field(default_factory=dict)
    unsupported: Mapping[str, Unsupported] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Option that the file leaves to the tool → the tool's file and line."""
    assumed: Mapping[str, str] = field(default_factory=dict)
    """What the file leaves to the data or the launcher → what is assumed."""
    kind: Literal["training", "launch", "other"] = "training"
    """Whether the file trains a model, launches a job, or does something else."""
    of_ddp: Mapping[str, bool | float] = field(default_factory=dict)
    """What the file or its tool says of DDP alone, by option (`OF_DDP`), wherever the file is launched."""
    refused: Mapping[str, Refused] = field(default_factory=dict)
    """Keys with which the tool raises, of which the plan has the changed values."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Key → its file and line."""
    releases: Mapping[str, str] = field(default_factory=dict)
    """Package → the release that a notebook installs, of those that `Script` takes."""

    @property
    def no_model(self) -> str:
        """Why no model is known, and what to do."""
        left_open = next((row for row in self.unsupported.values() if row.option == "model"), None)
        if left_open is None:
            return "names no model; add MODEL"
        return f"takes its model from {str(left_open.value).strip('<>')}; add MODEL, or name the script that runs it"

    def without(self, chosen: Mapping[str, object]) -> dict[str, Unsupported]:
        """The unsupported keys, less those whose option the user has set."""
        return {key: row for key, row in self.unsupported.items() if row.option is None or chosen.get(row.option) is None}

    def refusals(self, chosen: Mapping[str, object] = MappingProxyType({})) -> dict[str, str]:
        """What the tool raises for the files as they are → the change that runs, in words, less what the user has set."""
        changes: dict[str, dict[str, object]] = {}
        for row in self._refused(chosen).values():
            changes.setdefault(row.why, {}).update(row.instead)
        return {why: _change(instead) for why, instead in changes.items()}

    def warnings(self, chosen: Mapping[str, object] = MappingProxyType({})) -> tuple[str, ...]:
        """The same, a sentence each."""
        return tuple(f"{why}; the numbers are those {change}" for why, change in self.refusals(chosen).items())

    def _refused(self, chosen: Mapping[str, object]) -> dict[str, Refused]:
        return {key: row for key, row in self.refused.items() if row.option is None or chosen.get(row.option) is None}

    def to_dict(self, chosen: Mapping[str, object] | None = None) -> ConfigDocument:
        """The `config` field of an estimate's JSON; nothing is assumed of an option that the user has `chosen`."""
        chosen = chosen or {}
        unsupported = self.without(chosen)
        document = {
            "tool": self.tool,
            "version": self.version,
            "files": list(self.files),
            "model": self.model,
            "options": {name: value for name, value in self.options.items() if name not in OF_FSDP},
            "launch": dict(self.launch),
            "read": {key: row._asdict() for key, row in self.read.items()},
            "ignored": {key: row._asdict() for key, row in self.ignored.items()},
            "unsupported": {key: row._asdict() for key, row in unsupported.items()},
            "refused": {
                key: {"value": row.value, "why": row.why, "instead": dict(row.instead)}
                for key, row in self._refused(chosen).items()
            },
            "defaults": dict(self.defaults),
            "assumed": {name: text for name, text in self.assumed.items() if name not in chosen},
            "bound": bound(unsupported),
        }
        return cast("ConfigDocument", document)


def _change(instead: Mapping[str, object]) -> str:
    """A change of keys in words."""
    new = [
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}"
        for key, value in instead.items()
        if value is not None
    ]
    removed = [key for key, value in instead.items() if value is None]
    return " and ".join(f"{how} {', '.join(keys)}" for how, keys in (("with", new), ("without", removed)) if keys)


def bound(unsupported: Mapping[str, Unsupported]) -> Bound | None:
    """What a peak is that leaves these keys out; None if there are none."""
    effects = {row.effect for row in unsupported.values()}
    if not effects:
        return None
    return "at_most" if effects == {"lowers"} else "at_least" if effects == {"raises"} else "unknown"


def misspelled(assumed: Mapping[str, str]) -> list[str]:
    """Of what is assumed the keys that the tool leaves out and that are nearly one of its own, each with the nearest."""
    return [f"{key} has {text}" for key, text in assumed.items() if text.startswith(NO_EFFECT)]

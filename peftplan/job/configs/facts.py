"""The facts about a tool: its keys, their defaults with file and line, and what each means for memory (`data/configs`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from typing import NamedTuple

from peftplan.datafiles import load
from peftplan.job.configs.documents import by_word, word
from peftplan.job.configs.plan import Tool
from peftplan.job.configs.tool_file import Builder, Case, Row, Rule, ToolFile, Write

FOLDER = "configs"


class Known(NamedTuple):
    """A key's row, and where the tool defines it."""

    row: Row
    default: object
    at: str


@dataclass(frozen=True)
class Facts:
    """The data file of a tool, with those of the tools whose keys it takes too."""

    tool: Tool
    version: str
    detect: tuple[Case, ...]
    rows: Mapping[str, Row]
    schema: Mapping[str, tuple[object, str]]
    rules: tuple[Rule, ...]
    calls: Mapping[str, str]
    """Calls of a script → the name under which their arguments are keys."""
    positions: Mapping[str, Sequence[str]]
    """Last part of a call's name → the names of its first arguments, where the call may leave them out."""
    last: tuple[str, ...]
    """Those that stand in place of others under their name."""
    models: Mapping[str, str]
    lists: Mapping[str, list[str]]
    """Values in lower case under a name, by which rules accept them."""
    write: Write
    in_16_bits: Mapping[str, Sequence[str]]
    """Name of a quantized repository in lower case → the modules that it leaves in 16 bits."""
    builders: Mapping[str, Builder] | None = None
    """Models that the tool builds itself, where a file names the function."""
    strategy: str | None = None
    """What the tool does on several GPUs, where its files do not say it."""
    batches: tuple[str, ...] = ()
    """Keys of the rows of a step on all ranks and of a micro batch on one, where the tool divides them to accumulate."""
    micro_batch: str | None = None
    """The key of the rows of a pipeline's micro batch, which divides that of a rank."""
    device_map: str | None = None
    """How it loads a model on one GPU, where its keys do not say it."""
    prefixes: tuple[str, ...] = ()
    """What stands before the keys of other tools that it takes too."""
    transformers: str | None = None
    """The newest release that it runs with, where it refuses newer ones."""
    accelerate: str | None = None
    """The same of accelerate, where one of its releases prepares a model for FSDP2 in another way than the newest."""
    launched_precision: bool = False
    """Whether accelerate's launch decides the mixed precision where the tool has none."""
    installed: bool = False
    """Whether the releases of libraries that a notebook installs run its job."""
    changed_in: tuple[str, ...] = ()
    """Releases of the tool before which rules are otherwise."""
    drops_unknown: str = ""
    """Where the tool drops keys that its schema does not have."""
    components: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """As in `ToolFile`."""

    def known(self, key: str) -> Known | None:
        """The row of a dotted key: its own, a pattern's, or that of the mapping which it is in; None for no key of the tool."""
        if key not in self.rows and key not in self.schema:
            return self._row_of(key)
        if key not in self._own:
            self._own[key] = self._row_of(key)
        return self._own[key]

    @cached_property
    def _own(self) -> dict[str, Known | None]:
        """Cache of `known`: the tool's own keys."""
        return {}

    def _row_of(self, key: str) -> Known | None:
        default, at = self.schema.get(key, (None, self._place_above(key)))
        row = self.rows.get(key) or next((row for name, row in self._patterns_of(key) if fnmatchcase(key, name)), None)
        if row is None and "." in key:
            above = key.rpartition(".")[0]
            while above and row is None:
                row = self.rows.get(f"{above}.*")
                above = above.rpartition(".")[0]
        if row is not None:
            return Known(row, row.get("default", default), row.get("at", at))
        if key in self.schema or key.partition(".")[0] in self.schema:
            return Known(
                {"unsupported": f"its effect on memory is not known ({at})"},
                default,
                at,
            )
        return None

    def _place_above(self, key: str) -> str:
        """Where the tool defines the mapping that a key is in."""
        while key := key.rpartition(".")[0]:
            if key in self.schema:
                return self.schema[key][1]
        return ""

    @cached_property
    def options_by_default(self) -> tuple[tuple[str, dict[str, object], str], ...]:
        """Each key whose default sets options, these, and where the tool defines it."""
        by_key = []
        for key, row in self.rows.items():
            if "*" in key or not {"to", "sets"} & row.keys():
                continue
            default, at = self.schema.get(key, (None, ""))
            default = row.get("default", default)
            options: Mapping[str, object] | None
            if "to" in row:
                ours = by_word(row.get("values", {}), default)
                options = None if ours is None else {row["to"]: ours}
            else:
                options = row["sets"].get(word(default), row["sets"].get("*"))
            meant = {option: value for option, value in (options or {}).items() if option != "model" and value is not None}
            if meant:
                by_key.append((key, meant, row.get("at", at)))
        return tuple(by_key)

    def _patterns_of(self, key: str) -> Iterator[tuple[str, Row]]:
        """The patterns that may stand for a key: one that keys of the schema match stands for these alone."""
        listed = key in self.schema or bool(self._place_above(key))
        return ((name, row) for name, row, names_listed in self._patterns if listed or not names_listed)

    @cached_property
    def _patterns(self) -> tuple[tuple[str, Row, bool], ...]:
        """Each pattern, and whether a key of the schema matches it."""
        rows = ((name, row) for name, row in self.rows.items() if "*" in name and not name.endswith(".*"))
        return tuple((name, row, any(fnmatchcase(key, name) for key in self.schema)) for name, row in rows)

    @property
    def called(self) -> str:
        """The tool's name for people."""
        return str(self.write.get("called", self.tool))

    def bare(self, key: str) -> str:
        """A key without such a prefix."""
        return key.removeprefix(next((prefix for prefix in self.prefixes if key.startswith(prefix)), ""))

    def names(self) -> tuple[str, ...]:
        """All keys that the tool has."""
        return tuple(sorted({*self.schema, *(name for name in self.rows if "*" not in name)}))


def _included(names: Mapping[str, list[Tool]]) -> Iterator[tuple[str, Facts]]:
    """The tools whose keys a tool takes too, each with what stands before their names."""
    yield from ((prefix, facts(name)) for prefix, tools in names.items() for name in reversed(tools))


def launcher_words(words: Iterable[str]) -> list[str]:
    """Those of a command's words that are torchrun's, accelerate's or DeepSpeed's."""
    keys = load(f"{FOLDER}/launchers.json", ToolFile)["keys"]
    patterns = [key for key in keys if "*" in key]
    return [word for word in words if word in keys or any(fnmatchcase(word, pattern) for pattern in patterns)]


@cache
def facts(tool: Tool) -> Facts:
    """The facts of a tool."""
    raw = load(f"{FOLDER}/{tool}.json", ToolFile)
    includes = raw.get("includes", {})
    prefixed = includes if isinstance(includes, dict) else {"": includes}
    commanded = any(case.get("kind") == "command" for case in raw.get("detect", ()))
    launcher = load(f"{FOLDER}/launchers.json", ToolFile) if commanded else ToolFile()
    launched = launcher.get("keys", {})
    rows: dict[str, Row] = dict(launched)
    schema: dict[str, tuple[object, str]] = {}
    for prefix, other in _included(prefixed):
        rows |= {prefix + key: row for key, row in other.rows.items()}
        schema |= {prefix + key: (default, f"{other.tool} {other.version}, {at}") for key, (default, at) in other.schema.items()}
    for why, keys in raw.get("ignored", {}).items():
        places = keys if isinstance(keys, dict) else {}
        rows |= {key: {"ignored": why, "at": places[key]} if places.get(key) else {"ignored": why} for key in keys}
    own = raw.get("keys", {})
    rows = {**{key: row for key, row in own.items() if "*" not in key}, **rows, **own}  # a tool's own words come first
    schema |= {key: (default, at) for key, (default, at) in raw.get("schema", {}).items()}
    rows |= {key: {**row, "at": schema[key][1]} for key, row in rows.items() if key in schema and row is launched.get(key)}
    return Facts(
        tool,
        raw["version"],
        tuple(raw.get("detect", ())),
        rows,
        schema,
        tuple(raw.get("rules", ())),
        raw.get("calls", {}),
        raw.get("positions", {}),
        tuple(raw.get("last", ())),
        raw.get("models", {}),
        raw.get("lists", {}),
        raw.get("write", {}),
        {name: row["in_16_bits"] for row in raw.get("repositories", ()) for name in (row["repository"].lower(), *row["names"])},
        raw.get("builders"),
        raw.get("strategy"),
        tuple(raw.get("batches", ())),
        raw.get("micro_batch"),
        next(iter(raw.get("device_map", ())), None),
        tuple(filter(None, prefixed)),
        next(iter(raw.get("transformers", ())), None),
        next(iter(raw.get("accelerate", ())), None),
        "launched_precision" in raw,
        "installed" in raw,
        tuple(raw.get("changed_in", ())),
        raw.get("drops_unknown", ""),
        raw.get("components", {}),
        raw.get("sections", {}),
    )

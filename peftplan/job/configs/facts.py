"""The facts about a tool: its keys, their defaults with file and line, and what each means for memory (`data/configs`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from typing import NamedTuple, TypedDict

from peftplan.datafiles import load
from peftplan.job.configs.documents import Values, by_word, word
from peftplan.job.configs.plan import Effect, Tool

FOLDER = "configs"


class Row(TypedDict, total=False):
    """What one key means. Exactly one of `to`, `sets`, `launch`, `rule`, `ignored` and `unsupported` is there."""

    to: str
    """The option (or `model`) that takes the value."""
    values: Mapping[str, object]
    """Of `to`: their value in lower case → ours; null sets nothing."""
    sets: Mapping[str, Mapping[str, object] | None]
    """Value in lower case → the options that it sets; null: it is not supported. `*`: any other value."""
    launch: str
    """The fact about the launch."""
    rule: str
    """Why the key takes part in the file's `rules`."""
    names: str
    """Of `rule`: the option whose value the key names; a name that no rule knows is not supported."""
    ignored: str
    """Why it does not change memory."""
    unsupported: str
    """Why it changes memory, though peftplan does not model it."""
    effect: Effect
    option: str
    """Of an unsupported key: the option that takes its place where the user sets it."""
    open: object
    """Of `to`: the value that is assumed where the file leaves it to its reader, such as `<num-labels>`."""
    off: list[object]
    """Of an unsupported key: values that change nothing, besides those that are false, empty or `none`."""
    default: object
    at: str
    why: str


class Product(TypedDict, total=False):
    """A condition on the product of a key with another one, `times`, or on the key itself: `below`."""

    below: int
    times: str
    at_least: int
    multiple_of: str


class Meant(TypedDict, total=False):
    """A value that a rule makes of keys; one of these is there."""

    all: bool
    key: str
    product: list[str | int]
    sum: list[str | int]
    names: Mapping[str, list[str] | Mapping[str, str | None]]
    globs: str
    pattern: str
    of: str
    """Of a pattern: the key whose names stand for `NAMES` in it."""
    tags: list[Mapping[str, list[str]]]
    in_layers: str
    """Of tags: the key that lets names in `model.layers` do without a tag of the first group."""
    in_16_bits: str
    """The key that names one of `repositories`: the modules that it leaves in 16 bits."""


class Refusal(TypedDict, total=False):
    """A key that a rule finds unsupported."""

    key: str
    why: str
    effect: Effect
    option: str


Accepted = list[object] | str | Product
"""What a rule accepts of a key."""
Setting = Meant | list[str] | str | int | float | None
"""What a rule sets an option to."""


class Rule(TypedDict, total=False):
    """What several keys mean together."""

    when: Mapping[str, Accepted]
    """Key → a list of accepted values, or the name of one in `lists`, `repositories` (any name of one there), `set` or `unset`,
    for which the tool's defaults count, `said` or `unsaid`: by the file, `fraction`: a number that is not whole, or
    `{"below": number}`, `{"at_least": number, "times": key}`: its product with another key's, or
    `{"multiple_of": key, "times": key}`. `file` and `program` are what is read;
    `architecture` is the model's `model_type`, `checkpoint` the dtype in its config, `vocabulary` its own,
    `["multiple of 32"]` or `["no multiple of 32"]`; `experts`
    are its own: `["fused"]` where peft takes names of projections for parameters of experts."""
    set: Mapping[str, Setting]
    """Option → a value, `{"key": name}`, `{"product": [names or numbers]}`, `{"sum": [names or numbers]}`, `{"names": {key: …}}`,
    `{"globs": key}` or `{"pattern": expression, "of": key}`, whose NAMES are those that the key lists (`reading`)."""
    add: Mapping[str, Sequence[str]]
    """Option → names that are added to those that other rules set."""
    defaults: Mapping[str, object]
    """Keys that an option takes → the tool's values of them, in place of its usual defaults, where the file leaves them out."""
    by_default: bool
    """Whether the tool does so by itself."""
    unsupported: Refusal
    supports: list[str]
    """Keys that rules before this one called unsupported, and that are supported here."""
    assumed: Mapping[str, str]
    """What is assumed: of a rule with `supports`, where one of its keys was unsupported."""
    kind: str
    why: str
    at: str


class Repository(TypedDict):
    """A published repository of quantized weights, and the names that the tool takes for it, in lower case."""

    repository: str
    names: list[str]
    in_16_bits: list[str]
    """Its `llm_int8_skip_modules`."""
    source: str


class Case(TypedDict, total=False):
    """Files of a tool, told by their content (`detect`). A key may end in `*`, or name its value as `key=value`."""

    kind: str
    program: list[str]
    not_program: list[str]
    scripts: list[str]
    """Scripts of the tool. A command that runs another one is the tool's if the tool has each of its keys, and one of them is
    in `own`, or the script has a name of `names`."""
    own: list[str]
    """Keys that no other tool has."""
    names: list[str]
    """Names of the tool's scripts, without a folder."""
    all: list[str]
    any: list[str]
    none: list[str]


class Beside(TypedDict):
    """Values that a tool needs beside others."""

    when: Mapping[str, Accepted]
    keys: Values


class Builder(TypedDict, total=False):
    """A model that a tool builds itself: the pattern of its component, prefixes that it lacks, further keys."""

    builder: str
    without: list[str]


Write = TypedDict(
    "Write",
    {
        "called": str, "format": str, "program": str, "run": str, "launch": str, "tasks": list[str], "needs": list[str],
        "tries": list[Values], "first": Values, "as": dict[str, str], "beside": list[Beside], "required": Values,
        "placeholders": Values, "shipped": list[str], "processes": list[str], "never": list[str], "calls": dict[str, str],
        "names": dict[str, str], "imports": dict[str, str], "recipes": dict[str, str], "builder": str,
        "prefixes": dict[str, Values],
    },
    total=False,
)  # fmt: skip
"""What `export` adds to the tables (`writing`)."""


class ToolFile(TypedDict, total=False):
    """The data file of a tool. `includes`: tools whose keys it takes too, by what stands before these; `ignored`: why → keys."""

    version: str
    detect: list[Case]
    includes: list[Tool] | dict[str, list[Tool]]
    ignored: dict[str, list[str]]
    keys: dict[str, Row]
    schema: dict[str, tuple[object, str]]
    rules: list[Rule]
    calls: dict[str, str]
    positions: dict[str, list[str]]
    last: list[str]
    models: dict[str, str]
    lists: dict[str, list[str]]
    repositories: list[Repository]
    write: Write
    builders: dict[str, Builder]
    strategy: str
    batches: list[str]
    device_map: list[str]
    transformers: list[str]
    launched_precision: list[str]


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
    device_map: str | None = None
    """How it loads a model on one GPU, where its keys do not say it."""
    prefixes: tuple[str, ...] = ()
    """What stands before the keys of other tools that it takes too."""
    transformers: str | None = None
    """The newest release that it runs with, where it refuses newer ones."""
    launched_precision: bool = False
    """Whether accelerate's launch decides the mixed precision where the tool has none."""

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
        default, at = self.schema.get(key, (None, ""))
        row = self.rows.get(key) or next((row for name, row in self._patterns() if fnmatchcase(key, name)), None)
        if row is None and "." in key:
            above = key.rpartition(".")[0]
            while above and row is None:
                row = self.rows.get(f"{above}.*")
                above = above.rpartition(".")[0]
        if row is not None:
            return Known(row, row.get("default", default), row.get("at", at))
        if key in self.schema or key.partition(".")[0] in self.schema:
            return Known(
                {"unsupported": f"its effect on memory is not known ({at or self.schema[key.partition('.')[0]][1]})"},
                default,
                at,
            )
        return None

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

    def _patterns(self) -> Iterator[tuple[str, Row]]:
        return ((name, row) for name, row in self.rows.items() if "*" in name and not name.endswith(".*"))

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


@cache
def facts(tool: Tool) -> Facts:
    """The facts of a tool."""
    raw = load(f"{FOLDER}/{tool}.json", ToolFile)
    includes = raw.get("includes", {})
    prefixed = includes if isinstance(includes, dict) else {"": includes}
    commanded = any(case.get("kind") == "command" for case in raw.get("detect", ()))
    launcher = load(f"{FOLDER}/launchers.json", ToolFile) if commanded else ToolFile()
    rows: dict[str, Row] = dict(launcher.get("keys", {}))
    schema: dict[str, tuple[object, str]] = {}
    for prefix, other in _included(prefixed):
        rows |= {prefix + key: row for key, row in other.rows.items()}
        schema |= {prefix + key: (default, f"{other.tool} {other.version}, {at}") for key, (default, at) in other.schema.items()}
    for why, keys in raw.get("ignored", {}).items():
        rows |= {key: {"ignored": why} for key in keys}
    own = raw.get("keys", {})
    rows = {**{key: row for key, row in own.items() if "*" not in key}, **rows, **own}  # a tool's own words come first
    schema |= {key: (default, at) for key, (default, at) in raw.get("schema", {}).items()}
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
        next(iter(raw.get("device_map", ())), None),
        tuple(filter(None, prefixed)),
        next(iter(raw.get("transformers", ())), None),
        "launched_precision" in raw,
    )

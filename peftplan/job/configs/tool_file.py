"""What the data file of a tool holds (`data/configs`): its keys, the rules about them, and how to tell its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from peftplan.job.configs.documents import Values
from peftplan.job.configs.plan import Effect, Tool


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
    instead: Values
    """Of an unsupported key with which the tool raises: the change with which it runs, key → value. `*` is the key itself; null
    removes a key."""
    default: object
    at: str
    why: str


class Product(TypedDict, total=False):
    """A condition on the product of a key with another one, `times`, or on the key itself: `below`, `same_as` another one,
    `other_than` these values: of a list, one entry is; besides, `outside` a list in the model's config. `at_least` a number or
    another key."""

    below: int
    outside: str
    other_than: list[object]
    same_as: str
    times: str
    at_least: int | str
    more_than: str
    """The key whose number is smaller."""
    multiple_of: str
    no_multiple_of: int
    grants: int
    """Bytes a parameter of the model that a limit of memory surely holds."""


class Meant(TypedDict, total=False):
    """A value that a rule makes of keys; one of these is there."""

    all: bool
    key: str
    listed: str
    """The key whose names come in one text, between commas."""
    arguments: Mapping[str, str]
    """Name → the key of its value: `rank=128`, between commas."""
    product: list[str | int | list[str | int]]
    """Keys and numbers, and lists of them, which stand for their sums."""
    by: str
    """Of a product: the key by which it is divided, rounded up."""
    padded: Mapping[str, int]
    """Of a product: key → the number to whose next multiple its value is rounded up."""
    sum: list[str | int]
    names: Mapping[str, list[str] | Mapping[str, str | None]]
    globs: str
    starts: str
    """Patterns of names from their start, in which a dot is a dot, and rows in brackets are left out (axolotl)."""
    parts: str
    """The key that lists modules inside the layers that train (LLaMA-Factory)."""
    beside: str
    """The key that lists parts of other names."""
    pattern: str
    of: str
    """Of a pattern: the key whose names stand for `NAMES` in it."""
    tags: list[Mapping[str, list[str]]]
    in_layers: str
    """Of tags: the key that lets names in `model.layers` do without a tag of the first group."""
    in_16_bits: str
    """The key that names one of `repositories`: the modules that it leaves in 16 bits."""
    divided: str
    """The key of a rank that the experts of a token share."""
    among: str
    """The field of the model's config that says how many these are."""
    parameters: list[str]
    """Those that get their share of it."""


class Refusal(TypedDict, total=False):
    """A key that a rule finds unsupported."""

    key: str
    why: str
    effect: Effect
    option: str
    instead: Values
    """As in `Row`."""


Accepted = list[object] | str | Product
"""What a rule accepts of a key."""
Setting = Meant | list[str] | str | int | float | None
"""What a rule sets an option to."""


class Rule(TypedDict, total=False):
    """What several keys mean together."""

    when: Mapping[str, Accepted]
    """Key → a list of accepted values, or the name of one in `lists`, `repositories` (any name of one there), `set` or `unset`,
    for which the tool's defaults count, `said` or `unsaid`: by the file, `null`: said to be nothing, `fraction`: a number that is
    not whole, `whole`: nothing or a whole number, or `{"below": number}`, `{"other_than": [values]}`, `{"same_as": key}`,
    `{"at_least": number, "times": key}`: its product with another key's, or `{"multiple_of": key, "times": key}`, or of
    `key_value_heads`, the model's, `{"multiple_of": key}`, or `{"no_multiple_of": number}`, or `{"more_than": key}`, or
    `{"grants": bytes}`: a size that holds the model in so many bytes a parameter.
    `tool_version` is `older` than a release of `changed_in`, as the user or an earlier rule says, or `newest`,
    `file` and `program` are what is read, `header` its comments, `installs` how releases begin that a notebook installs;
    `architecture` is the model's `model_type`, or another than those in `{"other_than": [names]}`, `checkpoint` the dtype in its
    config, `vocabulary` its own, `["multiple of 32"]` or `["no multiple of 32"]`; `experts` are its own: `["fused"]` where peft
    takes names of projections for their parameters."""
    set: Mapping[str, Setting]
    """Option → a value, `{"key": name}`, `{"product": [names or numbers]}`, `{"sum": [names or numbers]}`, `{"names": {key: …}}`,
    `{"globs": key}` or `{"pattern": expression, "of": key}`, whose NAMES are those that the key lists (`reading`)."""
    add: Mapping[str, Sequence[str]]
    """Option → names that are added to those that other rules set."""
    defaults: Mapping[str, object]
    """Keys → the tool's values of them, in place of its usual defaults, where the file leaves them out."""
    instead: Mapping[str, object]
    """Keys → the values that count for later rules, whatever the file says."""
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
    half: bool
    """Whether the tool has at least half of the file's keys: a report of a run has others beside those of its settings."""


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
        "examples": Values, "placeholders": Values, "shipped": list[str],
        "without": list[str], "processes": list[str], "never": list[str],
        "calls": dict[str, str],
        "names": dict[str, str], "imports": dict[str, str], "recipes": dict[str, str], "builder": str,
        "prefixes": dict[str, Values],
    },
    total=False,
)  # fmt: skip
"""What `export` adds to the tables (`writing`)."""


class ToolFile(TypedDict, total=False):
    """The data file of a tool. `includes`: tools whose keys it takes too, by what stands before these; `ignored`: why →
    keys, or why → key → the tool's file and line; `components`: dotted path → file with line, and names of arguments
    between spaces; `sections`: the same of mappings that name no component, or take more than theirs."""

    version: str
    detect: list[Case]
    includes: list[Tool] | dict[str, list[Tool]]
    ignored: dict[str, list[str] | dict[str, str]]
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
    micro_batch: str
    device_map: list[str]
    transformers: list[str]
    accelerate: list[str]
    launched_precision: list[str]
    installed: list[str]
    changed_in: list[str]
    drops_unknown: str
    components: dict[str, list[str]]
    sections: dict[str, list[str]]

"""The built-in models. One small index maps names, aliases and repository ids to them, so that no other file is opened.

`data/models/index.json` has a row per model, `data/model_aliases.json` further names with the source of each, and
`data/models/<name>.json` a model's config and where that came from.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple, TypedDict

from peftplan.datafiles import load as load_data
from peftplan.datafiles import record
from peftplan.errors import InputError, UnknownNameError, nearest

INDEX = "models/index.json"
ALIASES = "model_aliases.json"
"""Further names of the built-in models, with the source of each; read only for a name that the index does not hold."""
DTYPES = "checkpoint_dtypes.json"
"""Patterns of names of built-in models → the dtype of their weights and its source, where a config names no dtype."""

BY_OLLAMA = {"mistral:7b": "mistral-7b-v0.3"}
"""Names of Ollama that mean a later release than the name without a colon, which has another vocabulary."""
OF_A_SITE = re.compile(r"https?://[^/]+/([^/?#]+/[^/?#]+)")
"""The page of a repository → its id."""
MOST_NEAR = 3
"""Models that the error for an unknown name suggests."""


class Aliases(TypedDict):
    """What is read of the file of names: name → its row, which names a built-in model."""

    aliases: dict[str, dict[str, str]]


class ModelFile(TypedDict, total=False):
    """What is read of a built-in model's own file. `note` is there where its count needs one."""

    config: dict[str, object]
    source: str
    note: str


class ModelEntry(NamedTuple):
    """One built-in model.

    `aliases` are further names of the same repository, `siblings` ids of other checkpoints of the same shapes (an instruct
    model beside its base). `num_parameters` is that of transformers' `model_class`, ties once; `verified` says whether it
    equals the published count, or differs from it for a reason that the model's note gives. `exactness` says how the config
    was obtained.
    """

    name: str
    repo_id: str
    aliases: tuple[str, ...]
    siblings: tuple[str, ...]
    model_type: str
    model_class: str
    num_parameters: int
    verified: bool
    exactness: str

    def matches(self, pattern: str) -> bool:
        """Whether a name, alias or id contains the pattern, or matches it where it has `*`, `?` or `[`; case is ignored."""
        glob = pattern.lower()
        names = [name.lower() for name in (self.name, self.repo_id, *self.aliases, *self.siblings, self.model_type)]
        if any(c in glob for c in "*?["):
            return any(fnmatchcase(name, glob) for name in names)
        loose = re.compile(rf"{re.escape(glob)}(?!\d)" if glob[-1:].isdigit() else re.escape(glob))  # no 34b for a 3
        return any(glob in name or loose.search(_loose(name)) for name in names)

    def is_sibling(self, name: str) -> bool:
        """Whether a name that matches this entry belongs to another checkpoint of the same shapes, or to a mirror."""
        return _key(name) in map(_key, self.siblings) or _key(name) not in _by_key()

    def facts(self) -> ModelFile:
        """The contents of the model's file. Do not modify it."""
        return load_data(f"models/{self.name}.json", ModelFile)


class UnknownModelError(UnknownNameError):
    """A name that is not a built-in model. Suggests near names, and says what else is accepted as a model."""

    def __init__(self, value: object, choices: tuple[str, ...]) -> None:
        self.choices = sorted(choices, key=lambda name: (len(name), name))
        on_site = OF_A_SITE.match(str(value))
        near = [on_site[1]] if on_site else near_models(str(value), self.choices)
        more = near and _loose(near[0]).startswith(_loose(str(value))) and len(models(str(value))) > len(near)
        listed = f" (`peftplan models {value}` lists more)" if more else ""
        InputError.__init__(
            self,
            "model",
            value,
            (f"did you mean {' or '.join(near)}{listed}? " if near else "")
            + f"accepted: one of {len(models())} built-in names, a Hub id (owner/name), or a path to a config.json or its folder",
        )


def near_models(name: str, choices: Iterable[str] | None = None) -> list[str]:
    """Names that read like this one, of different built-in models, best first: those of instruct models too."""
    siblings = (sibling.rpartition("/")[2].lower() for entry in _entries() for sibling in entry.siblings)
    names = {*(_short_names() if choices is None else choices), *(each for each in siblings if find(each))}
    ordered = sorted(names, key=lambda each: (len(each), each))
    loose = {_loose(each): each for each in reversed(ordered)}
    alike = [loose[each] for each in nearest(_loose(name), list(reversed(loose)), most=4 * MOST_NEAR)]
    by_model: dict[ModelEntry | None, str] = {}
    for each in alike:
        by_model.setdefault(find(each), each)
    return list(by_model.values())[:MOST_NEAR]


@cache
def _entries() -> tuple[ModelEntry, ...]:
    return tuple(record(ModelEntry, row) for row in load_data(INDEX, list[dict[str, object]]))


@cache
def _by_key() -> dict[str, ModelEntry]:
    return {_key(name): entry for entry in _entries() for name in (entry.name, entry.repo_id, *entry.aliases, *entry.siblings)}


@cache
def _by_alias() -> dict[str, ModelEntry]:
    """Mirrors, and names of other checkpoints of the same shapes. Each is a row with its source; none is derived by a rule."""
    by_name = {entry.name: entry for entry in _entries()}
    return {_key(alias): by_name[row["model"]] for alias, row in load_data(ALIASES, Aliases)["aliases"].items()}


def _key(name: str) -> str:
    """A name as it is compared: lower case, with `-` for `_` and spaces."""
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _loose(name: str) -> str:
    """A name without the hyphen before a number and with one for a colon: llama3-8b for llama-3-8b and Ollama's llama3:8b."""
    return re.sub(r"(?<=[a-z])-(?=\d)", "", _key(name).replace(":", "-"))


@cache
def _by_loose_name() -> dict[str, str | None]:
    """Every name without an owner, spelled loosely → one that `find` knows; None where several models have it."""
    loose: dict[str, str | None] = {}
    for key in (*_by_key(), *_by_alias()):
        name = _loose(key.rpartition("/")[2])
        known = loose.setdefault(name, key)
        if known is not None and find(known) is not find(key):
            loose[name] = None
    return loose


def models(pattern: str | None = None) -> tuple[ModelEntry, ...]:
    """The built-in models by name; with a pattern, those whose name, alias, id or model type contains or matches it."""
    if pattern is None:
        return _entries()
    matching = tuple(entry for entry in _entries() if entry.matches(pattern))
    return matching if matching or _loose(pattern) in ("", pattern) else models(_loose(pattern))


def find(name: str) -> ModelEntry | None:
    """The built-in model of a name, alias or repository id; case, `_` and blanks do not matter. None if there is none."""
    return _by_key().get(_key(name)) or _by_alias().get(_key(name))


def spelled(name: str) -> str | None:
    """The name that `find` knows, of one without an owner that it does not know: llama3-8b, qwen3:8b, or the last part of the
    id of a checkpoint that is listed, such as zephyr-7b-alpha. None if no model or several are meant."""
    if find(name) is not None:
        return name
    return BY_OLLAMA.get(_key(name)) or _by_loose_name().get(_loose(name))


class Dtypes(TypedDict):
    """What is read of the file of dtypes: pattern → dtype and source."""

    dtypes: dict[str, list[str]]
    in_config: list[str]
    """Those whose own config.json names the dtype, though the config that is built in does not."""
    other_runs: list[str]
    """Patterns of repositories of a built-in model's shapes that come of another training run: their dtype is not known."""


def stored_dtype(entry: ModelEntry) -> str | None:
    """The dtype of a built-in model's weights where its config names none; None where it is not known."""
    rows = load_data(DTYPES, Dtypes)["dtypes"]
    return next((dtype for pattern, (dtype, _) in rows.items() if fnmatchcase(entry.name, pattern)), None)


def config_dtype(entry: ModelEntry) -> object:
    """The dtype that a built-in model's config.json names; None where it names none."""
    in_config = any(fnmatchcase(entry.name, pattern) for pattern in load_data(DTYPES, Dtypes)["in_config"])
    return entry.facts()["config"].get("dtype") or (stored_dtype(entry) if in_config else None)


def is_other_run(name: str) -> bool:
    """Whether a repository with the shapes of a built-in model holds the weights of another training run."""
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in load_data(DTYPES, Dtypes)["other_runs"])


def unknown(name: str) -> UnknownModelError:
    """The error for a name that is neither built in, nor a path, nor a Hub id."""
    return UnknownModelError(name, _short_names())


def _short_names() -> tuple[str, ...]:
    return tuple(key for key in _by_key() if "/" not in key)

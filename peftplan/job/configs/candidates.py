"""Values of a tool that set an option to a value: its rows and rules, read backwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from peftplan.dtypes import OF_CHECKPOINT
from peftplan.job.configs.documents import Values
from peftplan.job.configs.facts import Facts
from peftplan.job.configs.reading import Reading
from peftplan.job.configs.tool_file import Meant, Rule

OPEN_WORDS = ("auto", "*")
"""Their words for what the tool chooses itself."""
LITERALS = {"true": True, "false": False, "none": None, "0.0": 0.0}


def candidates(tool: Facts, option: str, value: object, reading: Reading) -> Iterator[Values]:
    """Values with values, the plainest first: rows, rules that set the value itself, rules that take it from a key.

    A value of None removes the key. `reading` says which keys are there already.
    """
    yield from (keys for keys in _of_rows(tool, option, value) if not _never(tool, keys))
    for rule in sorted(tool.rules, key=lambda rule: isinstance(rule.get("set", {}).get(option), Mapping)):
        keys = _of_rule(rule, option, value, reading, tool.write.get("examples", {}))
        if keys is not None and not _never(tool, {*keys, *rule.get("when", {})}):
            yield keys


def _never(tool: Facts, keys: Values | set[str]) -> bool:
    """Whether a key is one that is read and that no file should have."""
    return any(fnmatchcase(key, name) for key in keys for name in tool.write.get("never", ()))


def _of_rows(tool: Facts, option: str, value: object) -> Iterator[Values]:
    for key, row in tool.rows.items():
        if "*" in key:
            continue
        if row.get("to") == option:
            named = {theirs: ours for theirs, ours in row.get("values", {}).items() if ours is not None}
            words = [theirs for theirs, ours in named.items() if ours == value and theirs not in OPEN_WORDS]
            if words or not named:
                yield {key: _plain(words[0] if words else value)}
        for theirs, sets in row.get("sets", {}).items():
            if sets and sets.get(option) == value and theirs not in OPEN_WORDS:
                yield {key: LITERALS.get(theirs, theirs)}


def _of_rule(rule: Rule, option: str, value: object, reading: Reading, examples: Values) -> Values | None:
    """The keys that make a rule hold and the option that it sets the value; none if they are all there, None if none do.
    `examples`: values of keys that a rule only wants to be set."""
    setting = rule.get("set", {}).get(option)
    keys = _reversed(setting, value) if isinstance(setting, Mapping) else {} if _equal(setting, value) else None
    if setting is None or keys is None:
        return None
    for key, wanted in rule.get("when", {}).items():
        lacks = wanted in ("set", "stated") and key not in keys and not reading.effective.holds(key, wanted)
        if key == "program" or (lacks and key not in examples):
            return None
        if lacks:
            keys[key] = examples[key]
        if wanted == "unset" or (isinstance(wanted, list) and not reading.effective.holds(key, wanted) and key not in keys):
            accepted = [each for each in wanted if each is not None] if isinstance(wanted, list) else []
            if any(isinstance(each, str) and each.startswith("~") for each in accepted):
                return None
            keys[key] = accepted[0] if accepted else None
    return keys or _by_default(rule, reading)


def _equal(setting: object, value: object) -> bool:
    """Whether a rule sets a value, or may: which dtype a checkpoint has, the job of the keys shows."""
    return (tuple(setting) if isinstance(setting, list) else setting) == value or setting == OF_CHECKPOINT


def _by_default(rule: Rule, reading: Reading) -> Values:
    """The keys of a rule that holds by the tool's defaults, so that a file states them."""
    conditions = ((key, wanted) for key, wanted in rule.get("when", {}).items() if isinstance(wanted, list) and wanted[0])
    return {key: wanted[0] for key, wanted in conditions if key not in reading.values and not str(wanted[0]).startswith("~")}


def _plain(value: object) -> object:
    return LITERALS.get(value, value) if isinstance(value, str) else list(value) if isinstance(value, tuple) else value


def _reversed(setting: Meant, value: object) -> Values | None:
    """The keys from which a rule takes the value; None where it cannot be."""
    if "key" in setting or "globs" in setting:
        return {setting.get("key") or setting["globs"]: _plain(value)}
    if "names" not in setting or not isinstance(value, tuple):
        return None
    keys: Values = {}
    rest = list(value)
    for key, meant in setting["names"].items():
        if isinstance(meant, list) and all(name in rest for name in meant):
            keys[key] = True
            rest = [name for name in rest if name not in meant]
    for key, meant in setting["names"].items():
        if isinstance(meant, Mapping):
            keys[key] = [next((theirs for theirs, ours in meant.items() if ours == name), name) for name in rest]
    return keys

"""The value of each key of a file: the one in the file, else the tool's default. Rules read it here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

from peftplan.arch import catalogue
from peftplan.job.configs.detect import runs
from peftplan.job.configs.documents import ALLOCATOR, Document, FileError, Values, word
from peftplan.job.configs.facts import Facts
from peftplan.job.configs.tool_file import Accepted, Product, Setting
from peftplan.job.repositories import copied_model
from peftplan.job.sources import checkpoint_dtype
from peftplan.methods.experts import CONVERSIONS
from peftplan.versions import is_before

BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SIZE = re.compile(r"([0-9]+(?:[.][0-9]+)?) *(|[KMG]I?B)")
"""A size as accelerate reads it (accelerate, utils/modeling.py, `convert_file_size_to_int`): `Gb` are bits."""
NOTHING = ("none", "", "false", "no", "null", "[]", "{}", "0", "0.0")


class Effective:
    """The values of a file with the defaults of its tool behind them."""

    def __init__(self, values: Values, tool: Facts, document: Document, file: str) -> None:
        self.values, self.tool, self.document, self.file = values, tool, document, file
        self.defaults: Values = {}
        """Values that rules give to keys which the file leaves out, before the tool's usual ones."""
        self.unknown: dict[str, str] = {}
        """Keys of which the tool's component knows nothing → why (`components`)."""
        self._inside: dict[str, list[str]] = {}
        """Mapping → the names of its keys."""
        for name in values:
            for dot in (at for at, char in enumerate(name) if char == "."):
                self._inside.setdefault(name[:dot], []).append(name)

    def line(self, key: str) -> int | None:
        """The line of a key, of the call that it is an argument of, or of the command."""
        kind, _, name = key.partition(".")
        call = str(self.values.get(f"{kind}.call"))
        lines = self.document.lines
        return next((lines[each] for each in (key, f"{call}.{name}", call) if each in lines), self.document.line)

    def grows_segments(self) -> bool | None:
        """Whether the environment lets segments of torch's allocator grow; None where it does not say so."""
        settings = (re.search(r"expandable_segments: *(\w+)", self.document.environment.get(name, "")) for name in ALLOCATOR)
        words = [setting[1].lower() for setting in settings if setting]
        return words[0] == "true" if words else None

    def of(self, key: str) -> object:
        """The value of a key; the names of its keys where it is a mapping."""
        value = self.values.get(key)
        if value is None:
            if key in self._inside:
                return self._inside[key]
            if (name := key.removeprefix("environment.")) in self.document.environment:
                return self.document.environment[name]
            known = self.tool.known(key)
            value = self.defaults.get(key, known.default if known else None)
        return value

    def holds(self, key: str, accepted: Accepted) -> bool:
        """Whether a key of the file, or the tool's default for it, has one of the values of a rule."""
        if key == "program":
            return not self.document.program if accepted == "unset" else runs(self.document.program, map(str, accepted))
        if key == "file":
            return any(self._equal(self.file + self.document.saved_from, each) for each in accepted)
        if key == "header":
            return any(self._equal(self.document.comments, each) for each in accepted)
        if key == "tool_version":
            return isinstance(accepted, list) and ("older" if self.older else "newest") in accepted
        if key == "installs":
            return any(all(map(self._installs, str(each).split(" & "))) for each in accepted)
        if key == "checkpoint":
            return isinstance(accepted, list) and self._stored_dtype() in accepted
        if key == "vocabulary":
            return self._has_vocabulary(accepted)
        if key == "architecture":
            if isinstance(accepted, Mapping):
                return self._of_model("model_type") not in accepted["other_than"]
            return isinstance(accepted, list) and self._of_model("model_type") in accepted
        if key == "experts":
            return self._of_model("model_type") in CONVERSIONS
        if accepted in ("said", "unsaid"):
            return (self.values.get(key) is not None) is (accepted == "said")
        if accepted == "null":
            return key in self.values and self.values[key] is None
        if isinstance(accepted, Mapping):
            return self._has_product(key, accepted)
        value = self.of(key)
        if accepted == "fraction":
            return isinstance(value, float) and not value.is_integer()
        if accepted == "whole":
            return value is None or self._numbers([key]) is not None
        if accepted in ("set", "unset"):
            return (word(value) not in NOTHING) is (accepted == "set")
        if isinstance(accepted, str):
            return word(value) in (self.tool.in_16_bits if accepted == "repositories" else self.tool.lists[accepted])
        return any(self._equal(value, each) for each in accepted)

    @property
    def older(self) -> str | None:
        """The release of the tool that reads the file, as the user or a rule says, where it is older than one that changed it."""
        version = self.values.get("tool_version") or self.document.chosen.get("tool_version")
        older = version is not None and any(is_before(str(version), each) for each in self.tool.changed_in)
        return str(version) if older else None

    def _installs(self, beginnings: str) -> bool:
        return self.document.installs != "" and any(
            release.startswith(each) for release in self.document.installs.split() for each in beginnings.split(" | ")
        )

    def _has_product(self, key: str, accepted: Product) -> bool:
        if "same_as" in accepted:
            return word(self.of(key)) == word(self.of(accepted["same_as"])) not in NOTHING
        if "outside" in accepted:
            own = self._of_model(accepted["outside"])
            return isinstance(own, list) and word(self.of(key)) not in map(word, [*own, *accepted["other_than"]])
        if "other_than" in accepted:
            value = self.of(key)
            entries = [each for each in (value if isinstance(value, list) else [value]) if word(each) not in NOTHING]
            return not all(any(self._equal(each, known) for known in accepted["other_than"]) for each in entries)
        if "below" in accepted:
            return any(number < accepted["below"] for number in self._numbers([key]) or ())
        if "grants" in accepted:
            return self._grants(key, accepted["grants"])
        if "more_than" in accepted:
            numbers = self._numbers([key, accepted["more_than"]])
            return numbers is not None and numbers[0] > numbers[1]
        if "no_multiple_of" in accepted:
            return any(number % accepted["no_multiple_of"] for number in self._numbers([key]) or ())
        if key == "key_value_heads":
            (ranks,) = self._numbers([accepted["multiple_of"]]) or [0]
            heads = self._of_model("num_key_value_heads")
            return isinstance(heads, int) and ranks > 0 and heads % ranks == 0
        product = prod(self._numbers([key, *filter(None, [accepted.get("times")])]) or [0])
        if "at_least" in accepted:
            return product >= (self._numbers([accepted["at_least"]]) or [0])[0]
        (unit,) = self._numbers([accepted["multiple_of"]]) or [0]
        return product > 0 and unit > 0 and product % unit == 0

    def _numbers(self, keys: Sequence[str | int], padded: Mapping[str, int] | None = None) -> list[int] | None:
        """The whole numbers under these keys, or themselves; None where one has another value. `padded`: key → the number to
        whose next multiple its value is rounded up."""
        texts = [str(abs(key) if isinstance(key, int) else self.of(key)) for key in keys]
        if not all(re.fullmatch("[0-9]{1,10}", text) for text in texts):
            return None
        units = [1 if isinstance(key, int) else (padded or {}).get(key, 1) for key in keys]
        known = [key if isinstance(key, int) else int(text) for key, text in zip(keys, texts, strict=True)]
        return [-(-number // unit) * unit for number, unit in zip(known, units, strict=True)]

    def _grants(self, key: str, itemsize: int) -> bool:
        """Whether a limit of a device surely holds the model, in so many bytes a parameter, beside the largest part that one
        device keeps whole: accelerate leaves room for it, in 90 % of the limit where the model is quantized."""
        size = SIZE.fullmatch(str(self.of(key)).upper())
        entry = catalogue.find(self._model())
        layers, rows, width = map(self._of_model, ("num_hidden_layers", "vocab_size", "hidden_size"))
        if size is None or entry is None or not (isinstance(layers, int) and isinstance(rows, int) and isinstance(width, int)):
            return False
        largest = max(2 * entry.num_parameters // layers, rows * width)
        limit = float(size[1]) * BYTES[size[2]] / (8 if str(self.of(key)).endswith("b") else 1)
        in_fp32 = 2 * 4 * rows * width  # embedding and head, which are not quantized
        return 9 * limit >= 10 * (itemsize * (entry.num_parameters + largest) + in_fp32)

    def _has_vocabulary(self, accepted: Accepted) -> bool:
        """Whether the rows of the model's embedding are, or are not known to be, a multiple of a number."""
        (text,) = map(str, accepted)
        rows = self._of_model("vocab_size")
        return (isinstance(rows, int) and rows % int(text.rpartition(" ")[2]) == 0) is text.startswith("multiple")

    def _stored_dtype(self) -> str | None:
        """The dtype that the config of the file's model states; None where it is not built in."""
        entry = catalogue.find(self._model())
        dtype = None if entry is None else catalogue.config_dtype(entry)
        return None if dtype is None else checkpoint_dtype(self._model(), {"dtype": dtype})

    def _of_model(self, field: str) -> object:
        """A field of the config of the model that the file names, or of which it names a copy; None where it is not built in.
        Arguments that are an object name none: that of the model beside them."""
        if self.document.model:
            return self.document.model.get(field)
        name = self._model()
        entry = catalogue.find(name) or catalogue.find(copied_model(name) or "")
        return None if entry is None else entry.facts()["config"].get(field)

    def _model(self) -> str:
        """The model that the file names; empty where it names none."""
        keys = [key for key, row in self.tool.rows.items() if row.get("to") == "model" and key in self.values]
        return str(self.values[keys[0]]) if keys else ""

    @staticmethod
    def _equal(value: object, accepted: object) -> bool:
        """`~text` is contained in the value, or in one of its entries; of `~text & text` both are."""
        if isinstance(accepted, str) and accepted.startswith("~"):
            return all(text in str(value).lower() for text in accepted[1:].lower().split(" & "))
        return word(value) == word(accepted)

    def meant(self, setting: Setting) -> object:
        """The value that a rule sets: itself, or what it makes of keys; None where these say nothing."""
        if not isinstance(setting, Mapping):
            return tuple(setting) if isinstance(setting, list) else setting
        if "all" in setting:
            return {name: value for name, value in self.document.values.items() if name not in self.unknown}
        if "tags" in setting:
            return self._tags(setting["tags"], in_layers=bool(self.of(setting["in_layers"])) if "in_layers" in setting else False)
        if "pattern" in setting:
            listed = self._listed(setting["of"], self.of(setting["of"]))
            return setting["pattern"].replace("NAMES", "|".join(map(re.escape, listed)))
        if "starts" in setting:
            return tuple(_from_start(name) for name in self._listed(setting["starts"], self.of(setting["starts"])))
        if "parts" in setting:
            inside = self._listed(setting["parts"], self.of(setting["parts"]))
            beside = self._listed(setting["beside"], self.of(setting["beside"]))
            names = (r"\.{layers}\." + ("" if name == "all" else re.escape(name)) for name in inside)
            return (*names, *map(re.escape, filter(None, beside)))
        if "globs" in setting:
            return _globs(self.of(setting["globs"]))
        if "in_16_bits" in setting:
            return tuple(self.tool.in_16_bits[word(self.of(setting["in_16_bits"]))])
        if "divided" in setting:
            rank, experts = self._numbers([setting["divided"]]), self._of_model(setting["among"])
            return rank and isinstance(experts, int) and dict.fromkeys(setting["parameters"], rank[0] // experts)
        if "names" in setting:
            return self._names(setting["names"])
        if "listed" in setting:
            return ",".join(self._listed(setting["listed"], self.of(setting["listed"])))
        if "arguments" in setting:
            return ",".join(f"{name}={self.of(key)}" for name, key in setting["arguments"].items())
        if "key" in setting:
            value = self.of(setting["key"])
            return tuple(value) if isinstance(value, list) else value
        if "product" in setting:
            parts = self._numbers([setting.get("by", 1)])
            padded = setting.get("padded")
            sums = [self._numbers(key if isinstance(key, list) else [key], padded) for key in setting["product"]]
            known = [sum(numbers) for numbers in sums if numbers is not None]
            return None if len(known) < len(sums) or not parts else -(-prod(known) // max(*parts, 1))
        numbers = self._numbers(setting["sum"])
        return None if numbers is None else sum(numbers)

    def _tags(self, groups: list[Mapping[str, list[str]]], *, in_layers: bool) -> str:
        """A regular expression of names that hold one tag of each group, in their order: tags of the switches that are on.

        `in_layers`: names in `model.layers` need no tag of the first group.
        """
        parts = []
        for switches in groups:
            tags = [tag for key, meant in switches.items() if key == "" or self.of(key) for tag in meant]
            parts.append(f"(?:{'|'.join(tags)})")
        tagged = f".*?{'.*?'.join(parts[:-1])}.*?\\.{parts[-1]}"
        behind_layers = ".*?".join(parts[1:-1])
        layers = rf"model\.layers\.\d+(?!.*\.experts\.\d)\..*?{behind_layers}.*?\.{parts[-1]}"
        return f"(?:{tagged})|(?:{layers})" if in_layers else tagged

    def _names(self, keys: Mapping[str, list[str] | Mapping[str, str | None]]) -> tuple[str, ...] | None:
        """Names of modules: of a key that lists them, theirs → ours or null; of a switch that is on, those it stands for."""
        names: list[str] = []
        for key, meant in keys.items():
            value = self.of(key)
            if isinstance(meant, Mapping):
                ours = (meant.get(name, name) for name in self._listed(key, value))
                names += [name for name in ours if name is not None]
            elif value:
                names += meant
        return tuple(dict.fromkeys(names)) or None

    def _listed(self, key: str, value: object) -> list[str]:
        """The names that a key lists, also between commas in a text. Raises FileError where it lists something else."""
        if isinstance(value, str):
            return [name.strip() for name in value.split(",")]
        listed: list[object] = [] if value is None else value if isinstance(value, list) else [value]
        names = [name for name in listed if isinstance(name, str)]
        if len(names) < len(listed):
            raise FileError(self.file, self.line(key), key, value, "accepted: a list of names")
        return names


def _from_start(pattern: str) -> str:
    """axolotl's pattern of a name (`LayerNamePattern`, utils/freeze.py 0.19); of some rows the whole weight has a gradient."""
    whole = re.sub(r"\[[0-9]*(?::[0-9]*)?\]$", "", pattern)
    return "^(?:" + re.sub(r"\.(?!\+)", r"\.", whole) + ")"


def _globs(value: object) -> object:
    """Names of modules with `*` as a regular expression; names without it as they are."""
    names = value if isinstance(value, list) else [value]
    if not any("*" in str(name) for name in names):
        return tuple(names)
    return "|".join(f"(?:.*\\.)?{re.escape(str(name)).replace(re.escape('*'), '.*')}" for name in names)

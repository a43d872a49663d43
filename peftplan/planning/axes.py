"""The axes of a grid: the values that each option of a job takes, from lists, ranges and text.

`1,2,4` are values, `512:8192:512` a range with its last value, `1,2,4:16:4` both. A range is never written out, so that a grid of
a thousand million points is counted before anything is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

from peftplan.errors import InputError

Values = Sequence[object]

MOST_LISTED = 10**6
"""Values of one option that are not a single range."""
OF_LISTS = frozenset(
    {
        "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform", "layers_pattern",
        "feedforward_modules", "quant_skip_modules", "optim_target_modules", "rank_pattern", "alpha_pattern", "optim_args",
        "peft_config", "quantization_config", "training_args", "script",
    }
)  # fmt: skip
"""Options of which a list, or a text with commas, is one value: several are given as a list of lists, or as `Each`."""
RANGE = "accepted: START:STOP or START:STOP:STEP, which ends at STOP"
NUMBER = r"\d+(?:\.\d+)?"
_RANGE = re.compile(rf"\s*({NUMBER})\s*:\s*({NUMBER})\s*(?::\s*(-?{NUMBER})\s*)?")


class Each(tuple[object, ...]):
    """Values of an option that takes lists, each of which is one value."""

    __slots__ = ()


def separated(options: Mapping[str, object]) -> tuple[dict[str, Values], dict[str, object]]:
    """The options that take several values, and the others. Raises InputError for no value, and a range that is none."""
    axes: dict[str, Values] = {}
    single: dict[str, object] = {}
    for name, value in options.items():
        values = values_of(name, value)
        if values is None:
            single[name] = value
        elif len(values) == 1:
            single[name] = values[0]
        else:
            axes[name] = values
    return axes, single


def values_of(name: str, value: object) -> Values | None:
    """The values of an option, each once; None where it is a single value that is no list."""
    if isinstance(value, str):
        return None if name in OF_LISTS or not set(value) & {",", ":"} else _of_text(name, value)
    if isinstance(value, range):
        return _some(name, value, value)
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Iterable) or hasattr(value, "model_fields"):
        return None
    if hasattr(value, "tolist"):  # arrays and series
        value = value.tolist()
        if not isinstance(value, list):
            return None  # an array without dims is a number
    if not isinstance(value, (list, tuple, set, frozenset)) and name in OF_LISTS:
        return None
    if name == "model" and (hasattr(value, "to_dict") or hasattr(value, "named_parameters")):
        return None  # a config iterates over its fields, a module over its parts
    values = list(value)
    if name in OF_LISTS and not isinstance(value, Each) and all(isinstance(each, (str, int)) for each in values):
        return None
    if any(isinstance(each, (list, tuple)) for each in values) and name not in OF_LISTS:
        raise InputError(name, value, "accepted: a value, a list of values, or a range")
    return _some(name, value, _once(part for each in values for part in _parts(name, each)))


def _parts(name: str, value: object) -> Values:
    """A value of a list: text may hold several."""
    several = _of_text(name, value) if isinstance(value, str) and name not in OF_LISTS and set(value) & {",", ":"} else None
    return (value,) if several is None else several


def _of_text(name: str, text: str) -> Values | None:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and not parts[0][:1].isdigit():
        return None  # a name or a path with a colon
    if not all(parts):
        raise InputError(name, text, "accepted: values with commas between them")
    ranges = [_range(name, part) if ":" in part else None for part in parts]
    if len(parts) == 1 and ranges[0] is not None:
        return ranges[0]
    if sum(1 if values is None else len(values) for values in ranges) > MOST_LISTED:
        raise InputError(name, text, f"accepted: one range alone, or {MOST_LISTED:,} values in all")
    return _once(
        value
        for part, values in zip(parts, ranges, strict=True)
        for value in ((int(part) if part.isdecimal() else part,) if values is None else values)
    )


def _range(name: str, text: str) -> Values:
    matched = _RANGE.fullmatch(text)
    if matched is None:
        raise InputError(name, text, RANGE)
    start, stop, step = (Decimal(number) for number in (matched[1], matched[2], matched[3] or "1"))
    if step <= 0:
        raise InputError(name, text, f"its step must be above 0; {RANGE}")
    if stop < start:
        raise InputError(name, text, f"it ends before it begins; {RANGE}")
    count = int((stop - start) // step) + 1
    if start == int(start) and step == int(step):
        return range(int(start), int(start) + count * int(step), int(step))
    if count > MOST_LISTED:
        raise InputError(name, text, f"accepted: {MOST_LISTED:,} values of a range with decimals")
    return tuple(float(start + at * step) for at in range(count))


def _once(values: Iterable[object]) -> list[object]:
    """Each value once, in their order; True and 1 are two values."""
    return list({(type(value).__name__, repr(value)): value for value in values}.values())


def _some(name: str, value: object, values: Values) -> Values:
    if not len(values):
        raise InputError(name, value, "accepted: at least one value")
    return values

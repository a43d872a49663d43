"""A config.json, read once and strictly: size, encoding, JSON, an object, a model_type. Values are checked where used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from peftplan import files
from peftplan.errors import InputError

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 10 * 2**20
"""Far above any config.json (the largest built-in one has 5 kB). A larger file is something else under that name."""


def read_file(path: Path, *, name: str) -> dict[str, object]:
    """The config in a file. Raises InputError, one line, for anything that is not a readable config.json."""
    return parse(files.content(path, field="model", most=MAX_CONFIG_BYTES), name=name)


def parse(content: bytes, *, name: str) -> dict[str, object]:
    """The config in the bytes of a config.json. Raises InputError if they are not UTF-8, not JSON, or not an object."""

    def refuse_constant(text: str) -> float:
        if text == "NaN":
            raise InputError(name, text, "accepted: numbers (NaN is not JSON)")
        return float(text)

    if len(content) > MAX_CONFIG_BYTES:
        raise InputError("model", name, f"accepted: a config.json of at most {MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(content.decode("utf-8"), parse_constant=refuse_constant)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        _refuse(name, f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        _refuse(name, f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}")
    except RecursionError:
        _refuse(name, "nested too deeply")
    except ValueError as error:  # an integer with more digits than Python converts
        _refuse(name, str(error))
    return check(config, name=name)


def check(config: object, *, name: str) -> dict[str, object]:
    """A parsed config that is an object and states its model_type. Raises InputError otherwise."""
    if not isinstance(config, Mapping):
        _refuse(name, f"a JSON {type(config).__name__}, not an object")
    if not all(isinstance(key, str) for key in config):
        _refuse(name, "an object with keys that are not strings")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        of_adapter = "this is the config of a peft adapter: name its base model"
        hint = f"; {of_adapter if 'peft_type' in config else 'a training config is read by --config'}"
        raise InputError(f"{name}: model_type", model_type, f"the config must state it as a string{hint}")
    return dict(config)


def _refuse(name: str, reason: str) -> NoReturn:
    raise InputError("model", name, f"accepted: a Hugging Face config.json, but this one is {reason}")

"""Launch files of other tools as options: accelerate's YAML and DeepSpeed's JSON.

Every field is in one of three tables: what it sets here, that no byte of a GPU depends on it, or it is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from peftplan.errors import InputError, OptionError

FILES = {"accelerate_config": "accelerate", "deepspeed": "deepspeed"}
"""Option that names a launch file → the module of this package whose `options` reads it."""


OF_FSDP = ("fsdp_word", "fsdp_unread", "fsdp_passed", "fsdp_unstated", "fsdp_ignored")
"""What files and TrainingArguments ask of FSDP (`accelerate.of_release`); no options of their own."""


def launch_options(options: Mapping[str, object]) -> tuple[dict[str, object], tuple[str, ...]]:
    """What launch files say as options, and which files were read. Raises InputError for an option that says otherwise."""
    from_files: dict[str, object] = {}
    given_files = [field for field in FILES if options.get(field) is not None]
    for field in given_files:
        read = import_module(f"peftplan.job.launch.{FILES[field]}").options
        for name, value in read(options[field]).items():
            others = from_files.get(name, value)
            if others != value and not (name == "strategy" and str(others).startswith(("zero", "ddp"))):
                raise OptionError(field, options[field], f"{name} is {others} in accelerate_config and {value} here")
            from_files[name] = value
    for name, value in from_files.items():
        own = options.get(name)
        if own is not None and str(own).lower() != str(value).lower():
            raise InputError(name, own, f"{' and '.join(given_files)} says {value}; accepted: one of the two")
    return from_files, tuple(given_files)

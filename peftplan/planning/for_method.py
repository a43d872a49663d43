"""One set of options for several methods: fields that only other methods have are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peftplan.errors import InputError
from peftplan.methods import METHODS, config_class, method_named, other_peft_type
from peftplan.planning.setup import Setup


def known_methods(names: Iterable[str], field: str = "method") -> tuple[str, ...]:
    """Names of methods, each once, in their order. Raises UnknownNameError for a name that is none, InputError for no name."""
    once = tuple(dict.fromkeys(names))
    if not once:
        raise InputError(field, "", "accepted: names of methods (`peftplan methods`), comma-separated")
    for name in once:
        if other_peft_type(name) is None:
            method_named(name)
    return once


def options_for(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the job, and those fields of a method that `method` has; what is no field of any method stays, to be refused.

    Raises UnknownNameError for an unknown method.
    """
    if other_peft_type(method) is not None:
        return dict(options)
    own = {*config_class(method_named(method)).model_fields, *Setup.model_fields}
    others = {field for each in METHODS.values() for field in config_class(each).model_fields}
    return {name: value for name, value in options.items() if name in own or name not in others}

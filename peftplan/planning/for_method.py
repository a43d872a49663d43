"""One set of options for several methods: fields that only other methods have are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peftplan.errors import InputError, NeedsTraceError
from peftplan.job.setup import Setup
from peftplan.methods import METHODS, config_class, method_named, other_peft_type
from peftplan.results.estimate import Estimate
from peftplan.validation import listed


def without_formula(result: Estimate) -> str:
    """Why a job has no peak, for commands that cannot trace."""
    part = result.not_modelled[0].removesuffix(NeedsTraceError.hint)
    if part == result.not_modelled[0]:
        return part
    return f"no formula for {part}; `peftplan estimate` with --engine trace can count one size"


def known_methods(names: object, field: str = "method") -> tuple[str, ...]:
    """Names of methods, each once, in their order. Raises UnknownNameError for a name that is none, InputError for no name."""
    each = tuple(value) if isinstance(value := listed(names), Iterable) else ()
    once = tuple(dict.fromkeys(name for name in each if isinstance(name, str) and name))
    if not once or not all(isinstance(name, str) for name in each):
        raise InputError(field, names, "accepted: names of methods (`peftplan methods`), comma-separated or in a list")
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

"""One set of options for several methods: fields that only other methods have are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

from peftplan.errors import InputError, NeedsTraceError
from peftplan.job.setup import Setup
from peftplan.methods import METHODS, config_class, method_named, other_peft_type
from peftplan.results.estimate import Estimate
from peftplan.validation import listed

if TYPE_CHECKING:
    from peftplan.job.options import JobOptions

Value = TypeVar("Value")

ONE_POINT = "`peftplan estimate --engine trace` counts one point, `peftplan fit --engine trace` finds the largest size"
"""What answers for a job without formulas where an array of sizes is evaluated."""


def without_formula(result: Estimate) -> str:
    """Why a job has no peak, and what gives it one."""
    part = result.not_modelled[0].removesuffix(NeedsTraceError.hint)
    return part if part == result.not_modelled[0] else f"no formula for {part}; add --engine trace"


def base_of(peft_config: object) -> str:
    """The model that an adapter config names as its base. Raises InputError where it names none."""
    from peftplan.job.ecosystem import base_model

    return base_model(peft_config)


def known_methods(names: object, field: str = "method") -> tuple[str, ...]:
    """Names of methods, each once, in their order. Raises UnknownNameError for a name that is none, InputError for no name."""
    each = tuple(value) if isinstance(value := listed(names), Iterable) else ()
    once = tuple(dict.fromkeys(name for name in each if isinstance(name, str) and name))
    if not once or not all(isinstance(name, str) for name in each):
        raise InputError(field, names or "", "accepted: names of methods (`peftplan methods`), comma-separated or in a list")
    for name in once:
        if other_peft_type(name) is None:
            method_named(name, field)
    return once


def job_options(*parts: Mapping[str, object]) -> JobOptions:
    """Options together, the later ones over the earlier, as `estimate` takes and checks them."""
    return cast("JobOptions", {name: value for part in parts for name, value in part.items()})


def options_for(method: str, options: Mapping[str, Value]) -> dict[str, Value]:
    """Options of the job, and those fields of a method that `method` has; what is no field of any method stays, to be refused.

    Raises UnknownNameError for an unknown method.
    """
    if other_peft_type(method) is not None:
        return dict(options)
    own = {*config_class(method_named(method)).model_fields, *Setup.model_fields}
    others = {field for each in METHODS.values() for field in config_class(each).model_fields}
    return {name: value for name, value in options.items() if name in own or name not in others}

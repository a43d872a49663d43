"""One set of options for several methods: fields that only other methods have are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftplan.methods import METHODS, config_class, method_named, other_peft_type
from peftplan.planning.setup import Setup


def options_for(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the job, and those fields of a method that `method` has; what is no field of any method stays, to be refused.

    Raises UnknownNameError for an unknown method.
    """
    if other_peft_type(method) is not None:
        return dict(options)
    own = {*config_class(method_named(method)).model_fields, *Setup.model_fields}
    others = {field for each in METHODS.values() for field in config_class(each).model_fields}
    return {name: value for name, value in options.items() if name in own or name not in others}

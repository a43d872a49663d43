"""What tools make of the values of a config, without a model: the fields of their own config objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def llamafactory(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the five dataclasses that `llamafactory-cli train` parses."""
    from llamafactory.hparams import get_train_args

    return {name: value for part in get_train_args(dict(values)) for name, value in vars(part).items()}

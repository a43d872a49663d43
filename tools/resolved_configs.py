"""What tools make of the values of a config, without a model: the fields of their own config objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peftplan.rehearse.inside import standins
from tools.rank_grid import cut


def llamafactory(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the five dataclasses that `llamafactory-cli train` parses."""
    from llamafactory.hparams import get_train_args

    return {name: value for part in get_train_args(dict(values)) for name, value in vars(part).items()}


def llamafactory_v1(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the four dataclasses of `llamafactory-cli sft` in v1."""
    from llamafactory.v1.config import get_args

    return {name: value for part in get_args(dict(values)) for name, value in vars(part).items()}


def axolotl(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that axolotl validates."""
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    return dict(validate_config(DictDefault(values)))


def swift(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the arguments of `swift sft`, or of `swift rlhf` for a trainer of its own."""
    from swift.arguments import RLHFArguments, SftArguments

    with TemporaryDirectory() as folder:
        (model := Path(folder, "model")).mkdir()
        standins.write_repository(model, {**cut(values["model"], 1), "dtype": "bfloat16"})
        parsed = (RLHFArguments if "rlhf_type" in values else SftArguments)(**{**values, "model": str(model)})
    return {name: value for name, value in vars(parsed).items() if folder not in str(value)}


def examples(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the `TrainingArguments` that transformers' examples parse."""
    from transformers import TrainingArguments

    return vars(TrainingArguments(**values))

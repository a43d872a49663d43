"""LN tuning (Zhao et al. 2023, arXiv 2312.11420): the normalisation layers train.

peft trains a deep copy of every targeted module and keeps the original frozen beside it, so that the copies are added parameters;
they keep the dtype of the base. Source: peft 0.21.2, `tuners/ln_tuning/layer.py` (`LNTuningLayer.update_layer`).
"""

from __future__ import annotations

from typing import ClassVar

from peftplan.arch.modules import Architecture, Module
from peftplan.errors import RefusedError
from peftplan.methods.adaptation import Adaptation, AddedTensor, NeedsPeftError
from peftplan.methods.targets import TargetedConfig
from peftplan.methods.tuner import tune


class LNTuningConfig(TargetedConfig):
    """peft's `LNTuningConfig`; its targets may be modules of any kind."""

    no_effect: ClassVar[frozenset[str]] = frozenset()


def ln_tuning(arch: Architecture, config: LNTuningConfig) -> Adaptation:
    """The copies that `get_peft_model` makes for an LNTuningConfig."""
    try:
        return tune(arch, config, _copy, peft_type="LN_TUNING")
    except RefusedError as refusal:
        # Copies of modules that hold others are nested: the one method for which peft takes them.
        if "is not a layer that can be adapted" in str(refusal):
            raise NeedsPeftError("LN_TUNING of modules that hold other modules") from None
        raise


def _copy(module: Module) -> list[AddedTensor]:
    return [
        AddedTensor(
            f"{module.name}.ln_tuning_layers.{param}", shape, module.layers, dtype="base", in_embedding=module.kind == "Embedding"
        )
        for param, shape in module.params
    ]

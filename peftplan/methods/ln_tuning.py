"""LN tuning (Zhao et al. 2023, arXiv 2312.11420): the normalisation layers train.

peft trains a deep copy of every targeted module and keeps the original frozen beside it, so that the copies are added parameters;
they keep the dtype of the base. Source: peft, `tuners/ln_tuning/layer.py` (`LNTuningLayer.update_layer`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from peftplan.arch.modules import Architecture, Module
from peftplan.errors import RefusedError
from peftplan.methods.adaptation import Adaptation, AddedTensor, NeedsPeftError
from peftplan.methods.targets import TargetedConfig, match, resolve_targets
from peftplan.methods.tuner import tune

IDENTITIES = {"modernbert": "attn_norm"}
"""model_type → the norm that is an `nn.Identity` in layer 0: a module without parameters, on which peft raises."""


class LNTuningConfig(TargetedConfig):
    """peft's `LNTuningConfig`; its targets may be modules of any kind."""

    no_effect: ClassVar[frozenset[str]] = frozenset()


def ln_tuning(arch: Architecture, config: LNTuningConfig) -> Adaptation:
    """The copies that `get_peft_model` makes for an LNTuningConfig."""
    try:
        adaptation = tune(arch, config, _copy, peft_type="LN_TUNING")
    except RefusedError as refusal:
        # The only method for which peft accepts a module that contains others; it copies them too.
        if "is not a layer that can be adapted" in str(refusal):
            raise NeedsPeftError("LN_TUNING of modules that contain other modules") from None
        raise
    for module in adaptation.matched:
        if any(other.name.startswith(module.name + ".") for other in arch.modules):
            raise NeedsPeftError(f"LN_TUNING of {module.name}, which holds other modules")
        if module.leaf == IDENTITIES.get(arch.model_type):
            _refuse_identity(arch, config, module._replace(layers=(0,)))
    return adaptation


def _refuse_identity(arch: Architecture, config: LNTuningConfig, identity: Module) -> None:
    targets = resolve_targets(arch, config.target_modules, peft_type="LN_TUNING")
    if match(replace(arch, modules=(identity,)), config, targets, may_be_none=True):
        raise RefusedError(f"target_modules: {identity.name} is an nn.Identity in layer 0, on which peft's LN_TUNING raises")


def _copy(module: Module) -> list[AddedTensor]:
    return [
        AddedTensor(
            f"{module.name}.ln_tuning_layers.{param}", shape, module.layers, dtype="base", in_embedding=module.kind == "Embedding"
        )
        for param, shape in module.params
    ]

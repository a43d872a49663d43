"""(IA)³ (Liu et al. 2022, arXiv 2205.05638, §3.3): one vector per targeted layer.

It scales the output of a layer, (out, 1), or the input of a feed-forward layer, (1, in).
Source: peft, `tuners/ia3/layer.py` (`IA3Layer.update_layer`), `tuners/ia3/model.py` (`_check_target_module_feedforward`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

from peftplan import datafiles
from peftplan.arch.modules import LINEAR_KINDS, Architecture, Module
from peftplan.errors import InputError, RefusedError
from peftplan.methods.adaptation import Adaptation, AddedTensor
from peftplan.methods.targets import PeftTargets, TargetedConfig, Targets, resolve_targets, split
from peftplan.methods.tuner import CONVOLUTIONS, require_kind, tune


class IA3Config(TargetedConfig):
    """peft's `IA3Config`, less what changes no tensor."""

    feedforward_modules: Targets = None
    no_effect: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "init_ia3_weights"})


def ia3(arch: Architecture, config: IA3Config) -> Adaptation:
    """The tensors that `get_peft_model` adds for an IA3Config."""
    targets, feedforward = config.target_modules, config.feedforward_modules
    if targets in ("attention", "mlp"):
        targets = resolve_targets(arch, targets, peft_type="IA3")
    if isinstance(targets, tuple) and isinstance(feedforward, tuple) and not set(feedforward) <= set(targets):
        raise RefusedError("feedforward_modules: it must be a subset of target_modules, as peft requires")
    is_feedforward = _matcher(_default_feedforward(arch) if feedforward is None else feedforward)

    def tensors(module: Module) -> list[AddedTensor]:
        require_kind(module, LINEAR_KINDS, method="IA3", by_peft=CONVOLUTIONS)
        return [
            AddedTensor(f"{family.name}.ia3_l", (1, family.in_features) if inner else (family.out_features, 1), family.layers)
            for family, inner in split(module, is_feedforward)
        ]

    return tune(arch, config, tensors, peft_type="IA3")


def _default_feedforward(arch: Architecture) -> tuple[str, ...]:
    mapping = datafiles.load("peft_targets.json", PeftTargets)["feedforward_modules"]["IA3"]
    if arch.model_type not in mapping:
        raise RefusedError(f"feedforward_modules: peft has no default for model_type {arch.model_type!r}; name them")
    return tuple(mapping[arch.model_type])


def _matcher(feedforward: tuple[str, ...] | str) -> Callable[[str], bool]:
    """A list matches the end of a name, as in peft (`fc2` also matches `xfc2`); a regular expression, the whole name."""
    if isinstance(feedforward, tuple):
        return lambda name: name.endswith(feedforward)
    try:
        pattern = re.compile(feedforward)
    except re.error as error:
        raise InputError("feedforward_modules", feedforward, f"not a regular expression: {error}") from None
    return lambda name: pattern.fullmatch(name) is not None

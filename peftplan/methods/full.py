"""Full fine-tuning: every parameter of the base trains, but those that the model class itself creates frozen."""

from __future__ import annotations

from peftplan.arch.modules import Architecture
from peftplan.methods.adaptation import Adaptation, MethodConfig, TrainedParam, trained_params


class FullConfig(MethodConfig):
    """Full fine-tuning has no options."""


def full(arch: Architecture, config: FullConfig) -> Adaptation:
    """Nothing is added, every parameter trains; a tied tensor counts once."""
    return Adaptation(trained=without_frozen(arch, trained_params(arch, arch.modules)))


def without_frozen(arch: Architecture, params: tuple[TrainedParam, ...]) -> tuple[TrainedParam, ...]:
    """The parameters less those that the model class creates with `requires_grad=False`."""
    return tuple(p for p in params if f"{p.module}.{p.param}" not in arch.frozen)

"""Full fine-tuning: every parameter of the base trains.

Those that a model class creates frozen too (Whisper's sinusoidal positions): `from_pretrained` of transformers makes each
loaded parameter anew, with `requires_grad` (`set_param_for_module`, core_model_loading.py).
"""

from __future__ import annotations

from peftplan.arch.modules import Architecture
from peftplan.methods.adaptation import Adaptation, MethodConfig, trained_params


class FullConfig(MethodConfig):
    """Full fine-tuning has no options."""


def full(arch: Architecture, config: FullConfig) -> Adaptation:
    """Nothing is added, every parameter trains; a tied tensor counts once."""
    return Adaptation(trained=trained_params(arch, arch.modules))

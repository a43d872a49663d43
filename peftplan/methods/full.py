"""Full fine-tuning: every parameter of the base trains.

That includes parameters that the model class creates frozen, such as Whisper's sinusoidal positions: `from_pretrained` recreates
each loaded parameter with `requires_grad` (transformers, `set_param_for_module`, core_model_loading.py).
"""

from __future__ import annotations

from peftplan.arch.modules import Architecture
from peftplan.methods.adaptation import Adaptation, MethodConfig, trained_params


class FullConfig(MethodConfig):
    """Full fine-tuning has no options."""


def full(arch: Architecture, config: FullConfig) -> Adaptation:
    """Adds nothing and trains every parameter. A tied tensor counts once."""
    return Adaptation(trained=trained_params(arch, arch.modules))

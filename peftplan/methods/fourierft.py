"""FourierFT (Gao et al. 2024, arXiv 2405.03003, eq. 3): ΔW is the inverse Fourier transform of a sparse spectrum.

`n_frequency` trained coefficients per weight, whatever its shape. Their places, an integer tensor (2, n), are neither parameter
nor buffer. Source: peft, `tuners/fourierft/layer.py` (`update_layer`), `model.py` (`_create_and_replace`).
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from peftplan.arch.modules import LINEAR_KINDS, Architecture, Module
from peftplan.errors import RefusedError
from peftplan.methods.adaptation import Adaptation, AddedTensor
from peftplan.methods.targets import LayeredConfig, Pattern, split
from peftplan.methods.tuner import require_kind, tune

Frequencies = Annotated[int, Field(ge=1)]


class FourierFTConfig(LayeredConfig):
    """peft's `FourierFTConfig`, less what changes no tensor."""

    n_frequency: Frequencies = 1000
    n_frequency_pattern: dict[Pattern, Frequencies] = Field(default_factory=dict)
    bias: Literal["none", "all", "fourier_only"] = "none"
    refuses_layers: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")
    no_effect: ClassVar[frozenset[str]] = frozenset({"scaling", "random_loc_seed", "fan_in_fan_out", "init_weights"})


def fourierft(arch: Architecture, config: FourierFTConfig) -> Adaptation:
    """The tensors that `get_peft_model` adds for a FourierFTConfig."""

    def frequencies(name: str) -> int:
        pattern = next((p for p in config.n_frequency_pattern if re.match(rf".*\.{p}$", name)), name)
        return config.n_frequency_pattern.get(pattern, config.n_frequency)

    def tensors(module: Module) -> list[AddedTensor]:
        require_kind(module, LINEAR_KINDS, method="FOURIERFT")
        families = split(module, frequencies) if config.n_frequency_pattern else [(module, config.n_frequency)]
        return [_spectrum(family, n) for family, n in families]

    return tune(arch, config, tensors, peft_type="FOURIERFT", bias=config.bias)


def _spectrum(module: Module, n: int) -> AddedTensor:
    most = module.in_features * module.out_features
    if n > most:
        raise RefusedError(f"n_frequency: {n} is more than the {most} entries of {module.name}, which peft refuses")
    return AddedTensor(f"{module.name}.fourierft_spectrum", (n,), module.layers)

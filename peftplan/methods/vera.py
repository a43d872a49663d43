"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454, eq. 2): ΔW = Λb·B·Λd·A with A and B random, frozen and shared by all layers.

Per weight (out, in): the vectors λb (out) and λd (r). A (r, widest in) and B (widest out, r) are buffers: the device holds
them, but no count includes them. `d_initial` and `save_projection` change no tensor.
Source: peft, `tuners/vera/model.py` (`_init_vera_A_vera_B`, `_find_dim`), `tuners/vera/layer.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from peftplan.arch.modules import LINEAR_KINDS, Architecture, Module
from peftplan.methods.adaptation import Adaptation, AddedBuffer, AddedTensor
from peftplan.methods.targets import LayeredConfig
from peftplan.methods.tuner import require_kind, tune


class VeraConfig(LayeredConfig):
    """peft's `VeraConfig`, less what changes no tensor. It has no `exclude_modules`."""

    r: Annotated[int, Field(ge=1, le=2**20)] = 256
    vera_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "vera_only"] = "none"
    exclude_modules: None = None
    no_effect: ClassVar[frozenset[str]] = frozenset(
        {"projection_prng_key", "save_projection", "d_initial", "fan_in_fan_out", "init_weights"}
    )


def vera(arch: Architecture, config: VeraConfig) -> Adaptation:
    """The tensors that `get_peft_model` adds for a VeraConfig."""
    adaptation = tune(arch, config, lambda module: _tensors(module, config.r), peft_type="VERA", bias=config.bias)
    widest_in = max(module.in_features for module in adaptation.matched)
    widest_out = max(module.out_features for module in adaptation.matched)
    shared = (
        AddedBuffer("vera_A", (config.r, widest_in), "adapter"),
        AddedBuffer("vera_B", (widest_out, config.r), "adapter"),
    )
    return adaptation._replace(buffers=shared)


def _tensors(module: Module, r: int) -> list[AddedTensor]:
    require_kind(module, LINEAR_KINDS, method="VERA")
    return [
        AddedTensor(f"{module.name}.vera_lambda_b", (module.out_features,), module.layers),
        AddedTensor(f"{module.name}.vera_lambda_d", (r,), module.layers),
    ]

"""LoHa (FedPara, Hyeon-Woo et al. 2022, arXiv 2108.06098, prop. 1): ΔW = (W1a·W1b) ⊙ (W2a·W2b).

Per weight (out, in): twice (out, r) and (r, in), so 2·r·(in + out) parameters.
Source: peft, `tuners/loha/layer.py` (`LoHaLayer.create_adapter_parameters`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from peftplan.arch.modules import Architecture, Module
from peftplan.methods.adaptation import Adaptation, AddedTensor
from peftplan.methods.targets import LayeredConfig, Pattern, by_rank
from peftplan.methods.tuner import LINEAR, require_kind, tune

Rank = Annotated[int, Field(ge=1, le=2**20)]
Probability = Annotated[float, Field(ge=0, le=1)]


class LoHaConfig(LayeredConfig):
    """peft's `LoHaConfig`, less what changes no tensor; `use_effective_conv2d` concerns convolutions only."""

    r: Rank = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    rank_pattern: dict[Pattern, Rank] = Field(default_factory=dict)
    no_effect: ClassVar[frozenset[str]] = frozenset({"alpha", "alpha_pattern", "init_weights", "use_effective_conv2d"})


def loha(arch: Architecture, config: LoHaConfig) -> Adaptation:
    """The tensors that `get_peft_model` adds for a LoHaConfig."""

    def tensors(module: Module) -> list[AddedTensor]:
        families = by_rank(module, r=config.r, rank_pattern=config.rank_pattern)
        return [tensor for family, r in families for tensor in _tensors(family, r)]

    return tune(arch, config, tensors, peft_type="LOHA")


def _tensors(module: Module, r: int) -> list[AddedTensor]:
    require_kind(module, LINEAR, method="LOHA", by_peft=("Conv1d", "Conv2d"))
    n_in, n_out = module.in_features, module.out_features
    shapes = {"hada_w1_a": (n_out, r), "hada_w1_b": (r, n_in), "hada_w2_a": (n_out, r), "hada_w2_b": (r, n_in)}
    return [AddedTensor(f"{module.name}.{part}", shape, module.layers) for part, shape in shapes.items()]

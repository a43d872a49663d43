"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512, eq. 3): ΔW = B·Λ·A, at its initial rank.

Per weight (out, in): A (r, in), E (r, 1) for the diagonal of Λ, B (out, r), and the frozen scalar `ranknum`, with r = `init_r`.
The rank allocator masks singular values while it trains; no tensor shrinks, so `target_r` and the schedule change no size.
Source: peft, `tuners/adalora/layer.py` (`AdaLoraLayer.update_layer`).
Left out: on a 16-bit base peft makes `ranknum` anew when it casts it to fp32, so that it trains by accident: one parameter
more per weight, and 512 B for each of its gradient and states.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from peftplan.arch.modules import LINEAR_KINDS, Architecture, Module
from peftplan.errors import InputError, RefusedError
from peftplan.methods.adaptation import Adaptation, AddedTensor, NeedsPeftError
from peftplan.methods.lora import LoraConfig
from peftplan.methods.saved import refuse_both, saved_modules, token_deltas, token_originals
from peftplan.methods.targets import LayeredConfig
from peftplan.methods.tuner import refuse_mamba, require_kind, tune

STEPS_TO_ALLOCATE = 1000
"""Steps between `tinit` and `tfinal` where `total_step` is unset."""


class AdaLoraConfig(LayeredConfig):
    """peft's `AdaLoraConfig`, less what changes no tensor. `r` is LoRA's field, which peft ignores here."""

    init_r: Annotated[int, Field(ge=0, le=2**20)] = 12
    target_r: int = 8
    r: int = 8
    lora_alpha: float | None = None
    total_step: Annotated[int, Field(ge=1)] | None = None
    """peft requires it; it decides when ranks are masked and changes no size."""
    tinit: Annotated[int, Field(ge=0)] = 0
    tfinal: Annotated[int, Field(ge=0)] = 0
    deltaT: Annotated[int, Field(ge=1)] = 1
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    target_parameters: tuple[str, ...] | None = None
    refuses_layers: ClassVar[tuple[str, ...]] = ("layers_to_transform",)
    no_effect: ClassVar[frozenset[str]] = LoraConfig.no_effect | {
        "beta1", "beta2", "orth_reg_weight", "lora_bias", "use_rslora", "init_lora_weights",
    }  # fmt: skip


def adalora(arch: Architecture, config: AdaLoraConfig) -> Adaptation:
    """The tensors that `get_peft_model` adds for an AdaLoraConfig."""
    if config.use_dora:
        raise RefusedError("use_dora: ADALORA does not support DoRA")
    if config.total_step is not None and config.tinit >= config.total_step - config.tfinal:
        raise InputError(
            "total_step", config.total_step, f"accepted: more than tinit ({config.tinit}) + tfinal ({config.tfinal})"
        )
    if config.target_parameters:
        raise NeedsPeftError("ADALORA with target_parameters")
    refuse_both(arch, saved_modules(arch, config), config.trainable_token_indices)
    adaptation = tune(arch, config, lambda module: _tensors(module, config.init_r), peft_type="ADALORA", bias=config.bias)
    refuse_mamba(arch, adaptation.matched)
    notes = (f"r={config.r} is not used by AdaLoRA; init_r={config.init_r} sets the rank",) if config.r != 8 else ()
    deltas = token_deltas(arch, config.trainable_token_indices)
    return adaptation._replace(added=(*adaptation.added, *deltas), buffers=token_originals(deltas), notes=notes)


def _tensors(module: Module, r: int) -> list[AddedTensor]:
    require_kind(module, LINEAR_KINDS, method="ADALORA", by_peft=("Conv2d",))
    n_in, n_out, layers = module.in_features, module.out_features, module.layers
    return [
        AddedTensor(f"{module.name}.lora_E", (r, 1), layers),
        AddedTensor(f"{module.name}.lora_A", (r, n_in), layers),
        AddedTensor(f"{module.name}.lora_B", (n_out, r), layers),
        AddedTensor(f"{module.name}.ranknum", (1,), layers, trainable=False),
    ]

"""LoRA on parameters themselves (`target_parameters`): stacked experts, or the weight of one layer.

A parameter of shape (E, out, in), or (out, in) with E = 1, gets A (r·E, in) and B (out, r·E). Wrappers of one module nest in the
order of its parameters: the last one is outermost, the others sit in its `base_layer`.
Source: peft, `tuners/lora/layer.py` (`ParamWrapper`), `tuners/tuners_utils.py` (`_inject_parameters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from peftplan.arch.modules import Architecture, Module, Shape
from peftplan.errors import RefusedError
from peftplan.methods.adaptation import AddedTensor
from peftplan.methods.targets import by_rank
from peftplan.methods.tuner import refuse_mamba


class ParameterConfig(Protocol):
    """What is read of a LoraConfig."""

    @property
    def r(self) -> int: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def lora_bias(self) -> bool: ...
    @property
    def use_dora(self) -> bool: ...
    @property
    def freeze_a(self) -> bool: ...


def parameter_tensors(
    arch: Architecture,
    config: ParameterConfig,
    names: tuple[str, ...],
    rank_pattern: Mapping[str, int],
    matched: tuple[Module, ...],
) -> list[AddedTensor]:
    """The tensors for the parameters whose names end with `names`; `matched` are the families that target_modules found.

    Raises RefusedError for what peft's wrapper does not work with.
    """
    suffixes = tuple("." + name for name in names)
    added = []
    for module in arch.modules if names else ():
        hits = [
            (param, shape)
            for param, shape in module.params
            if (key := f"{module.name}.{param}") in names or key.endswith(suffixes)
        ]  # fmt: skip
        if hits:
            _refuse(arch, config, module, matched)
        for outside, (param, shape) in enumerate(hits, start=1):  # a wrapper around all before it
            depth = len(hits) - outside
            for family, r in by_rank(module, r=config.r, rank_pattern=rank_pattern, suffix="." + param):
                added += _tensors(family, param, shape, r=r, depth=depth, freeze_a=config.freeze_a)
    return added


def _refuse(arch: Architecture, config: ParameterConfig, module: Module, matched: Iterable[Module]) -> None:
    refuse_mamba(arch, (module,))
    stated = {"lora_dropout": config.lora_dropout, "lora_bias": config.lora_bias, "use_dora": config.use_dora}
    if refused := [f"{name} {value}" for name, value in stated.items() if value]:
        raise RefusedError(
            f"target_parameters: peft's ParamWrapper, which adapts {module.name}, does not support {' and '.join(refused)}"
        )
    for other in matched:
        if module.name == other.name and (module.layers is None or set(module.layers) & set(other.layers or ())):
            raise RefusedError(
                f"target_parameters: {module.name} is also targeted by target_modules; peft accepts only one of the two"
            )
        if other.kind == "Conv1D":
            raise RefusedError("target_parameters: peft refuses them together with Conv1D target_modules (fan_in_fan_out)")


def _tensors(module: Module, param: str, shape: Shape, *, r: int, depth: int, freeze_a: bool) -> list[AddedTensor]:
    experts, n_in, n_out = _expert_shape(module, param, shape)
    prefix = module.name + ".base_layer" * depth
    return [
        AddedTensor(f"{prefix}.lora_A.weight", (r * experts, n_in), module.layers, not freeze_a),
        AddedTensor(f"{prefix}.lora_B.weight", (n_out, r * experts), module.layers),
    ]


def _expert_shape(module: Module, param: str, shape: Shape) -> tuple[int, int, int]:
    """(experts, in, out) of a 2-D weight (out, in) or of 3-D experts, stored (E, out, in) or, transposed, (E, in, out)."""
    if len(shape) == 2:
        return 1, shape[1], shape[0]
    if len(shape) != 3:
        raise RefusedError(f"target_parameters: {module.name}.{param} has {len(shape)} dimensions; peft supports 2 and 3")
    experts, first, second = shape
    return (experts, first, second) if module.kind in ("ExpertsTransposed", "ExpertsApart") else (experts, second, first)

"""Modules of an adapter that are units each, inside the root: under FSDP2, since LLaMA-Factory v1 finds no layers of a PeftModel;
under FSDP1 inside a layer's unit, if that is one (peft, utils/other.py, `fsdp_auto_wrap_policy`).

Source: llamafactory 0.9.5, v1/plugins/trainer_plugins/distributed/fsdp2.py (`prepare_model`, `get_transformer_layer_cls`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from peftplan.distributed.fsdp2 import Fsdp2
from peftplan.memory.model import Model
from peftplan.parameters import Parameter
from peftplan.tape.tape import X, Y
from peftplan.tape.tensors import Parameter as TapeParameter
from peftplan.tape.tensors import Tensor

IN_LAYER = " in layer "


def leaf(module: str, layer: int | None) -> str:
    """The name of the unit of a module."""
    return f"{module}{IN_LAYER}{layer}"


def is_leaf(unit: str) -> bool:
    """Whether a unit is a module of an adapter."""
    return IN_LAYER in unit


def leaves_of(p: Parameter, layers: Iterable[int] | None = None) -> list[str]:
    """The units of a parameter of an adapter, one a layer. `layers`: in these alone."""
    within = [layer for layer in sorted(p.layers or ()) if layers is None or layer in layers]
    return [leaf(p.name.rpartition(".")[0], layer) for layer in within or ((None,) if layers is None else ())]


def parameters_of(model: Model, unit: str, names: Iterable[str]) -> list[TapeParameter]:
    """The parameters of such a unit that the tape has used."""
    number = unit.rpartition(IN_LAYER)[2]
    used = (model.used_in(name, int(number) if number.isdigit() else None) for name in names)
    return [p for p in used if p is not None]


class LeafUnits:
    """Calls modules between the hooks of their units (`tape.autograd.Modules`)."""

    def __init__(self, units: Fsdp2) -> None:
        self.units = units

    def call(
        self,
        name: str,
        layer: int | None,
        parameters: tuple[TapeParameter, ...],
        x: X,
        function: Callable[[X], Y],
        *,
        by_name: bool,
        reads: tuple[TapeParameter, ...] = (),
    ) -> Y:
        """Call `function`, which is the module `name` of a layer, on `x`."""
        unit = leaf(name, layer)
        if unit not in self.units.by_name:
            return function(x)
        out = function(cast("X", self.units.enter_with(unit, cast("Tensor", x))))
        return cast("Y", self.units.leave(unit, cast("Tensor", out)))

    def read(self, name: str, layer: int | None, parameter: TapeParameter) -> bool:
        """Nothing is gathered for a dtype: it is that of the shard, unless forward has gathered this module ahead."""
        unit = self.units.by_name.get(leaf(parameter.name.rpartition(".")[0], layer))
        return unit is not None and bool(unit.unsharded)

    def whole(self, parameter: TapeParameter) -> Tensor | None:
        """None: a view does not keep what is resized to nothing."""
        return None

"""LoRA on parameters (`target_parameters`): the whole weight with its update is made anew in each forward.

e experts, r rank of each, A (r·e, in), B (out, r·e). Source: peft, tuners/lora/layer.py (`ParamWrapper`,
`_LoraFactorsProxy`, `_LoraParameterProxy`); torch, nn/utils/parametrize.py: registering a parametrization computes it once
for its checks, the first access again for the cache, which ends with the outermost wrapper's forward.
"""

from __future__ import annotations

from math import sqrt
from typing import TypeAlias

from peftplan.errors import NeedsTraceError, NoEngineError
from peftplan.ledger import Dim
from peftplan.memory.model import Model
from peftplan.memory.parts import Part
from peftplan.memory.quantized import dequantized
from peftplan.methods.lora import LoraConfig
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Parameter, Tensor

PEFT_ALPHA = 8
"""The default of `LoraConfig.lora_alpha`."""
STACKED_DIMS = 3


class Stacked:
    """The parameters of a layer's fused experts, adapted ones with their update; it lives as long as the wrappers' forward."""

    def __init__(self, model: Model, name: str, layer: int, *, transposed: bool) -> None:
        self.tape = model.tape
        self.part = model.part(name, layer)
        self.params: dict[str, Parameter] = dict(self.part.params)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._weights: dict[str, Tensor] = {}
        self._scales = False
        while model.has(f"{name}.lora_A", layer):
            self._scales = scaling(model) != 1
            a, b = (_weight(model, f"{name}.lora_{side}", layer) for side in "AB")
            self._wrap(a, b, transposed=transposed)
            name = f"{name}.base_layer"

    def _wrap(self, a: Parameter, b: Parameter, *, transposed: bool) -> None:
        """`_activate_lora`: the factors in the weight's dtype, and the weight made once for the checks."""
        sides = (a.dims[1], b.dims[0])
        matching = [name for name, w in self.params.items() if len(w.dims) == STACKED_DIMS and _sides(w, transposed) == sides]
        if len(matching) != 1:
            raise NeedsTraceError("LoRA on a parameter that is not a stack of experts")
        if self.part.quant is not None:
            raise NoEngineError("LoRA on a stack of experts that bitsandbytes stores")
        weight = self.params[matching[0]]
        self._factors[matching[0]] = factors(self.tape, weight, a, b, transposed=transposed)
        del weight
        self._folded(matching[0])

    def _folded(self, name: str) -> Tensor:
        return folded(self.tape, self.params[name], *self._factors[name], scales=self._scales)

    def __contains__(self, name: str) -> bool:
        return name in self.params

    def dims(self, name: str) -> Dims:
        """The dims of a parameter."""
        dims: Dims = self.params[name].dims
        return dims

    def __getitem__(self, name: str) -> Operand:
        """A parameter as the forward reads it; one that is made stays cached until the experts' forward ends."""
        stored = self.part.quant is not None and len(self.params[name].dims) == STACKED_DIMS
        if not stored and name not in self._factors:
            return self.params[name]
        if name not in self._weights:
            self._weights[name] = self._restored(name) if stored else self._folded(name)
        return self._weights[name]

    def _restored(self, name: str) -> Tensor:
        """`Bnb4bitParametrization`, `Bnb8bitParametrization`: all experts in the dtype that they were loaded in, or fp32."""
        return dequantized(self.tape, Part(self.part.name, self.part.kind, {"weight": self.params[name]}, self.part.quant))


def _weight(model: Model, name: str, layer: int) -> Parameter:
    weight = model.part(name, layer).weight
    assert weight is not None
    return weight


def _sides(weight: Parameter, transposed: bool) -> tuple[Dim, Dim]:
    """(in, out) of a stack of experts."""
    _, first, second = weight.dims
    return (first, second) if transposed else (second, first)


def scaling(model: Model) -> float:
    """What the update is multiplied by; peft doubles alpha with the rank of fused projections."""
    config = model.running.config_as(LoraConfig)
    alpha = PEFT_ALPHA if config.lora_alpha is None else config.lora_alpha
    return float(alpha / (sqrt(config.r) if config.use_rslora else config.r))


def factors(f: Tape, weight: Parameter, a: Parameter, b: Parameter, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """`get_delta_factors`: A and B by expert, in the weight's dtype: B's as a permuted view, whose gradient is copied back."""
    e = weight.dims[0]
    assert isinstance(e, int)
    rows = a.dims[0]
    assert isinstance(rows, int)
    rank = rows // e
    by_a: Dims = (e, a.dims[1], rank) if transposed else (e, rank, a.dims[1])
    by_b: Dims = (e, rank, b.dims[0]) if transposed else (e, b.dims[0], rank)
    from_a = Tensor(None, by_a, a.dtype, f.record(_permuted_backward if transposed else _reshaped_backward, (a,), a.dims))
    from_b = Tensor(None, by_b, b.dtype, f.record(_permuted_backward, (b,), b.dims))
    left, right = (from_a, from_b) if transposed else (from_b, from_a)
    first = f.to(left, weight.dtype)
    return first, f.to(right, weight.dtype)


def _reshaped_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return Tensor(g.storage, saved[0], g.dtype)


def _permuted_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "clone")


Folded: TypeAlias = tuple[Tensor | None, Tensor | None, Dims, Dims, bool]
"""What a folded update saves: both factors, their dims, and whether it is scaled."""


def folded(f: Tape, weight: Parameter, left: Tensor, right: Tensor, *, scales: bool) -> Tensor:
    """`baddbmm(W, lhs, rhs, alpha)`: keeps each factor whose partner has a gradient; autocast is off."""
    saved = (left if right.node and left.storage else None, right if left.node and right.storage else None)
    node = f.record(_folded_backward, (left, right), *saved, left.dims, right.dims, scales)
    return f.new(weight.dims, weight.dtype, "baddbmm", node)


def _folded_backward(f: Tape, node: Node, saved: Folded, g: Tensor) -> Gradients:
    *_, left, right, scales = saved
    return tuple(
        _factor_gradient(f, dims, g, scales) if edge else None for dims, edge in zip((left, right), node.edges, strict=True)
    )


def _factor_gradient(f: Tape, dims: Dims, g: Tensor, scales: bool) -> Tensor:
    product = f.new(dims, g.dtype, "bmm")
    return f.new(dims, g.dtype, "mul") if scales else product


def matrix(model: Model, name: str, layer: int) -> tuple[Operand, Tensor | None]:
    """A weight of two dims with its update, `W + (B @ A) * scaling`, and the update, which the wrapper's forward holds."""
    delta = update(model, name, layer)
    return updated(model, name, layer, delta), delta


def update(model: Model, name: str, layer: int) -> Tensor | None:
    """The update of a weight of two dims, made once for the checks, before the module's own forward."""
    if not model.has(f"{name}.lora_A", layer):
        return None
    f, weight = model.tape, _weight(model, name, layer)
    a, b = (_weight(model, f"{name}.lora_{side}", layer) for side in "AB")
    delta: Tensor = f.to(ops.scale(f, _product(f, a, b)), weight.dtype)
    checked = _sum(f, weight, delta)
    del checked
    return delta


def updated(model: Model, name: str, layer: int, delta: Tensor | None) -> Operand:
    """The weight as the forward reads it."""
    weight = _weight(model, name, layer)
    return weight if delta is None else _sum(model.tape, weight, delta)


def _product(f: Tape, a: Parameter, b: Parameter) -> Tensor:
    """`B @ A`."""
    left, right = f.cast_all(f.autocast, b, a) if f.autocast else (b, a)
    saved = (None if type(left) is Parameter else left, None if type(right) is Parameter else right)
    node = f.record(_product_backward, (left, right), *saved, left.dims, right.dims)
    return f.new((left.dims[0], right.dims[1]), left.dtype, "mm", node)


def _product_backward(f: Tape, node: Node, saved: tuple[Operand | None, Operand | None, Dims, Dims], g: Tensor) -> Gradients:
    to_a = f.new(saved[3], g.dtype, "mm") if node.edges[1] else None
    return f.new(saved[2], g.dtype, "mm") if node.edges[0] else None, to_a


def _sum(f: Tape, weight: Parameter, delta: Tensor) -> Tensor:
    return f.new(weight.dims, weight.dtype, "add", f.record(_sum_backward, (delta,)))


def _sum_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g

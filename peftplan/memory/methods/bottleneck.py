"""Bottleneck adapters behind a part of a layer, as the trace puts them into the model (`trace.reference.Bottleneck`)."""

from __future__ import annotations

from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.tensors import Tensor


def bottleneck(model: Model, name: str, x: Tensor, layer: int) -> Tensor:
    """`x + up(relu(down(x)))`, inside in the adapter's dtype."""
    f = model.tape
    weight = model.part(f"{name}.adapter_up", layer).weight
    assert weight is not None
    f.module = name
    wide = f.to(x, weight.dtype)  # an argument of `adapter_down`, until its last module is done
    inner = model.linear(f"{name}.adapter_down.0", wide, layer)
    f.module = f"{name}.adapter_down.1"
    inner = ops.keeps_output(f, inner, "relu")
    del wide
    inner = model.linear(f"{name}.adapter_up", inner, layer)
    f.module = name
    return ops.add(f, x, f.to(inner, x.dtype))

"""IA3 (peft, tuners/ia3/layer.py, bnb.py): a vector scales the output, or a feed-forward module's input."""

from __future__ import annotations

from collections.abc import Callable

from peftplan.memory.parts import Part, Running
from peftplan.storage.config import FOUR_BIT
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor


def ia3(f: Tape, part: Part, x: Tensor, base: Callable[[Tensor], Tensor], running: Running) -> Tensor:
    """`base((x * l))` or `base(x) * l`, computed in the vector's dtype; the result of a 4-bit base is cloned."""
    vector = part.params["ia3_l"]
    feedforward = vector.dims[0] == 1
    f.module = part.name
    factor = ops.scale(f, vector).view((vector.dims[1 if feedforward else 0],))
    dtype = x.dtype
    if part.quant is not None:
        converts = f.autocast is None and x.dtype != "fp32"
        x = f.to(x, "fp32") if converts else x
        result = base(ops.mul(f, x, factor)) if feedforward else base(x)
        expected = result.dtype
        result = result if feedforward else ops.mul(f, result, factor)
        if part.quant.name in FOUR_BIT:
            result = ops.copied(f, result, "clone", viewed=False)
        return f.to(result, expected) if converts else result
    if feedforward:
        x = f.to(x, vector.dtype)
        inner = f.to(ops.mul(f, x, factor), dtype)
        return base(inner)
    result = base(x)
    dtype = result.dtype
    return f.to(ops.mul(f, result, factor), dtype)

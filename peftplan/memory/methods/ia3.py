"""IA3 (peft 0.21.2, tuners/ia3/layer.py `Linear.forward`): a vector scales the output, or the input of feed-forward modules."""

from __future__ import annotations

from collections.abc import Callable

from peftplan.memory import ops
from peftplan.memory.model import Part, Running
from peftplan.memory.tape import Tape, Tensor


def ia3(f: Tape, part: Part, x: Tensor, base: Callable[[Tensor], Tensor], running: Running) -> Tensor:
    """Feed-forward: the base on `x * ia3_l` in x's dtype; else `base(x) * ia3_l`, back in the base's dtype."""
    vector = part.params["ia3_l"]
    if vector.dims[0] == 1:
        given = x.dtype
        return base(f.to(ops.mul(f, x, vector), given))
    result = base(x)
    given = result.dtype
    return f.to(ops.mul(f, result, vector), given)  # type: ignore[no-any-return]

"""LoRA of experts that NeMo Automodel's ranks divide.

Source: nemo_automodel 0.7.0, components/_peft/lora_experts.py (`GroupedExpertsDeepEPLoRA`), whose activation multiplies by the
weights of routing, also where experts without adapters multiply what they give.
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.memory.fused_attention import number
from peftplan.memory.models.style import Call
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Parameter, Tensor

Factors = tuple[Parameter, Parameter, int]
"""A, B and their rank."""


def adapters(c: Call, name: str, owned: int) -> tuple[Factors, Factors] | None:
    """LoRA of both products (`GroupedExpertsDeepEPLoRA`): A is (r·e, in) here and B (out, r·e). The last parameter has the outer
    wrapper."""
    parts = [
        c.model.part(f"{wrapped}.lora_{side}", c.number)
        for wrapped in (f"{name}.base_layer", name)
        for side in "AB"
        if c.model.has(f"{wrapped}.lora_{side}", c.number)
    ]
    if not parts:
        return None
    up_a, up_b, down_a, down_b = (part.params["weight"] for part in parts)
    return (up_a, up_b, number(up_a.dims[0]) // owned), (down_a, down_b, number(down_a.dims[0]) // owned)


def adapted(f: Tape, product: Callable[..., Tensor], x: Tensor, out: Tensor, factors: Factors) -> tuple[Tensor, ...]:
    """The product with what the adapter adds, and what names hold until the experts return."""
    a, b, rank = factors
    more = -rank % ALIGNED
    of_a, of_b = (padded(f, a, 0, rank, more), padded(f, b, -1, rank, more)) if more else (a, b)
    low = product(x, of_a, rank + more)
    wide = product(low, of_b, out.dims[-1])
    return ops.add(f, out, ops.scale(f, wide)), low, wide, *((of_a, of_b) if more else ())


ALIGNED = 8
"""Numbers in 16 bits that 16 bytes hold, of which grouped products need a multiple (`_pad_lora_rank_for_grouped_mm`)."""


def padded(f: Tape, x: Parameter, dim: int, rank: int, more: int) -> Tensor:
    """`F.pad` of the rank, which one dim of all experts has."""
    dims = list(x.dims)
    dims[dim] = number(dims[dim]) // rank * (rank + more)
    return f.new(tuple(dims), x.dtype, "pad", f.record(_padded_backward, (x,), x.dims))


def _padded_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "pad")

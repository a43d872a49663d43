"""NeMo Automodel's gate without weights, by which tokens take experts in turn: the first k experts, the next k, and so on.

Source: nemo_automodel 0.7.0, components/moe/layers.py (`FakeBalancedGate.forward`).
"""

from __future__ import annotations

from peftplan.memory.models.style import Call
from peftplan.tape.tensors import Dims, Tensor


def gate_in_turn(c: Call, x: Tensor, name: str = "mlp") -> tuple[Tensor, Tensor]:
    """The same weight for each expert of a token, and its experts; neither has a gradient."""
    f = c.at(f"{name}.gate")
    dims: Dims = (*x.dims[:-1], c.block.mlp.num_experts_per_tok)
    ones = f.new(dims, "fp32", "ones")
    weights = f.new(dims, "fp32", "div")
    del ones
    numbers = f.new(dims, "int64", "arange")
    turns = f.new(dims, "int64", "remainder")
    del numbers
    indices = f.new(dims, "int64", "add")
    del turns
    return f.to(weights, x.dtype), indices

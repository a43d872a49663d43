"""Phi-3's MLP whose matrices ranks share beside FSDP2, as NeMo Automodel divides it: its tensors are DTensors.

Letters: b sequences of s tokens, h hidden size, i intermediate size, W ranks. The rank has (2 i / W, h) and (h, i / W).

    forward     gate and up of all ranks, side by side; they are views of them, and a DTensor's view refers to what was gathered
                of it. Their product is whole, and `down_proj` multiplies the rank's part of it, but saves all of it.
    backward    the gradient of `down_proj` is whole, that of its input the rank's part, and so are those before it: each
                operation copies the part of what it saved. Those of gate and up are gathered, joined, and divided.

Source: nemo_automodel 0.7.0, components/distributed/optimized_tp_plans.py (`_parallelize_phi3`); transformers,
models/phi3/modeling_phi3.py (`Phi3MLP`); torch, distributed/tensor/placement_types.py (`Shard._to_replicate_tensor`,
`_select_split_tensor`), _dispatch.py (`redistribute_local_args`).
"""

from __future__ import annotations

from peftplan.memory.rank_parts import gather, gathered
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Parameter, Tensor


def gated(f: Tape, x: Tensor, width: int) -> Tensor:
    """`up * silu(gate)`, all of it; x is the rank's part of both, which are `width` wide together."""
    *rows, of_rank = x.dims
    assert isinstance(of_rank, int)
    ranks = width // of_rank
    joined = gathered(f, x, ranks)
    assert joined.storage is not None
    joined.storage.base = x.storage
    half, part = (*rows, width // 2), (*rows, width // 2 // ranks)
    node = f.record(_halves_backward, (joined,), joined.dims, ranks)
    gate, up = (Tensor(joined.storage, half, x.dtype, node, place) for place in range(2))
    node = f.record(_silu_backward, (gate,), gate.detach(), part)
    activated = f.new(half, x.dtype, "silu", node)
    node = f.record(_mul_backward, (up, activated), up.detach(), activated.detach(), part)
    return f.new(half, x.dtype, "mul", node)


def _halves_backward(f: Tape, node: Node, saved: tuple[Dims, int], *grads: Tensor) -> Tensor:
    whole = [gather(f, g, saved[1]) for g in grads]
    joined = f.new(saved[0], whole[0].dtype, "cat")
    del whole
    return joined


def _silu_backward(f: Tape, node: Node, saved: tuple[Tensor, Dims], g: Tensor) -> Tensor:
    return _by_part(f, saved[1], g.dtype)


def _mul_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor, Dims], g: Tensor) -> Gradients:
    of_activated = _by_part(f, saved[2], g.dtype)
    return _by_part(f, saved[2], g.dtype), of_activated


def _by_part(f: Tape, part: Dims, dtype: str) -> Tensor:
    """A gradient of the rank's part, beside a copy of that part of a factor."""
    _factor = f.new(part, dtype, "part of a factor")
    return f.new(part, dtype, "mul")


def down(f: Tape, x: Tensor, weight: Parameter, product: Tensor) -> Tensor:
    """What `down_proj` gives for the rank's part of x, `product`, whose node saves x."""
    node = f.record(_down_backward, (x, weight), x.detach(), (*x.dims[:-1], weight.dims[1]), (weight.dims[0], x.dims[-1]))
    return Tensor(product.storage, product.dims, product.dtype, node)


def _down_backward(f: Tape, node: Node, saved: tuple[object, Dims, Dims], g: Tensor) -> Gradients:
    _, part, whole = saved
    grad_weight = f.view_of(f.new(whole, g.dtype, "mm"))
    grad_x = f.view_of(f.new(part, g.dtype, "mm"))
    return grad_x, grad_weight

"""Fused kernels of layers, each an autograd function: RMSNorm, rotary embedding, and the product behind a gate.

Letters: b batch, s sequence, h hidden size, i intermediate size, d head size. What a package does differently are facts of
`job.kernels`; the sources stand there. Triton's launches allocate nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftplan.job.kernel_facts import Gated, Norm, Rotary
from peftplan.memory.fused_attention import number
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor


def rms_norm(f: Tape, kernel: Norm, x: Tensor, weight: Operand, *, dtype: str | None = None) -> Tensor:
    """`Y = X / rms(X) * W` in the dtype of x unless given: saves x, W and an fp32 number per row."""
    node = f.record(_rms_norm_backward, (x, weight), kernel)
    node = _in_python(node) if kernel.in_python else node
    out = f.new(x.dims, dtype or x.dtype, "rms_norm", node)
    f.keep(node, x.detach(), f.new(x.dims[:-1], "fp32", "rstd"), weight)
    return out


def _rms_norm_backward(f: Tape, node: Node, saved: tuple[Norm, Tensor, Tensor, Operand], g: Tensor) -> Gradients:
    kernel, x, _, weight = saved
    out = Tensor(g.storage, x.dims, g.dtype) if kernel.reuses_gradient else f.new(x.dims, x.dtype, "dX")
    if kernel.in_python:
        f.view_of(out)  # `dX.view(*shape)`
    if not node.edges[1]:
        return out, None
    if not kernel.partial_rows:
        return out, f.new(weight.dims, weight.dtype, "dW")
    rows = kernel.rows_of(number(weight.dims[-1]))
    partial = f.new((rows * f.card.number, *weight.dims), "fp32", "dW of each program")
    total = f.new(weight.dims, "fp32", "sum")
    grad_weight = f.to(total, weight.dtype)
    del partial, total
    return out, grad_weight


def rotate(f: Tape, kernel: Rotary, q: Tensor, k: Tensor, *, in_place: bool = True) -> tuple[Tensor, Tensor]:
    """Queries and keys turned where they lie, (b, heads, s, d) views of (b, s, heads, d), or into new tensors: saves neither."""
    node = _in_python(f.record(_rotate_backward, (q, k), kernel, q.dims, k.dims))
    if in_place:
        return Tensor(q.storage, q.dims, q.dtype, node), Tensor(k.storage, k.dims, k.dtype, node, 1)
    outs = f.new(q.dims, q.dtype, "rope", node), f.new(k.dims, k.dtype, "rope", node)
    outs[1].index = 1
    return outs


def _rotate_backward(f: Tape, node: Node, saved: tuple[Rotary, Dims, Dims], dq: Tensor, dk: Tensor) -> Gradients:
    kernel, q_dims, k_dims = saved
    if kernel.backward_in_place:
        return Tensor(dq.storage, q_dims, dq.dtype), Tensor(dk.storage, k_dims, dk.dtype)
    return f.new(q_dims, dq.dtype, "dQ"), f.new(k_dims, dk.dtype, "dK")


def norm_and_rotate(f: Tape, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys normed by head and turned, into new tensors: saves both, and an fp32 number per head."""
    node = _in_python(f.record(_norm_and_rotate_backward, (q, k)))
    outs = f.new(q.dims, q.dtype, "norm_rope", node), f.new(k.dims, k.dtype, "norm_rope", node)
    outs[1].index = 1
    f.keep(node, q.detach(), k.detach(), *(f.new(x.dims[:-1], "fp32", "rstd") for x in outs))
    return outs


def _norm_and_rotate_backward(f: Tape, node: Node, saved: Sequence[Tensor], dq: Tensor, dk: Tensor) -> Gradients:
    return f.new(saved[0].dims, dq.dtype, "dQ"), f.new(saved[1].dims, dk.dtype, "dK")


def norm_and_turn(f: Tape, kernel: Rotary, x: Tensor, weight: Operand) -> Tensor:
    """Queries or keys normed by head and turned, into a new tensor: saves them, and an fp32 number per head, which is a result
    too and so gets a gradient of zeros."""
    node = _in_python(f.record(_norm_and_turn_backward, (x, weight), kernel))
    out, rstd = f.new(x.dims, x.dtype, "norm_rope", node), f.new(x.dims[:-1], "fp32", "rstd")
    f.keep(node, x.detach(), rstd, weight)
    return out


def _norm_and_turn_backward(f: Tape, node: Node, saved: tuple[Rotary, Tensor, Tensor, Operand], g: Tensor) -> Gradients:
    kernel, x, rstd, weight = saved
    _zeros = f.new(rstd.dims, "fp32", "zeros")
    out = f.new(x.dims, x.dtype, "dX")
    partial = f.new((kernel.partial_rows * f.card.number, *weight.dims), "fp32", "dW of each program")
    total = f.new(weight.dims, "fp32", "sum")
    del partial
    grad_weight = f.to(total, weight.dtype)
    return out, grad_weight if node.edges[1] else None


def gated(f: Tape, kernel: Gated, gate: Tensor, up: Tensor, *, copies: bool = False) -> Tensor:
    """`act(gate) * up`: saves both; their gradients take their place. `copies`: both are parts of one tensor, and copied."""
    node = _in_python(f.record(_gated_backward, (gate, up)))
    read = [f.new(x.dims, x.dtype, "contiguous") if copies else x.detach() for x in (gate, up)]
    out = f.new(gate.dims, gate.dtype, "mul", node)
    f.keep(node, *read)
    return out


def _gated_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Gradients:
    gate, up = saved
    return gate, up


def _in_python(node: Node | None) -> Node | None:
    """An `autograd.Function`, whose incoming gradients go before the engine casts what it returns."""
    if node is not None:
        node.in_python = True
    return node

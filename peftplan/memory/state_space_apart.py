"""Mamba 2's mixer where its last projection is quantized: causal-conv1d's function, mamba-ssm's scan, and the gated norm.

Letters: b batch, s sequence, n heads. Both functions save their inputs, which are views of the projection and of the
convolution's result; the scan also its own result. Gradients of all weights are made, whichever train. Source: transformers,
models/nemotron_h/modeling_nemotron_h.py (`NemotronHMamba2Mixer.forward`); causal_conv1d, causal_conv1d_interface.py
(`CausalConv1dFn`); mamba-ssm, ops/triton/ssd_combined.py (`MambaChunkScanCombinedFn`). Left out: what Triton's autotuner takes.
"""

from __future__ import annotations

from typing import TypeAlias

from peftplan.arch.blocks import StateSpace
from peftplan.memory.model import Model
from peftplan.memory.state_space import scan, scan_backward
from peftplan.tape import ops
from peftplan.tape.norms import rms_normed
from peftplan.tape.shaping import split
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Operand, Tensor


def mixer(model: Model, name: str, layer: int | None, space: StateSpace, x: Tensor) -> Tensor:
    """The mixer from its projection `x` to what the last projection reads."""
    f, dtype = model.tape, x.dtype
    own, taps, norm = (model.part(part, layer) for part in (name, f"{name}.conv1d", f"{name}.norm"))
    f.module = name
    decay = ops.scale(f, ops.keeps_output(f, f.to(own.params["A_log"], "fp32"), "exp"), "neg")
    b, s, _ = x.dims
    heads, groups = (b, s, space.num_heads, space.head_dim), (b, s, space.groups, space.state_size)
    gate, convolved, steps = split(f, x, ((b, s, space.width), (b, s, space.channels), (b, s, space.num_heads)))
    convolved = _convolved(f, convolved, taps.own_weight, taps.bias)
    rows, inputs, outputs = split(f, convolved, (heads, groups, groups))
    scanned = _scanned(f, space, rows, steps, decay, inputs, outputs, own.params["D"], own.params["dt_bias"])
    scanned = scanned.view((b, s, space.width))
    f.module = f"{name}.norm"
    return _gated(f, space, scanned, gate, norm.own_weight, dtype)


def _gated(f: Tape, space: StateSpace, x: Tensor, gate: Tensor, weight: Operand, dtype: str) -> Tensor:
    """`Zamba2RMSNormGated.forward`, whose names hold its steps until it returns."""
    wide = ops.mul(f, f.to(x, "fp32"), ops.keeps_input(f, f.to(gate, "fp32"), "silu"))
    groups = (*x.dims[:-1], space.groups, space.width // space.groups)
    normed = rms_normed(f, wide.view(groups)).view(x.dims)
    out = ops.mul(f, weight, f.to(normed, x.dtype))
    del wide, normed
    narrow: Tensor = f.to(out, dtype)
    return narrow


def _convolved(f: Tape, x: Tensor, weight: Operand, bias: Operand | None) -> Tensor:
    """`causal_conv1d_fn` with SiLU."""
    node = f.record(_convolved_backward, (x, weight, bias))
    if node is not None:
        node.in_python = True
    out = f.new(x.dims, x.dtype, "causal_conv1d", node)
    f.keep(node, x.detach(), weight, bias)
    return out


def _convolved_backward(f: Tape, node: Node, saved: tuple[Tensor, Operand, Operand | None], g: Tensor) -> Gradients:
    x, *weights = saved
    grad_x = f.new(x.dims, x.dtype, "dx")
    wide = [None if p is None else f.new(p.dims, "fp32", "zeros") for p in weights]
    return grad_x, *(None if p is None or y is None else f.to(y, p.dtype) for p, y in zip(weights, wide, strict=True))


Saved: TypeAlias = tuple[StateSpace, Tensor, Tensor, Tensor, Tensor, Tensor, Operand, Operand]


def _scanned(
    f: Tape,
    space: StateSpace,
    x: Tensor,
    steps: Tensor,
    decay: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    d: Operand,
    dt_bias: Operand,
) -> Tensor:
    """`MambaChunkScanCombinedFn.forward`, which saves the sums of the decays too."""
    node = f.record(_scanned_backward, (x, steps, decay, inputs, outputs, d, dt_bias))
    if node is not None:
        node.in_python = True
    b, s = x.dims[:2]
    out, _steps, sums, *_states = scan(f, space, b, s, x.dtype)
    result = Tensor(out.storage, x.dims, out.dtype, node)
    f.keep(node, space, out, x.detach(), steps.detach(), sums, decay.detach(), d, dt_bias)
    return result


def _scanned_backward(f: Tape, node: Node, saved: Saved, g: Tensor) -> Gradients:
    space, _, x, steps, _, _, d, dt_bias = saved
    b, s = x.dims[:2]
    of_groups = (b, s, space.groups, space.state_size)
    of_inputs, of_outputs = f.new(of_groups, x.dtype, "dB"), f.new(of_groups, x.dtype, "dC")
    of_steps = f.new(steps.dims, steps.dtype, "ddt")
    (grad_d, grad_bias, grad_decay), grad_x = scan_backward(f, space, (b, s), x.dtype, d, dt_bias, gated=False, apart=True)
    assert grad_x is not None
    return grad_x.view(x.dims), of_steps, grad_decay, of_inputs, of_outputs, grad_d, grad_bias

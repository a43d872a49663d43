"""Mamba 2's mixer as one autograd function of mamba-ssm, around the convolution of causal-conv1d.

Letters: b batch, s sequence, n heads. Forward saves the projection, the result of the scan and what the norm divided by, if there
is one; backward makes the convolution and the states again. Gradients of all weights are made, whichever train. Launches
allocate nothing; left out: what Triton's autotuner takes in the first step. Source: `job.kernels`, ops/triton/ssd_combined.py
(`MambaSplitConv1dScanCombinedFn`, `_mamba_chunk_scan_combined_fwd`, `_mamba_chunk_scan_combined_bwd`) and the files that it
imports; causal_conv1d, cpp_functions.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TypeAlias

from peftplan.arch.blocks import StateSpace
from peftplan.arrays import Derived, Size, larger, numel_at, smaller
from peftplan.ledger import Dim
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

ROWS_OF_D, ROWS_OF_A = 32, 32
"""Tokens of a chunk whose sums are written apart (`BLOCK_SIZE_min`): for the gradient of D, and of the decays."""
OF_STATES = 64
"""Numbers of a state whose sums are written apart (`_state_passing_bwd`, `BLOCK_SIZE_min`)."""
PER_WARP, MOST_WARPS, WARPS_OF_ROWS = 256, 8, 4
"""Channels per warp, warps of a program, and of all programs for a multiprocessor (`_layer_norm_bwd`)."""


class Chunks(Derived):
    """Chunks of a sequence."""

    seq: str
    tokens: int

    def __new__(cls, seq: str, tokens: int) -> Chunks:
        """The size called by what it counts."""
        self = super().__new__(cls, f"{seq}/{tokens}")
        self.seq, self.tokens = seq, tokens
        return self

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]
        """What a copy is made of."""
        return self.seq, self.tokens

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """Their number at these sizes, which may be arrays as well as integers."""
        return -(-sizes[self.seq] // self.tokens)


class Parts(Derived):
    """Parts of a group's heads whose sums programs write apart: as few as keep all multiprocessors busy."""

    batch: tuple[Dim, ...]
    space: StateSpace
    processors: int

    def __new__(cls, batch: tuple[Dim, ...], space: StateSpace, processors: int) -> Parts:
        """The size called by what it counts; `batch`: sequences and their chunks."""
        self = super().__new__(cls, f"parts of {space.num_heads // space.groups} heads")
        self.batch, self.space, self.processors = batch, space, processors
        return self

    def __getnewargs__(self) -> tuple[tuple[Dim, ...], StateSpace, int]:  # type: ignore[override]
        """What a copy is made of."""
        return self.batch, self.space, self.processors

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """Their number at these sizes, which may be arrays as well as integers."""
        of_group = self.space.num_heads // self.space.groups
        each = -(-(numel_at(self.batch, sizes) * self.space.num_heads) // self.processors)
        return -(-of_group // larger(smaller(each, of_group), 1))


def mixer(model: Model, name: str, layer: int | None, space: StateSpace, x: Tensor) -> Tensor:
    """The mixer from its projection `x` to the hidden states."""
    f = model.tape
    own, taps, norm, out_proj = (model.part(part, layer) for part in (name, f"{name}.conv1d", f"{name}.norm", f"{name}.out_proj"))
    gain = norm.weight  # without a norm the gate multiplies inside the scan
    f.module = name
    decay = ops.scale(f, ops.keeps_output(f, f.to(own.params["A_log"], "fp32"), "exp"), "neg")
    weights = (taps.own_weight, taps.bias, own.params["dt_bias"], decay, own.params["D"], gain, out_proj.own_weight)
    node = f.record(_mixer_backward, (x, *weights, out_proj.bias))
    if node is not None:
        node.in_python = True
    b, s, _ = x.dims
    _convolved = f.new((b, s, space.channels), x.dtype, "causal_conv1d")
    gated = None if gain is not None else f.new((b, s, space.width), x.dtype, "gated scan")
    scanned, *_intermediate = scan(f, space, b, s, x.dtype)
    normed = gated or f.new(scanned.dims, x.dtype, "rms_norm")
    del gated
    rstd = None if gain is None else f.new((b, s, space.groups), "fp32", "rstd")
    weight: Operand = out_proj.own_weight
    if f.autocast:
        with f.no_grad():
            normed, weight = f.to(normed, f.autocast), f.to(weight, f.autocast)
    out = f.new((b, s, weight.dims[0]), normed.dtype, "linear", node)
    f.keep(node, space, x.detach(), scanned, rstd, decay.detach(), *weights[:3], *weights[4:6], weight, out_proj.bias)
    return out


def scan(f: Tape, space: StateSpace, b: Dim, s: Dim, dtype: str) -> tuple[Tensor, ...]:
    """`_mamba_chunk_scan_combined_fwd`: its result, and what names hold until the function around it returns: time steps, sums of
    the decays, and states."""
    of_states = (b, Chunks(str(s), space.chunk_size), space.num_heads, space.head_dim * space.state_size)
    decays = _cumulated(f, space, b, s)
    states = f.new(of_states, "fp32", "states")
    passed = f.new(of_states, dtype, "states passed"), f.new((b, *of_states[2:]), "fp32", "final states")
    del states
    _products = f.new(_dims_of_products(space, b, s), "fp32", "CB")
    return f.new((b, s, space.width), dtype, "scan"), *decays, *passed


def _cumulated(f: Tape, space: StateSpace, b: Dim, s: Dim) -> tuple[Tensor, Tensor]:
    """`_chunk_cumsum_fwd`: time steps, and the decays summed up in each chunk."""
    dims = _dims_of_steps(space, b, s)
    return f.new(dims, "fp32", "dt"), f.new(dims, "fp32", "dA_cumsum")


def _dims_of_steps(space: StateSpace, b: Dim, s: Dim) -> Dims:
    """A number for each token of each head, whose last chunk is whole."""
    return (b, space.num_heads, Chunks(str(s), space.chunk_size), space.chunk_size)


def _dims_of_products(space: StateSpace, b: Dim, s: Dim) -> Dims:
    """A number for each pair of tokens of a chunk, by groups."""
    return (b, Chunks(str(s), space.chunk_size), space.groups, space.chunk_size, space.chunk_size)


Maybe: TypeAlias = Operand | None
Saved: TypeAlias = tuple[
    StateSpace, Tensor, Tensor, Tensor | None, Tensor, Operand, Maybe, Operand, Operand, Maybe, Operand, Maybe
]


def _mixer_backward(f: Tape, node: Node, saved: Saved, g: Tensor) -> Gradients:
    space, x, scanned, _, _, taps, bias, dt_bias, d, norm, weight, out_bias = saved
    b, s, _ = x.dims
    of_channels = (b, s, space.channels)
    _again = f.new(scanned.dims, scanned.dtype, "norm again")
    _convolved = f.new(of_channels, x.dtype, "causal_conv1d")
    grad_x = f.new(x.dims, x.dtype, "dzxbcdt")
    _grad_convolved = f.new(of_channels, x.dtype, "dxBC")
    _of_product = f.new(scanned.dims, g.dtype, "linear")
    grad_norm = None
    if norm is not None:
        _grad_scanned = f.new(scanned.dims, scanned.dtype, "dx of the norm")
        parts = f.new((_parts_of_norm(space, f.card.number), space.width), "fp32", "dW of each program")
        total = f.new(norm.dims, "fp32", "sum")
        grad_norm = f.to(total, norm.dtype)
        del parts, total
    (grad_d, grad_bias, grad_decay), *_product = scan_backward(f, space, (b, s), x.dtype, d, dt_bias, gated=norm is None)
    grad_weight = f.view_of(f.new(weight.dims, g.dtype, "einsum"))
    grad_out_bias = None if out_bias is None else f.new(out_bias.dims, g.dtype, "sum")
    wide = [None if p is None else f.new(p.dims, "fp32", "zeros") for p in (taps, bias)]
    of_taps = [None if p is None or y is None else f.to(y, p.dtype) for p, y in zip((taps, bias), wide, strict=True)]
    del wide
    return grad_x, *of_taps, grad_bias, grad_decay, grad_d, grad_norm, grad_weight, grad_out_bias


def _parts_of_norm(space: StateSpace, processors: int) -> int:
    """Rows of sums that make the gradient of the norm's weight."""
    channels = 1 << (space.width // space.groups - 1).bit_length()
    warps = min(max(channels // PER_WARP, 1), MOST_WARPS)
    return ceil(processors * ceil(WARPS_OF_ROWS / warps) / space.groups)


def scan_backward(
    f: Tape, space: StateSpace, rows: Dims, dtype: str, d: Operand, dt_bias: Operand, *, gated: bool, apart: bool = False
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """`_mamba_chunk_scan_combined_bwd`: gradients of D, of the time steps' bias and of the decays; those of the rest lie in
    tensors that it is given. With a gate also its product with the scan, which is made again; `apart`: of the rows it is given
    none, and makes it."""
    b, s = rows
    chunks, n = Chunks(str(s), space.chunk_size), space.num_heads
    of_steps, of_products = _dims_of_steps(space, b, s), _dims_of_products(space, b, s)
    of_states = (b, chunks, n, space.head_dim * space.state_size)
    parts = Parts((b, chunks), space, f.card.number)
    _dt_in = f.new((b, s, n), dtype, "clone")
    _steps = _cumulated(f, space, b, s)
    _products = f.new(of_products, "fp32", "CB")
    states = f.new(of_states, "fp32", "states")
    passed, _final = f.new(of_states, "fp32", "states passed"), f.new((b, *of_states[2:]), "fp32", "final states")
    del states
    by_rows = (ceil(space.chunk_size / ROWS_OF_D), b, chunks, n, 1)
    product = None
    if gated:
        parts_of_d = f.new(by_rows, "fp32", "dD")
        product, _grad_scanned = (f.new((b, s, space.width), dtype, name) for name in ("outz", "dout_x"))
        _grad_d = f.to(f.new(d.dims, "fp32", "sum"), d.dtype)
        del parts_of_d
    grad_states = f.new(of_states, "fp32", "dstates")
    _narrow = f.new(of_states, dtype, "dstates"), None if dtype == "fp32" else f.new(of_states, dtype, "states")
    by_block = f.new((b, n, chunks, ceil(space.head_dim * space.state_size / OF_STATES)), "fp32", "ddA_chunk_cumsum")
    _of_chunks = f.new((b, n, chunks), "fp32", "sum")
    del by_block, grad_states
    if dtype != "fp32":
        del passed
    parts_of_d = f.new(by_rows, "fp32", "dD")
    product = f.new((b, s, space.width), dtype, "dx") if apart else product
    _of_steps = f.new(of_steps, "fp32", "ddt")
    grad_d = f.to(f.new(d.dims, "fp32", "sum"), d.dtype)
    del parts_of_d
    _next = f.new(of_steps, "fp32", "ddA_cumsum")
    _of_inputs = _summed(f, (b, s, parts, space.groups, space.state_size), (b, s, space.groups, space.state_size), "dB")
    _before = f.new(of_steps, "fp32", "ddA_cumsum_prev")
    _of_outputs = _summed(f, (b, s, parts, space.groups, space.state_size), (b, s, space.groups, space.state_size), "dC")
    _of_products = _summed(f, (b, chunks, parts, *of_products[2:]), of_products, "dCB")
    flipped = f.new(of_steps, "fp32", "flip")
    cumulated = f.new(of_steps, "fp32", "cumsum")
    del flipped
    _previous = f.new(of_steps, "fp32", "flip")
    del cumulated
    by_tile = (*of_steps[:-1], ceil(space.chunk_size / ROWS_OF_A), space.chunk_size)
    _of_decays = _summed(f, by_tile, of_steps, "ddA_cumsum")
    both = f.new(of_steps, "fp32", "add")
    del both
    return (grad_d, f.new(dt_bias.dims, "fp32", "ddt_bias"), f.new((n,), "fp32", "dA")), product


def _summed(f: Tape, dims: Dims, result: Dims, name: str) -> Tensor:
    """Sums that programs wrote apart, and their sum."""
    apart = f.new(dims, "fp32", name)
    total = f.new(result, "fp32", "sum")
    del apart
    return total

"""Experts of gpt-oss as NeMo Automodel runs them over many rows behind an exchange: chunk by chunk, each a checkpoint.

Letters: rows sorted by expert have dims (b, s, k, …), h hidden size, i width of an expert, c rows of a chunk. Source:
nemo_automodel 0.7.0, components/moe/experts.py (`_checkpointed_chunked_expert_mlp`); torch, csrc/autograd/functions/tensor.cpp
(`CopySlices`).
"""

from __future__ import annotations

from collections.abc import Mapping

from peftplan.memory.fused_attention import number
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

CHUNK = 4096
"""Rows of a chunk, of experts or of their biases alone (`_BIAS_CHUNK_ROWS`)."""


def in_chunks(f: Tape, params: Mapping[str, Operand], x: Tensor, weights: Tensor) -> Tensor:
    """What experts give for their rows: keeps these and their weights."""
    up, down = params["gate_up_proj"], params["down_proj"]
    trained = (up, params["gate_up_proj_bias"], down, params["down_proj_bias"])
    node = f.record(_in_chunks_backward, (x, *trained, weights), x.detach(), weights.detach(), [p.dims for p in trained])
    out = f.new(x.dims, x.dtype, "empty", node)
    _chunk(f, x.dtype, number(x.dims[-1]), number(down.dims[1]))
    return out


def _chunk(f: Tape, dtype: str, h: int, i: int) -> tuple[Tensor, ...]:
    """One chunk, with what backward needs of it: gate and up, what the second product reads, and biases of rows in fp32."""
    product = f.new((CHUNK, 2 * i), dtype, "grouped_mm of a chunk")
    rows, wide = (f.new((CHUNK, 2 * i), "fp32", name) for name in ("biases of a chunk", "add"))
    gate_up = f.new((CHUNK, 2 * i), dtype, "to")
    del product, rows, wide
    activated = f.new((CHUNK, i), dtype, "quick_geglu of a chunk")
    product = f.new((CHUNK, h), dtype, "grouped_mm of a chunk")
    rows, weighted, wide = (f.new((CHUNK, h), "fp32", name) for name in ("biases of a chunk", "mul", "add"))
    out = f.new((CHUNK, h), dtype, "to")
    del product, weighted, wide
    return gate_up, activated, rows, out


def _in_chunks_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor, list[Dims]], g: Tensor) -> Gradients:
    """Each chunk gets a copy of all gradients of the results, and makes one of all rows, of zeros beside its own."""
    x, weights, dims = saved
    copied = f.new(g.dims, g.dtype, "copied slices")
    to_x, to_weights = f.new(x.dims, g.dtype, "slice"), f.new(weights.dims, "fp32", "slice")
    trained = [f.new(d, g.dtype if len(d) == 3 else "fp32", "sum of chunks") for d in dims]
    del copied
    kept = _chunk(f, g.dtype, number(x.dims[-1]), number(dims[2][1]))
    again = f.new(dims[0], g.dtype, "grouped_mm")
    del kept, again
    zeros = f.new(x.dims, g.dtype, "slice of a chunk")
    del zeros
    return to_x, *trained, to_weights

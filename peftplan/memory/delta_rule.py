"""The gated delta rule of Qwen 3.5 in torch's operations: products within chunks of the sequence, and a loop over the chunks.

Letters: b batch, n heads of values, N chunks of L tokens, k and v numbers of a head. All of it is fp32, but for products under
autocast. Two triangular systems are solved; their results lie column by column, as gradients of what they solve do, which a
reshape copies. The states of all chunks stay for backward. Source: transformers, models/qwen3_5/modeling_qwen3_5.py
(`torch_chunk_gated_delta_rule`, `l2norm`); torch, aten/src/ATen/native/LinearAlgebra.cpp (`linalg_solve_triangular`),
FunctionsManual.cpp (`linalg_solve_triangular_backward`), CopySlices (csrc/autograd/functions/tensor.cpp).
"""

from __future__ import annotations

from peftplan.arch.blocks import DeltaRule
from peftplan.tape import ops, products
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor

CHUNK = 64
"""Tokens of a chunk."""
MOST_CHUNKS = 2**11
"""Chunks that are written one by one: of rows of 131,072 tokens."""


def chunked(f: Tape, rule: DeltaRule, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, chunks: int) -> Tensor:
    """`torch_chunk_gated_delta_rule` without a state before the row, or one asked for behind it.

    q and k are (b, s, heads of keys, k), v (b, s, n, v), `decay` and `beta` (b, s, n); so is the result like v.
    """
    b, s, n, dtype = v.dims[0], v.dims[1], rule.value_heads, v.dtype
    padded, number = f"{s}%{CHUNK}", f"{s}/{CHUNK}"
    of_keys, of_values, of_tokens = ((b, n, padded, *d) for d in ((rule.key_dim,), (rule.value_dim,), ()))
    by_keys, by_values, by_tokens, of_pairs = (
        (b, n, number, CHUNK, *d) for d in ((rule.key_dim,), (rule.value_dim,), (), (CHUNK,))
    )
    if q.dims[2] != n:
        q = repeated(f, q, (b, s, n, rule.key_dim))
        k = repeated(f, k, (b, s, n, rule.key_dim))
    views = rule.key_heads == rule.value_heads
    q, k, v, beta = [_by_head(f, q, views), _by_head(f, k, views), _by_head(f, v, True), f.to(beta, "fp32")]
    q = _normed(f, q)
    k = _normed(f, k)
    q = ops.scale(f, q)
    q, k, v = [_padded(f, x, dims) for x, dims in ((q, of_keys), (k, of_keys), (v, of_values))]
    beta, decay = [_padded(f, x, of_tokens) for x in (beta, decay)]
    v_beta, k_beta = _by_row(f, v, beta), _by_row(f, k, beta)
    q, k = ops.reshaped(f, q, by_keys), ops.reshaped(f, k, by_keys)
    k_beta, v_beta = _in_chunks(f, k_beta, by_keys), _in_chunks(f, v_beta, by_values)
    mask = f.new((CHUNK, CHUNK), "bool", "ones")
    mask = f.new(mask.dims, "bool", "triu")
    sums = _cumulated(f, decay, by_tokens)
    pairs = _differences(f, sums, of_pairs)
    pairs = f.new(of_pairs, "fp32", "masked_fill", f.record(_masked_backward, (pairs,), mask))
    pairs = ops.keeps_output(f, pairs, "exp")
    system = ops.mul(f, products.matmul(f, k_beta, k, of_pairs, transposed=True), pairs)
    within = ops.mul(f, products.matmul(f, q, k, of_pairs, transposed=True), pairs)
    decayed = _by_row(f, k_beta, ops.keeps_output(f, sums, "exp"))
    new_values = _solved(f, system, v_beta)
    decayed_keys = _solved(f, system, decayed)
    state = f.new((b, n, rule.key_dim, rule.value_dim), "fp32", "zeros")
    out = f.new(by_values, "fp32", "zeros_like")
    q = _by_row(f, q, ops.keeps_output(f, sums, "exp"))
    to_end = f.new(by_tokens, "fp32", "sub", f.record(_to_end_backward, (sums, sums), (*by_tokens[:3], 1)))
    to_end = ops.keeps_output(f, to_end, "exp")
    k = _by_row(f, k, to_end)
    del to_end
    of_chunks = ops.keeps_output(f, ops.selected(f, sums, by_tokens[:3]), "exp")
    for _ in range(chunks):
        own = _one(f, new_values)
        value = _difference(f, own, products.matmul(f, _one(f, decayed_keys), state, own.dims))
        between = products.matmul(f, _one(f, q), state, value.dims)
        added = ops.add(f, between, products.matmul(f, _one(f, within), value, value.dims))
        out = _written(f, out, added)
        del added
        fading = _faded(f, state, ops.selected(f, of_chunks, (b, n)))
        state = ops.add(f, fading, products.matmul(f, _one(f, k, swapped=True), value, state.dims))
        del fading
    del state
    out = ops.copied(f, out, "clone", of_values)
    out = sliced(f, out, (b, n, s, rule.value_dim))
    return f.to(out, dtype)


def turned(f: Tape, x: Tensor) -> Tensor:
    """`x.transpose(1, 2)` of a projection: its gradient does not lie in the order of its dims."""
    return Tensor(x.storage, x.dims, x.dtype, f.record(_turned_backward, (x,), x.dims))


def _turned_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    assert g.storage is not None
    f.permuted.add(g.storage.number)
    return f.view_of(g.view(saved[0]))


def repeated(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`repeat_interleave` over heads: a copy, whose gradient is summed."""
    return f.new(dims, x.dtype, "repeat_interleave", f.record(_repeated_backward, (x,), x.dims))


def _repeated_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum")


def _by_head(f: Tape, x: Tensor, views: bool) -> Tensor:
    """`x.transpose(1, 2).to(float32, contiguous)`. `views`: x is one of a wider tensor, whose gradient a reshape copies."""
    b, s, n, d = x.dims
    node = f.record(_by_head_backward, (x,), x.dims) if views else None
    x = x if node is None else Tensor(x.storage, x.dims, x.dtype, node)
    if x.dtype == "fp32":  # a view
        return x.view((b, n, s, d))
    return f.new((b, n, s, d), "fp32", "to", f.record(_to_backward, (x,), x.dims))


def _by_head_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "clone")


def _to_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return g.view(saved[0])


def _normed(f: Tape, x: Tensor) -> Tensor:
    """`l2norm`: x times the inverse root of its sum of squares."""
    row = x.dims[:-1]
    squares = ops.mul(f, x, x)
    total = ops.summed(f, squares, row)
    del squares
    total = ops.shift(f, total)
    node = f.record(_inverse_root_backward, (total,))
    inverse = f.new(row, "fp32", "rsqrt", node)
    f.keep(node, inverse.detach())
    return _by_row(f, x, inverse)


def _inverse_root_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    halved = f.new(g.dims, g.dtype, "mul")
    cubed = f.new(g.dims, g.dtype, "pow")
    out = f.new(g.dims, g.dtype, "mul")
    del halved, cubed
    return out


def _by_row(f: Tape, x: Tensor, row: Tensor) -> Tensor:
    """`x * row.unsqueeze(-1)`: saves each factor whose partner requires a gradient."""
    node = f.record(_by_row_backward, (x, row), x if row.node else None, row if x.node else None, row.dims)
    return f.new(x.dims, "fp32", "mul", node)


def _by_row_backward(f: Tape, node: Node, saved: tuple[Tensor | None, Tensor | None, Dims], g: Tensor) -> Gradients:
    each = f.new(g.dims, g.dtype, "mul") if node.edges[1] else None
    to_x = f.new(g.dims, g.dtype, "mul") if node.edges[0] else None
    to_row = None if each is None else f.view_of(f.new(saved[2], g.dtype, "sum"))
    del each
    return to_x, to_row


def _padded(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`F.pad` to whole chunks: a copy, of such a row too."""
    return f.new(dims, x.dtype, "constant_pad_nd", f.record(_padded_backward, (x,), x.dims))


def _padded_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "constant_pad_nd")


def _in_chunks(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """A view whose gradient lies column by column, and is copied."""
    return Tensor(x.storage, dims, x.dtype, f.record(_in_chunks_backward, (x,), x.dims))


def _in_chunks_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.view_of(f.new(saved[0], g.dtype, "clone"))


def _cumulated(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`cumsum` of each chunk."""
    return f.new(dims, "fp32", "cumsum", f.record(_cumulated_backward, (x,), x.dims))


def _cumulated_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    flipped = f.new(g.dims, g.dtype, "flip")
    sums = f.new(g.dims, g.dtype, "cumsum")
    out = f.new(saved[0], g.dtype, "flip")
    del flipped, sums
    return f.view_of(out)


def _differences(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`x.unsqueeze(4) - x.unsqueeze(3)`."""
    return f.new(dims, "fp32", "sub", f.record(_differences_backward, (x, x), x.dims))


def _differences_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Gradients:
    negative = f.new(g.dims, g.dtype, "neg")
    to_first, to_second = (f.view_of(f.new(saved[0], g.dtype, "sum")) for _ in range(2))
    del negative
    return to_first, to_second


def _masked_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "masked_fill")


def _to_end_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Gradients:
    """Of `x[..., -1:] - x`: a whole tensor for the last numbers."""
    negative = f.new(g.dims, g.dtype, "neg")
    last = f.new(saved[0], g.dtype, "sum")
    whole = f.new(g.dims, g.dtype, "slice_backward")
    del last
    return whole, negative


def _solved(f: Tape, system: Tensor, x: Tensor) -> Tensor:
    """`linalg.solve_triangular(system, x)`: saves the system and the result. cuBLAS gets a list of pointers to either."""
    node = f.record(_solved_backward, (system, x), system)
    out = f.new(x.dims, "fp32", "solve_triangular", node)
    _pointers(f, x)
    f.keep(node, out.detach())
    return out


def _pointers(f: Tape, x: Tensor) -> None:
    both = [f.new(x.dims[:3], "int64", "pointers") for _ in range(2)]
    del both


def _solved_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Gradients:
    to_x = f.new(g.dims, g.dtype, "solve_triangular")
    _pointers(f, to_x)
    to_system = None
    if node.edges[0]:
        to_system = f.new(saved[0].dims, g.dtype, "bmm")
        to_system = f.new(saved[0].dims, g.dtype, "neg")
        to_system = f.new(saved[0].dims, g.dtype, "tril")
    return to_system, to_x if node.edges[1] else None


def _one(f: Tape, x: Tensor, *, swapped: bool = False) -> Tensor:
    """`x[:, :, i]`, transposed where said."""
    b, n, _, rows, columns = x.dims
    return ops.selected(f, x, (b, n, columns, rows) if swapped else (b, n, rows, columns))


def _difference(f: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a - b`: saves nothing."""
    return f.new(a.dims, ops.promoted(a.dtype, b.dtype), "sub", f.record(_difference_backward, (a, b)))


def _difference_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Gradients:
    return g, f.new(g.dims, g.dtype, "neg") if node.edges[1] else None


def _faded(f: Tape, state: Tensor, decay: Tensor) -> Tensor:
    """`state * decay[..., None, None]`."""
    saved = state if decay.node else None, decay if state.node else None, decay.dims
    return f.new(state.dims, "fp32", "mul", f.record(_by_row_backward, (state, decay), *saved))


def _written(f: Tape, base: Tensor, x: Tensor) -> Tensor:
    """`base[:, :, i] = x` (`CopySlices`): saves nothing."""
    return Tensor(base.storage, base.dims, base.dtype, f.record(_written_backward, (base, x), x.dims))


def _written_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Gradients:
    whole = f.new(g.dims, g.dtype, "empty_strided")
    part = f.new(saved[0], g.dtype, "clone")
    zeros = f.new(saved[0], g.dtype, "zeros_like") if node.edges[0] else None
    edge = node.edges[1]
    if edge is not None and edge[2] != g.dtype:
        part = f.new(saved[0], edge[2], "to")
    del zeros
    return whole if node.edges[0] else None, part

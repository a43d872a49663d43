"""Quantized linear layers: what the packed weight takes while it is used.

Source: bitsandbytes, `autograd/_functions.py` (`MatMul4Bit`, `MatMul8bitLt`), `backends/cuda/ops.py`, `nn/modules.py`; torchao
0.18, quantization/quantize_/workflows/nf4/nf4_tensor.py.
Left out: int8's outlier columns, which depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING

from peftplan.arrays import Derived, Size, numel_at
from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Dim
from peftplan.storage.config import TORCHAO_NF4
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Strided, Tensor
from peftplan.units import ceil_div

if TYPE_CHECKING:
    from peftplan.memory.parts import Part, Running

BLOCKSIZE = 64


class RowsUnlessFused(Derived):
    """So many rows of what is dequantized where more tokens are multiplied than are fused, else none."""

    rows: int
    tokens: tuple[str, ...]
    above: int
    """The most tokens that are fused, by tokens that each of the named sizes stands for."""

    def __new__(cls, rows: int, tokens: tuple[str, ...], above: int) -> RowsUnlessFused:
        """The size called by its condition."""
        self = super().__new__(cls, f"({rows} if {'·'.join(tokens)} > {above})")
        self.rows, self.tokens, self.above = rows, tokens, above
        return self

    def __getnewargs__(self) -> tuple[int, tuple[str, ...], int]:  # type: ignore[override]
        """What a copy is made of."""
        return self.rows, self.tokens, self.above

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The rows at these sizes, which may be arrays as well as integers."""
        rows: Size = (numel_at(self.tokens, sizes) > self.above) * self.rows
        return rows


def _most_fused(part: Part, x: Tensor, running: Running) -> int:
    """Tokens up to which the product with x is fused. Left out where autocast has another dtype than x: x is not cast then."""
    n, k = _sizes(part)
    assert isinstance(n, int)
    assert isinstance(k, int)
    assert part.quant is not None
    if running.chip is None or running.autocast not in (None, x.dtype):
        return 0
    return running.chip.most_tokens(n=n, k=k, dtype=x.dtype, blocksize=part.quant.blocksize)


def _unless_fused(x: Tensor, most: int) -> Callable[[int], Dim]:
    """How many of a number of rows are dequantized for a product with x, if it is fused for so many tokens."""
    known = prod(dim for dim in x.dims[:-1] if isinstance(dim, int))
    named = tuple(dim for dim in x.dims[:-1] if not isinstance(dim, int))
    if named and most >= known > 0:
        return lambda rows: RowsUnlessFused(rows, named, most // known)
    return lambda rows: 0 if 0 < known <= most else rows


def linear4bit(f: Tape, part: Part, x: Tensor, running: Running) -> Tensor:
    """`Linear4bit`: the input in the compute dtype, the whole weight dequantized, the output back in the input's dtype.

    Autocast casts what the product within takes, where the compute dtype is another than its own. A fused product
    dequantizes nothing and takes no workspace.
    """
    assert part.quant is not None
    assert part.weight is not None
    dtype = x.dtype
    x = f.to(x, str(part.quant.compute_dtype))
    n_out, n_in = _sizes(part)
    assert isinstance(n_out, int)
    compute_dtype = f.autocast or x.dtype
    most = _most_fused(part, x, running)
    rows = _unless_fused(x, most)
    absmax = _absmax(f, part, keep_both=True, of=rows)
    weight = f.new((rows(n_out), n_in), x.dtype, "dequantized")
    fused = running.fuses_first and running.tokens <= most
    op = "gemm_4bit" if fused else "linear" if part.bias is None else "addmm"
    stored = "fp32" if running.merged_4bit else part.weight.dtype
    node = f.record(_linear4bit_backward, (x, part.bias), part, x.dims, stored)
    if node is not None:
        node.in_python = True
        node.context = None if f.modules is None else f.modules.whole(part.weight)  # `ctx.tensors`, a view of the packed weight
        if running.keeps_4bit_inputs:
            node.context = node.context, x
    casts = [f.new(t.dims, compute_dtype, "to") for t in (part.bias, weight) if t is not None and x.dtype != compute_dtype]
    with f.no_grad():  # an `autograd.Function`
        casts.append(f.cast(x, compute_dtype))
    out = f.new((*x.dims[:-1], n_out), compute_dtype, op, node)
    del casts, weight, absmax
    return f.to(out, dtype)


def _sizes(part: Part) -> Dims:
    """Outputs and inputs; a `Conv1D` states them the other way round."""
    assert part.weight is not None
    return tuple(reversed(part.weight.dims)) if part.kind == "Conv1D" else part.weight.dims


def _absmax(f: Tape, part: Part, *, keep_both: bool, of: Callable[[int], Dim] = int) -> list[Tensor]:
    """The fp32 absmax of a double quantized weight, as it is restored before use; `of`: blocks → how many are."""
    assert part.quant is not None
    assert part.weight is not None
    if not part.quant.double_quant:
        return []
    dims = [dim for dim in part.weight.dims if isinstance(dim, int)]
    assert len(dims) == len(part.weight.dims)
    blocks = (of(ceil_div(prod(dims), BLOCKSIZE)),)
    return [f.new(blocks, "fp32", "absmax") for _ in range(1 + keep_both)]


def dequantized(f: Tape, part: Part, dtype: str | None = None) -> Tensor:
    """`dequantize_module_weight`: the whole weight in the dtype that it was loaded in, or in `dtype`; an int8 one in fp32, by
    two products."""
    assert part.quant is not None
    assert part.weight is not None
    if part.quant.name == "int8":
        product = f.new(_sizes(part), "fp32", "mul")
        weight = f.new(_sizes(part), "fp32", "dequantized")
        del product
        return weight
    absmax = _absmax(f, part, keep_both=False)
    weight = f.new(_sizes(part), dtype or part.weight.dtype, "dequantized")
    del absmax
    return weight


def _linear4bit_backward(f: Tape, node: Node, saved: tuple[Part, Dims, str], g: Tensor) -> Gradients:
    part, x_dims, stored = saved
    bias = f.new(part.bias.dims, part.bias.dtype, "sum") if node.edges[1] and part.bias is not None else None
    weight = dequantized(f, part, stored)
    if weight.dtype != g.dtype:
        weight = f.new(part.own_weight.dims, g.dtype, "to")
    grad = f.new(x_dims, g.dtype, "mm") if node.edges[0] else None
    del weight
    return grad, bias


def linear8bit(f: Tape, part: Part, x: Tensor, running: Running) -> Tensor:
    """`Linear8bitLt`: an int8 copy of the input, int32 and fp16 outputs; it keeps its input outside autograd's saved tensors.

    It leaves its bias in the dtype of its input (`self.bias.data = self.bias.data.to(x.dtype)`), also one that trains.
    """
    assert part.weight is not None
    if part.bias is not None:
        part.bias.dtype = x.dtype
    n_out, _ = _sizes(part)
    rows = x.dims[:-1]
    copied = type(x) is Strided and not x.rows_are_a_view
    input_rows = f.new(x.dims, x.dtype, "clone") if copied else x.detach()  # `reshape` to rows
    half = input_rows if x.dtype == "fp16" else f.new(x.dims, "fp16", "to")
    scales = f.new(rows, "fp32", "row scales")
    quantized = f.new(x.dims, "int8", "int8 input")
    absolute = f.new(x.dims, "fp16", "abs")
    outliers = f.new(x.dims, "bool", "outliers")
    del outliers, absolute, half
    product = f.new((*rows, n_out), "int32", "int8 product")
    out = f.new((*rows, n_out), "fp16", "int8 result")
    if x.dtype != "fp16":
        out = f.new((*rows, n_out), x.dtype, "to")
    out.node = f.record(_linear8bit_backward, (x, part.bias), part)
    if out.node is not None:
        out.node.context = input_rows  # `ctx.tensors`, which checkpointing does not reach and backward does not release
    del quantized, scales, product
    return out


def _linear8bit_backward(f: Tape, node: Node, saved: tuple[Part], g: Tensor) -> Gradients:
    (part,) = saved
    x = node.context
    assert isinstance(x, Tensor)
    bias = f.new(part.bias.dims, part.bias.dtype, "sum") if node.edges[1] and part.bias is not None else None
    if not node.edges[0]:
        return None, bias
    g = f.new(g.dims, g.dtype, "clone") if f.is_permuted(g) else g  # `reshape(…).contiguous()`
    n_out, n_in = _sizes(part)
    scale = f.new((n_out, 1), "fp32", "mul")
    weight = f.new((n_out, n_in), x.dtype, "dequantized")
    low = g if g.dtype == x.dtype else f.new(g.dims, x.dtype, "to")
    grad = f.view_of(f.new(x.dims, x.dtype, "mm"))  # `matmul(…).view(ctx.grad_shape)`
    del weight, scale, low
    return grad, bias


def linear_of_torchao(f: Tape, part: Part, x: Tensor, running: Running) -> Tensor:
    """`LinearNF4`, and its bias (torchtune, modules/low_precision/nf4_linear.py): both passes restore the weight."""
    n_out, _ = _sizes(part)
    node = f.record(_linear_of_torchao_backward, (x,), part, x.dims)
    if node is not None:
        node.in_python = True
    weight = restored(f, part)
    out = f.new((*x.dims[:-1], n_out), x.dtype, "linear", node)
    del weight
    return out if part.bias is None else ops.add(f, out, part.bias)


def _linear_of_torchao_backward(f: Tape, node: Node, saved: tuple[Part, Dims], g: Tensor) -> Tensor:
    part, x_dims = saved
    weight = restored(f, part)
    grad = f.new(x_dims, g.dtype, "mm")
    del weight
    return grad


def restored(f: Tape, part: Part) -> Tensor:
    """`NF4Tensor.get_original_weight`, whose local variables live to its end: int64 indices of both halves of the bytes, and each
    half in the dtype of the weight before and after it is scaled.
    """
    assert part.quant is not None
    n_out, n_in = _sizes(part)
    assert isinstance(n_out, int)
    assert isinstance(n_in, int)
    half, scalers, dtype = (n_out * n_in // 2,), (n_out * n_in // part.quant.blocksize,), part.own_weight.dtype
    indices = []
    for op in (">>", "&"):
        nibbles = f.new(half, "uint8", op)
        indices.append(f.new(half, "int64", "to"))
        del nibbles
    values = [f.new(half, dtype, "index") for _ in indices]
    quotient = f.new(scalers, dtype, "div")
    of_blocks = f.new(scalers, dtype, "add")
    del quotient
    scaled = []
    for _ in values:
        repeated = f.new(half, dtype, "flatten")
        scaled.append(f.new(half, dtype, "mul"))
        del repeated
    weight = f.new((n_out, n_in), dtype, "stack")
    del indices, values, of_blocks, scaled
    return weight


def restoring(n: int, blocksize: int, itemsize: int) -> tuple[int, ...]:
    """Bytes of what lives together: int64 indices, values and scaled values of two halves, the scalers, and the weight."""
    halves = (ITEMSIZE["int64"], itemsize, itemsize)
    return (*(size * n // 2 for size in halves for _ in range(2)), itemsize * n // blocksize, itemsize * n)


def _of_gptqmodel(name: str) -> Callable[[Tape, Part, Tensor, Running], Tensor]:
    """A layer of `packed`, which few jobs need."""

    def layer(f: Tape, part: Part, x: Tensor, running: Running) -> Tensor:
        from peftplan.memory import packed

        out: Tensor = getattr(packed, name)(f, part, x, running)
        return out

    return layer


QUANTIZED = {
    "nf4": linear4bit,
    "fp4": linear4bit,
    "int8": linear8bit,
    "gptq": _of_gptqmodel("linear_of_gptq"),
    "awq": _of_gptqmodel("linear_of_awq"),
    TORCHAO_NF4: linear_of_torchao,
}
"""Layouts whose layers the engines run; the others have no peak (`storage.without_peak`), or train nowhere."""

"""LoRA's projections in one autograd function: q, k and v; the output projection; a gated MLP.

Letters: n tokens (b · s), r rank; a projection has a weight (out, in), A (r, in) and B (out, r).
Sources: `LoRA_QKV`, `LoRA_W` and `LoRA_MLP` of unsloth, kernels/fast_lora.py, `matmul_lora` of its kernels/utils.py; axolotl's
kernels/lora.py, which descends from them. The facts of `job.kernels.Lora` are where they differ.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from peftplan.errors import NoEngineError
from peftplan.job.kernels import Lora
from peftplan.ledger import Dim
from peftplan.memory.model import Model
from peftplan.memory.parts import Part
from peftplan.storage.config import FOUR_BIT
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Backward, Dims, Gradients, Node, Parameter, Tensor
from peftplan.units import ceil_div

BLOCKSIZE = 64


class Projection(NamedTuple):
    """One projection, as a kernel takes it."""

    part: Part
    a: Parameter
    b: Parameter

    @property
    def rank(self) -> Dim:
        """Rows of A."""
        return self.a.dims[0]

    @property
    def width(self) -> Dim:
        """Rows of B."""
        return self.b.dims[0]


def projections(model: Model, kernel: Lora, names: Sequence[str], layer: int) -> list[Projection] | None:
    """The projections of these names; None where one has no LoRA adapter or a bias that the kernel does not take, and peft's own
    forward runs (`patch_peft_model`). Raises NoEngineError where the kernel does more than the formula says.
    """
    from peftplan.methods.lora import LoraConfig  # a job without LoRA does not load it

    adapted = []
    for name in names:
        part = model.part(name, layer)
        if "lora_A.weight" not in part.params or (part.bias is not None and not kernel.takes_bias):
            return None
        config = model.running.config_as(LoraConfig)
        dropped = config.lora_dropout and not (kernel.drops_outside or kernel.drops_inside)
        if dropped or config.use_dora or part.params.keys() - {"weight", "bias", *LORA} or _trains(part.bias):
            raise NoEngineError(
                f"a LoRA kernel with dropout, trained biases or DoRA at {name.rpartition('.')[2]} (no formula yet)"
            )
        if part.quant is not None and part.quant.name not in FOUR_BIT:
            raise NoEngineError(f"a LoRA kernel over {part.quant.name} (no formula yet)")
        adapted.append(Projection(part, part.params["lora_A.weight"], part.params["lora_B.weight"]))
    return adapted


LORA = ("lora_A.weight", "lora_B.weight")


def _trains(bias: Parameter | None) -> bool:
    return bias is not None and bias.trainable


def _weight(f: Tape, kernel: Lora, p: Projection, dtype: str, *, buffered: bool) -> Tensor | None:
    """`fast_dequantize`, `dequantize`: a whole 4-bit weight. A 16-bit weight needs no new tensor, nor does the card's buffer."""
    if p.part.quant is None or (buffered and kernel.global_buffer):
        return None
    out_width, in_width = p.part.own_weight.dims
    weight = f.new((out_width, in_width), dtype, "dequantized")
    if not kernel.global_buffer and p.part.quant.double_quant:
        assert isinstance(out_width, int)
        assert isinstance(in_width, int)
        absmax = f.new((ceil_div(out_width * in_width, BLOCKSIZE),), "fp32", "absmax")
        del absmax
    return weight


def _cast(f: Tape, x: Parameter, dtype: str) -> Tensor | None:
    """`A.to(dtype)`: a copy, or nothing where it has the dtype."""
    return None if x.dtype == dtype else f.new(x.dims, dtype, "to")


def _product(f: Tape, dims: Dims, dtype: str) -> Tensor:
    return f.new(dims, dtype, "mm")


def _into(f: Tape) -> None:
    """A product that is written into an existing tensor."""
    f.products.append((len(f.log), "cuBLAS"))


def _matmul_lora(f: Tape, kernel: Lora, x: Tensor, p: Projection, *, buffered: bool, back: bool = False) -> Tensor:
    """`X @ W + s * (X @ A) @ B`; `back`: of the gradient, through the transposed ones, the adapter cast already.

    `buffered`: a 4-bit weight goes into the card's buffer, where the kernel has one; beside dropout it does not.
    """
    rows, dtype = x.dims[:-1], x.dtype
    weight = _weight(f, kernel, p, dtype, buffered=buffered)
    out = _product(f, (*rows, p.a.dims[1] if back else p.width), dtype)
    del weight
    if kernel.saves_casts:
        casts = None if back else [_cast(f, p.a, dtype), _cast(f, p.b, dtype)]
        low = _product(f, (*rows, p.rank), dtype)
    else:
        casts = None if back else [_cast(f, p.a, dtype)]
        low = _product(f, (*rows, p.rank), dtype)
        casts = None if back else [_cast(f, p.b, dtype)]
    _into(f)
    del low, casts
    return out


class Saved(NamedTuple):
    """What a kernel keeps outside autograd's saved tensors: its facts, its projections, and whether dropout runs inside."""

    kernel: Lora
    projections: tuple[Projection, ...]
    drops: bool


def _record(f: Tape, backward: Backward, kernel: Lora, xs: "Inputs", ps: Sequence[Projection], dropout: float) -> Node | None:
    node = f.record(backward, (*xs, *(side for p in ps for side in (p.a, p.b))))
    if node is not None:
        node.in_python = True
        node.context = Saved(kernel, tuple(ps), drops=bool(dropout) and kernel.drops_inside)
    return node


Inputs: TypeAlias = tuple[Tensor, Tensor | None]
"""What a kernel reads: x, and what dropout made of it for the adapter, if it ran."""


def _masked(f: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """`_dropout_forward`: the mask of one projection, and what dropout makes of its input for the adapter."""
    mask = f.new(x.dims, "bool", "dropout mask")
    return mask, f.new(x.dims, x.dtype, "dropout")


def _replayed(f: Tape, mask: Tensor, dtype: str) -> Tensor:
    """`_dropout_replay`: the input after dropout, or a gradient through it, from the mask."""
    return f.new(mask.dims, dtype, "native_dropout_backward")


def _add_through(f: Tape, mask: Tensor, dtype: str) -> None:
    """`_add_lora_dX`: the adapter's gradient of the input goes through the mask, and is added."""
    product = _product(f, mask.dims, dtype)
    gradient = _replayed(f, mask, dtype)
    del product, gradient


def _dropped(f: Tape, kernel: Lora, x: Tensor, p: float) -> "Inputs":
    return x, ops.dropout(f, x, p) if p and kernel.drops_outside else None


def _save(f: Tape, node: Node | None, kernel: Lora, xs: "Inputs", ps: Sequence[Projection], *more: Tensor) -> None:
    """`save_for_backward`: the inputs, what else is needed, and the adapter, in the input's dtype or as it is."""
    x, dropped = xs
    casts = [_cast(f, side, x.dtype) for p in ps for side in (p.a, p.b)] if kernel.saves_casts else []
    f.keep(node, x.detach(), None if dropped is None else dropped.detach(), *more, *(c for c in casts if c is not None))


def qkv(f: Tape, kernel: Lora, x: Tensor, ps: Sequence[Projection], dropout: float) -> list[Tensor]:
    """`LoRA_QKV`: three results; saves x, and its copy after dropout, or the mask of each projection."""
    xs = _dropped(f, kernel, x, dropout)
    node = _record(f, _qkv_backward, kernel, xs, ps, dropout)
    drops = bool(dropout) and kernel.drops_inside
    outs, masks = [], []
    dropped: Tensor | None = None
    for index, p in enumerate(ps):
        f.module = p.part.name
        if drops:
            mask, dropped = _masked(f, x)  # the one before lasts until then
            masks.append(mask)
        out = _matmul_lora(f, kernel, x, p, buffered=not drops)
        outs.append(Tensor(out.storage, out.dims, out.dtype, node, index))
        del out
    del dropped
    _save(f, node, kernel, xs, ps, *masks)
    return outs


def _qkv_backward(f: Tape, node: Node, saved: Sequence[Tensor], *grads: Tensor) -> Gradients:
    assert isinstance(node.context, Saved)
    kernel, ps, drops = node.context
    x, dropped, *rest = saved
    masks, casts = (rest, []) if drops else ([], rest)
    dx, *others = _projected_backward(f, kernel, (x, dropped), ps, grads, casts, masks)
    return dx if node.edges[0] else None, *others


def _of_dropped(f: Tape, dropped: Tensor | None, *, output: bool) -> Tensor | None:
    """`zeros_like`, into which products go; of the output projection the product, scaled."""
    if dropped is None:
        return None
    product = _product(f, dropped.dims, dropped.dtype) if output else None
    gradient = f.new(dropped.dims, dropped.dtype, "dX_drop")
    del product
    return gradient


def _projected_backward(
    f: Tape,
    kernel: Lora,
    xs: "Inputs",
    ps: Sequence[Projection],
    grads: Sequence[Tensor],
    casts: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, of what dropout made of it, and of the adapters: of projections that read the same x."""
    x, dropped = xs
    dtype, rows = x.dtype, x.dims[:-1]
    adapters = [_cast(f, side, dtype) for p in ps for side in (p.a, p.b)] if not kernel.saves_casts else list(casts)
    lows, grads_of = _adapter_gradients(f, kernel, ps, x, grads, masks)
    f.module = ps[0].part.name
    weight = _weight(f, kernel, ps[0], grads[0].dtype, buffered=False)
    if kernel.overwrites_input and len(ps) > 1:
        _into(f)
        dx = Tensor(x.storage, x.dims, x.dtype)
    else:
        dx = _product(f, (*rows, x.dims[-1]), dtype)
    del weight
    for mask in masks[:1]:
        _add_through(f, mask, dtype)
    for index, (p, g) in enumerate(zip(ps[1:], grads[1:], strict=True), 1):
        f.module = p.part.name
        weight = _weight(f, kernel, p, g.dtype, buffered=False)
        _into(f)
        del weight
        for mask in masks[index : index + 1]:
            _add_through(f, mask, dtype)
    of_dropped = _of_dropped(f, dropped, output=len(ps) == 1)
    del lows, adapters
    return dx, of_dropped, *grads_of


def _adapter_gradients(
    f: Tape, kernel: Lora, ps: Sequence[Projection], x: Tensor, grads: Sequence[Tensor], masks: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients times B of each projection, which the gradient of x needs too; and the gradients of A and B."""
    dtype, rows = x.dtype, x.dims[:-1]
    lows: list[Tensor] = []
    gradients: list[Tensor] = []
    if not kernel.saves_casts:
        gradients = [f.new(side.dims, dtype, "empty_like") for p in ps for side in (p.a, p.b)]
        lows = [_product(f, (*rows, p.rank), g.dtype) for p, g in zip(ps, grads, strict=True)]
        _products(f, ps, rows, dtype, masks)
        return lows, gradients
    for p, g in zip(ps, grads, strict=True):
        lows.append(_product(f, (*rows, p.rank), g.dtype))
        for number, side in enumerate((p.a, p.b)):
            transposed = _product(f, (p.rank, *rows), dtype) if number else None
            gradients.append(f.new(side.dims, "fp32" if kernel.wide_gradients and side.dtype == "fp32" else dtype, "mm"))
            del transposed
    return lows, gradients


def _products(f: Tape, ps: Sequence[Projection], rows: Dims, dtype: str, masks: Sequence[Tensor]) -> None:
    """The products that make the gradients of A and B, of the input as dropout made it for each projection."""
    for index, p in enumerate(ps):
        if masks:
            dropped = _replayed(f, masks[index], dtype)
        _into(f)
        inner = _product(f, (p.rank, *rows), dtype)
        _into(f)
        del inner
    if masks:
        del dropped


def output(f: Tape, kernel: Lora, x: Tensor, p: Projection, dropout: float) -> Tensor:
    """`LoRA_W`, `LoRA_O`: saves x; the gradient of x is a new tensor."""
    xs = _dropped(f, kernel, x, dropout)
    node = _record(f, _qkv_backward, kernel, xs, [p], dropout)
    f.module = p.part.name
    drops = bool(dropout) and kernel.drops_inside
    masks = _masked(f, x) if drops else ()
    out = _matmul_lora(f, kernel, x, p, buffered=not drops)
    _save(f, node, kernel, xs, [p], *masks[:1])
    return Tensor(out.storage, out.dims, out.dtype, node)


def mlp(f: Tape, kernel: Lora, x: Tensor, ps: Sequence[Projection], dropout: float) -> Tensor:
    """`LoRA_MLP`: saves x, the gate before its activation, its partner, and the masks of dropout inside."""
    gate, up, down = ps
    xs = _dropped(f, kernel, x, dropout)
    node = _record(f, _mlp_backward, kernel, xs, ps, dropout)
    drops = bool(dropout) and kernel.drops_inside
    masks = []
    sides = []
    for p in (gate, up):
        f.module = p.part.name
        if drops:
            mask, dropped = _masked(f, x)
            masks.append(mask)
        sides.append(_matmul_lora(f, kernel, x, p, buffered=not drops))
    if drops:
        del dropped
    hidden = f.new(sides[0].dims, x.dtype, "mul")
    f.module = down.part.name
    if drops:
        mask, dropped = _masked(f, hidden)
        masks.append(mask)
    out = _matmul_lora(f, kernel, hidden, down, buffered=not drops)
    _save(f, node, kernel, xs, ps, *sides, *masks)
    return Tensor(out.storage, out.dims, out.dtype, node)


def _of_product(f: Tape, kernel: Lora, dy: Tensor, down: Projection, mask: Tensor | None) -> Tensor:
    """The gradient of gate times partner; the part of it that comes through the adapter goes through the mask."""
    if mask is None:
        return _matmul_lora(f, kernel, dy, down, buffered=True, back=True)
    weight = _weight(f, kernel, down, dy.dtype, buffered=False)
    product = _product(f, (*dy.dims[:-1], down.a.dims[1]), dy.dtype)
    del weight
    low = _product(f, (*dy.dims[:-1], down.rank), dy.dtype)
    through = _product(f, mask.dims, dy.dtype)
    del low
    gradient = _replayed(f, mask, dy.dtype)
    del through, gradient
    return product


def _mlp_backward(f: Tape, node: Node, saved: Sequence[Tensor], dy: Tensor) -> Gradients:
    """Gate, partner and the gradient of their product are overwritten by their gradients and by the product itself."""
    assert isinstance(node.context, Saved)
    kernel, (gate, up, down), drops = node.context
    x, dropped, e, g, *others = saved
    masks, casts = (others, []) if drops else ([], others)
    dtype, rows = x.dtype, x.dims[:-1]
    adapters = [_cast(f, side, dtype) for p in (gate, up, down) for side in (p.a, p.b)] if not kernel.saves_casts else list(casts)
    f.module = down.part.name
    product = _of_product(f, kernel, dy, down, masks[2] if drops else None)
    after = None
    if kernel.saves_casts:
        low_down, of_down = _adapter_gradients(f, kernel, [down], product, [dy])
        low_up, of_up = _adapter_gradients(f, kernel, [up], x, [g])
        low_gate, of_gate = _adapter_gradients(f, kernel, [gate], x, [e])
    else:
        if drops:
            after = _replayed(f, masks[2], dtype)  # lasts to the end
        of_down, of_gate, of_up = ([f.new(side.dims, dtype, "empty_like") for side in (p.a, p.b)] for p in (down, gate, up))
        low_down = [_product(f, (*rows, down.rank), dtype)]
        _into(f)
        low_down = [_product(f, (down.rank, *rows), dtype)]
        _into(f)
        low_down = []
        low_up, low_gate = ([_product(f, (*rows, p.rank), dtype)] for p in (up, gate))
        _products(f, (up, gate), rows, dtype, [masks[1], masks[0]] if drops else ())
    f.module = up.part.name
    weight = _weight(f, kernel, up, dtype, buffered=False)
    if kernel.overwrites_input:
        _into(f)
        dx = Tensor(x.storage, x.dims, x.dtype)
    else:
        dx = _product(f, (*rows, x.dims[-1]), dtype)
    del weight
    if drops:
        _add_through(f, masks[1], dtype)
    f.module = gate.part.name
    weight = _weight(f, kernel, gate, dtype, buffered=False)
    _into(f)
    del weight
    if drops:
        _add_through(f, masks[0], dtype)
    of_dropped = _of_dropped(f, dropped, output=False)
    del low_down, low_up, low_gate, adapters, product, after
    return (dx if node.edges[0] else None, of_dropped, *of_gate, *of_up, *of_down)

"""What kernels of LoRA have in common: the projections that they take, their products, what they save, and gradients of adapters.

Letters: n tokens (b · s), r rank; a projection has a weight (out, in), A (r, in) and B (out, r).
Sources: `LoRA_QKV`, `LoRA_W` and `LoRA_MLP` of unsloth, kernels/fast_lora.py, `matmul_lora` of its kernels/utils.py; axolotl's
kernels/lora.py, which descends from them. The facts of `job.kernel_facts.Lora` are where they differ.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from peftplan.errors import NoEngineError
from peftplan.job.kernel_facts import Lora
from peftplan.ledger import Dim
from peftplan.memory.model import Model
from peftplan.memory.parts import Part
from peftplan.storage.config import FOUR_BIT
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Backward, Dims, Node, Parameter, Tensor
from peftplan.units import ceil_div

BLOCKSIZE = 64


class Projection(NamedTuple):
    """One projection, as a kernel takes it."""

    part: Part
    a: Parameter
    b: Parameter

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Weight, bias if there is one, A and B."""
        bias = () if self.part.bias is None else (self.part.bias,)
        return (self.part.own_weight, *bias, self.a, self.b)

    @property
    def rank(self) -> Dim:
        """Rows of A."""
        return self.a.dims[0]

    @property
    def width(self) -> Dim:
        """Rows of B."""
        return self.b.dims[0]

    @property
    def in_8_bits(self) -> bool:
        """Whether the weight is stored in 8 bits."""
        return self.part.quant is not None and self.part.quant.name not in FOUR_BIT


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
        if part.quant is not None and part.quant.name not in (*FOUR_BIT, "fp8"):
            raise NoEngineError(f"a LoRA kernel over {part.quant.name} (no formula yet)")
        adapted.append(Projection(part, part.params["lora_A.weight"], part.params["lora_B.weight"]))
    return adapted


LORA = ("lora_A.weight", "lora_B.weight")


def _trains(bias: Parameter | None) -> bool:
    return bias is not None and bias.trainable


def weight_of(f: Tape, kernel: Lora, p: Projection, dtype: str, *, buffered: bool) -> Tensor | None:
    """`fast_dequantize`, `dequantize`: a whole 4-bit or 8-bit weight. A 16-bit weight needs no new tensor, nor does the card's
    buffer, into which no 8-bit weight goes."""
    if p.part.quant is None or (buffered and kernel.global_buffer and not p.in_8_bits):
        return None
    out_width, in_width = p.part.own_weight.dims
    weight = f.new((out_width, in_width), dtype, "dequantized")
    if not kernel.global_buffer and p.part.quant.double_quant:
        assert isinstance(out_width, int)
        assert isinstance(in_width, int)
        absmax = f.new((ceil_div(out_width * in_width, BLOCKSIZE),), "fp32", "absmax")
        del absmax
    return weight


def cast(f: Tape, x: Parameter, dtype: str) -> Tensor | None:
    """`A.to(dtype)`: a copy, or nothing where it has the dtype."""
    return None if x.dtype == dtype else f.new(x.dims, dtype, "to")


def product_of(f: Tape, dims: Dims, dtype: str) -> Tensor:
    """The result of a matrix product."""
    return f.new(dims, dtype, "mm")


def into(f: Tape) -> None:
    """A product that is written into an existing tensor."""
    f.products.append((len(f.log), "cuBLAS"))


def matmul_lora(f: Tape, kernel: Lora, x: Tensor, p: Projection, *, buffered: bool, back: bool = False) -> Tensor:
    """`X @ W + s * (X @ A) @ B`; `back`: of the gradient, through the transposed ones, the adapter cast already.

    `buffered`: a 4-bit weight goes into the card's buffer, where the kernel has one; beside dropout it does not.
    """
    rows, dtype = x.dims[:-1], x.dtype
    factor = _quantized(f, p, x) if p.in_8_bits and not back else [weight_of(f, kernel, p, dtype, buffered=buffered)]
    out = product_of(f, (*rows, p.a.dims[1] if back else p.width), dtype)
    if not (p.in_8_bits and back):  # there the caller holds the weight (`LoRA_MLP.backward`)
        factor.clear()
    if kernel.saves_casts:
        casts = None if back else [cast(f, p.a, dtype), cast(f, p.b, dtype)]
        low = product_of(f, (*rows, p.rank), dtype)
    else:
        casts = None if back else [cast(f, p.a, dtype)]
        low = product_of(f, (*rows, p.rank), dtype)
        casts = None if back else [cast(f, p.b, dtype)]
    into(f)
    del low, casts, factor
    return out


def _quantized(f: Tape, p: Projection, x: Tensor) -> "list[Tensor | None]":
    """`act_quant`: the input in 8 bits, and a scale of each block of it. The product reads the stored weight, on a card of
    compute capability 8.9 or later (unsloth, kernels/fp8.py: `FP8BlockQuantLinear`)."""
    assert p.part.quant is not None
    (*rows, width), block = x.dims, p.part.quant.blocksize
    assert isinstance(width, int)
    return [f.new(x.dims, "fp8_e4m3", "act_quant"), f.new((*rows, width // block), "fp32", "scales")]


class Saved(NamedTuple):
    """What a kernel keeps outside autograd's saved tensors: its facts, its projections, whether dropout runs inside, and whether
    it saves x twice, in place of what dropout would have made of it (axolotl 0.19.0, kernels/lora.py:456)."""

    kernel: Lora
    projections: tuple[Projection, ...]
    drops: bool
    twice: bool


def record(f: Tape, backward: Backward, kernel: Lora, xs: "Inputs", ps: Sequence[Projection], dropout: float) -> Node | None:
    """The node of the whole kernel, which keeps its facts."""
    node = f.record(backward, (*xs, *(side for p in ps for side in (p.a, p.b))))
    if node is not None:
        node.in_python = True
        twice = f.offloaded is not None and xs[1] is None
        node.context = Saved(kernel, tuple(ps), drops=bool(dropout) and kernel.drops_inside, twice=twice)
    return node


Inputs: TypeAlias = tuple[Tensor, Tensor | None]
"""What a kernel reads: x, and what dropout made of it for the adapter, if it ran."""


def masked(f: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """`_dropout_forward`: the mask of one projection, and what dropout makes of its input for the adapter."""
    mask = f.new(x.dims, "bool", "dropout mask")
    return mask, f.new(x.dims, x.dtype, "dropout")


def replayed(f: Tape, mask: Tensor, dtype: str) -> Tensor:
    """`_dropout_replay`: the input after dropout, or a gradient through it, from the mask."""
    return f.new(mask.dims, dtype, "native_dropout_backward")


def add_through(f: Tape, mask: Tensor, dtype: str) -> None:
    """`_add_lora_dX`: the adapter's gradient of the input goes through the mask, and is added."""
    product = product_of(f, mask.dims, dtype)
    gradient = replayed(f, mask, dtype)
    del product, gradient


def dropped_of(f: Tape, kernel: Lora, x: Tensor, ps: Sequence[Projection], dropout: float) -> "Inputs":
    """The input, and what dropout outside the kernel makes of it; before, the kernel reads the parameters of its projections."""
    if f.modules is not None:
        for p in ps:
            for parameter in p.parameters:
                f.modules.read(p.part.name, p.part.layer, parameter)
    return x, ops.dropout(f, x, dropout) if dropout and kernel.drops_outside else None


def save(f: Tape, node: Node | None, kernel: Lora, xs: "Inputs", ps: Sequence[Projection], *more: Tensor) -> None:
    """`save_for_backward`: the inputs, what else is needed, and the adapter, in the input's dtype or as it is."""
    x, dropped = xs
    casts = [cast(f, side, x.dtype) for p in ps for side in (p.a, p.b)] if kernel.saves_casts else []
    second = x if f.offloaded is not None and dropped is None else dropped
    f.keep(node, x.detach(), None if second is None else second.detach(), *more, *(c for c in casts if c is not None))


def of_dropped_input(f: Tape, dropped: Tensor | None, *, output: bool) -> Tensor | None:
    """`zeros_like`, into which products go; of the output projection the product, scaled."""
    if dropped is None:
        return None
    product = product_of(f, dropped.dims, dropped.dtype) if output else None
    gradient = f.new(dropped.dims, dropped.dtype, "dX_drop")
    del product
    return gradient


def adapter_gradients(
    f: Tape, kernel: Lora, ps: Sequence[Projection], x: Tensor, grads: Sequence[Tensor], masks: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients times B of each projection, which the gradient of x needs too; and the gradients of A and B."""
    dtype, rows = x.dtype, x.dims[:-1]
    lows: list[Tensor] = []
    gradients: list[Tensor] = []
    if not kernel.saves_casts:
        gradients = [f.new(side.dims, dtype, "empty_like") for p in ps for side in (p.a, p.b)]
        lows = [product_of(f, (*rows, p.rank), g.dtype) for p, g in zip(ps, grads, strict=True)]
        products_into(f, ps, rows, dtype, masks)
        return lows, gradients
    for p, g in zip(ps, grads, strict=True):
        lows.append(product_of(f, (*rows, p.rank), g.dtype))
        for number, side in enumerate((p.a, p.b)):
            transposed = product_of(f, (p.rank, *rows), dtype) if number else None
            gradients.append(f.new(side.dims, "fp32" if kernel.wide_gradients and side.dtype == "fp32" else dtype, "mm"))
            del transposed
    return lows, gradients


def products_into(f: Tape, ps: Sequence[Projection], rows: Dims, dtype: str, masks: Sequence[Tensor]) -> None:
    """The products that make the gradients of A and B, of the input as dropout made it for each projection."""
    for index, p in enumerate(ps):
        if masks:
            dropped = replayed(f, masks[index], dtype)
        into(f)
        inner = product_of(f, (p.rank, *rows), dtype)
        into(f)
        del inner
    if masks:
        del dropped

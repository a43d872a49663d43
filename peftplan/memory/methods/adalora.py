"""AdaLoRA (peft, tuners/adalora/{layer,bnb,model}.py): its layers, the loss that its model adds, its rank allocator.

r rank at the start. On a 16-bit base peft casts `ranknum` to fp32 and so makes it anew, trainable by accident
(`cast_adapter_dtype`, tuners/tuners_utils.py): a division keeps as much as each layer's output more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftplan.dtypes import SIXTEEN_BITS
from peftplan.job.virtual_tokens import PEFT_TASKS, SOUND
from peftplan.ledger import Dim
from peftplan.memory.model import Model
from peftplan.memory.parts import Part, Running
from peftplan.methods.adalora import AdaLoraConfig
from peftplan.parameters import Parameter as Family
from peftplan.storage.config import FOUR_BIT
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Parameter, Tensor

FACTORS = ("lora_A", "lora_B")
STEADY_STEP = 2
"""The number of the step whose peaks count."""


def adalora(f: Tape, part: Part, x: Tensor, base: Callable[[Tensor], Tensor], running: Running) -> Tensor:
    """`result += dropout(x) @ (A * E).T @ B.T * scaling / ranknum`, in the adapter's dtype; on int8 a sum."""
    result = base(x)
    f.module = part.name
    a, b, e = (part.params[f"lora_{name}"] for name in "ABE")
    if part.quant is not None and part.quant.name in FOUR_BIT:
        result = ops.copied(f, result, "clone", viewed=False)
    ranknum = f.new((1,), "fp32", "ranknum")
    converts = part.quant is None or f.autocast is None
    if converts:
        x = f.to(x, a.dtype if part.quant is None or part.quant.name in FOUR_BIT else "fp32")
    low = _product(f, ops.dropout(f, x, running.config_as(AdaLoraConfig).lora_dropout), ops.mul(f, a, e))
    out = _product(f, low, b)
    del low
    if part.quant is not None and converts:
        out = f.to(out, result.dtype)
    product = out if part.quant is not None else None  # bnb.py has a name for it, layer.py has none
    out = ops.scale(f, out)
    cast = (
        part.quant is None and not running.freezes_ranknum and running.dtype in SIXTEEN_BITS and running.adapter_buffers == "fp32"
    )
    out = ops.divide(f, out, ranknum, trained=cast)
    del product
    return ops.add(f, result, out) if part.quant is not None and part.quant.name not in FOUR_BIT else added(f, result, out)


def _product(f: Tape, x: Tensor, weight: Operand) -> Tensor:
    """`x @ weight.T`: autocast's cache does not know views, so it casts each time."""
    return products.linear(f, x, f.to(weight, f.autocast) if f.autocast else weight)


def added(f: Tape, result: Tensor, out: Tensor) -> Tensor:
    """`result += out`. What addmm made is a view of rows (torch, aten/src/ATen/native/Linear.cpp, `_flatten_nd_linear`)."""
    number = 0 if result.storage is None else result.storage.number
    is_view = len(result.dims) > 2 and f.names[number].endswith("addmm")
    node = f.record(_added_to_view_backward if is_view else _added_backward, (result, out))
    return Tensor(result.storage, result.dims, result.dtype, node)


def _added_backward(f: Tape, node: Node, saved: object, g: Tensor) -> tuple[Tensor, Tensor]:
    return g, g


def _added_to_view_backward(f: Tape, node: Node, saved: object, g: Tensor) -> tuple[Tensor | None, Tensor]:
    """`CopySlices`: the gradient of the rows, and a copy of it (torch, csrc/autograd/functions/tensor.cpp)."""
    of_rows = f.new(g.dims, g.dtype, "CopySlices")
    return of_rows if node.edges[0] else None, f.new(g.dims, g.dtype, "clone")


def factors(model: Model) -> list[Family]:
    """The families of A and B."""
    return [p for p in model.parameters.all if p.owner == "adapter" and p.name.rpartition(".")[2] in FACTORS]


def regularizes(model: Model) -> bool:
    """Whether the loss has a part of A and B. Without a class for the task, `PeftModel.forward` calls the base model itself."""
    by_tuner = model.running.peft_type == "ADALORA" and model.running.peft_task in PEFT_TASKS
    return by_tuner and model.arch.model_type not in SOUND


def regularized(model: Model, loss: Tensor) -> Tensor:
    """`AdaLoraModel.forward`: how far each A and B is from orthogonal is added to the loss.

    Backward makes these gradients first, for all layers together; they wait for those that come through the layers.
    """
    if not regularizes(model):
        return loss
    f = model.tape
    f.module = ""
    total: Tensor | None = None
    for family in factors(model):
        used = model.used(family.name)
        for one in used:
            distance = _distance(f, one)
            total = f.new((), "fp32", "add", f.record(_pass, (distance,))) if total is None else added(f, total, distance)
        if family.copies > len(used) and total is not None:
            total = _others(model, total, family, family.copies - len(used))
    return loss if total is None else added(f, loss, ops.scale(f, ops.scale(f, total)))


def _distance(f: Tape, p: Parameter) -> Tensor:
    """`norm(p @ p.T - I)`, of B's other side."""
    rank = _rank(p.name, p.dims)
    other, one = (f.to(p, f.autocast), f.cast(p, f.autocast)) if f.autocast else (p, p)
    saved = [x for x in (one, other) if type(x) is Tensor]
    node = f.record(_covariance_backward, (one, other), one.dims, *saved)
    covariance = f.new((rank, rank), one.dtype, "mm", node)
    identity = f.new((rank, rank), one.dtype, "eye")
    off: Tensor = f.new((rank, rank), one.dtype, "sub", f.record(_pass, (covariance,)))
    del identity
    off = f.to(off, "fp32") if f.autocast else off
    node = f.record(_norm_backward, (off,), off)
    out = f.new((), "fp32", "norm", node)
    f.keep(node, out.detach())
    return out


def _rank(name: str, dims: Dims) -> Dim:
    return dims[0] if name.endswith("lora_A") else dims[1]


def _covariance_backward(
    f: Tape, node: Node, saved: tuple[Dims, Operand | None, Operand | None], g: Tensor
) -> tuple[Tensor, Tensor]:
    dims = saved[0]
    other = f.new(dims, g.dtype, "mm")
    return f.new(dims, g.dtype, "mm"), other


def _norm_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, saved[0].dtype, "mul")


def _pass(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g


def _others(model: Model, total: Tensor, family: Family, count: int) -> Tensor:
    """The same for copied layers; their gradients stay, because the ones through the layers are not made."""
    f, rank = model.tape, _rank(family.name, family.shape)
    casts = [f.many(family.shape, f.autocast, "to", count) for _ in range(2)] if f.autocast else []
    off = f.many((rank, rank), "fp32" if f.autocast else family.dtype, "sub", count)
    norms = f.many((), "fp32", "norm", count)
    node = f.record(_others_backward, (total,), model, family, count, off, norms, *casts)
    return Tensor(total.storage, total.dims, total.dtype, node)


def _others_backward(f: Tape, node: Node, saved: Sequence[object], g: Tensor) -> Tensor:
    model, family, count = saved[:3]
    assert isinstance(model, Model)
    assert isinstance(family, Family)
    assert isinstance(count, int)
    grad = f.many(family.shape, family.dtype, "", count)
    assert grad.storage is not None
    f.category[grad.storage.number] = "gradients"
    f.names[grad.storage.number] = f"{family.name}.grad"
    model.waiting.append(grad)
    return g


def allocate(model: Model) -> None:
    """`update_and_allocate` after the optimizer's step: three sensitivities anew for each parameter, then the masks."""
    f = model.tape
    f.module = ""
    trained = [p for p in model.parameters.all if p.owner == "adapter" and ".lora_" in p.name]
    for p in trained:
        temporaries = f.many(p.shape, p.dtype, "sensitivity", 3)  # two terms and their sum
        del temporaries
    config = model.running.config_as(AdaLoraConfig)
    if config.tinit < STEADY_STEP and STEADY_STEP % config.deltaT == 0:
        _mask(f, trained)


def _mask(f: Tape, trained: list[Family]) -> None:
    """`mask_to_budget`: the score of each parameter, of which one number per rank stays."""
    scores: list[Tensor] = []
    before: Tensor | None = None
    for p in trained:
        score = f.new(p.shape, p.dtype, "score")
        if p.name.endswith("lora_E"):
            scores.append(f.many(p.shape, p.dtype, "score", 2 * p.copies))  # and the sum over the three
        else:
            scores.append(f.many((_rank(p.name, p.shape), 1), p.dtype, "mean", p.copies))
        before = score
        del score
    del before

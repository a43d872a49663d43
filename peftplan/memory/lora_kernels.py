"""LoRA's projections in one autograd function: q, k and v; the output projection. A gated MLP: `lora_mlp`.

Letters and sources: `lora_products`.
"""

from collections.abc import Sequence

from peftplan.job.kernel_facts import Lora
from peftplan.memory.lora_products import (
    Inputs,
    Projection,
    Saved,
    adapter_gradients,
    add_through,
    cast,
    dropped_of,
    into,
    masked,
    matmul_lora,
    of_dropped_input,
    product_of,
    record,
    save,
    weight_of,
)
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Tensor


def qkv(f: Tape, kernel: Lora, x: Tensor, ps: Sequence[Projection], dropout: float) -> list[Tensor]:
    """`LoRA_QKV`: three results; saves x, and its copy after dropout, or the mask of each projection."""
    xs = dropped_of(f, kernel, x, ps, dropout)
    node = record(f, _qkv_backward, kernel, xs, ps, dropout)
    drops = bool(dropout) and kernel.drops_inside
    outs, masks = [], []
    dropped: Tensor | None = None
    for index, p in enumerate(ps):
        f.module = p.part.name
        if drops:
            mask, dropped = masked(f, x)  # the one before lasts until then
            masks.append(mask)
        out = matmul_lora(f, kernel, x, p, buffered=not drops)
        outs.append(Tensor(out.storage, out.dims, out.dtype, node, index))
        del out
    del dropped
    save(f, node, kernel, xs, ps, *masks)
    return outs


def _qkv_backward(f: Tape, node: Node, saved: Sequence[Tensor], *grads: Tensor) -> Gradients:
    assert isinstance(node.context, Saved)
    kernel, ps, drops, twice = node.context
    x, dropped, *rest = saved
    masks, casts = (rest, []) if drops else ([], rest)
    dx, *others = _projected_backward(f, kernel, (x, None if twice else dropped), ps, grads, casts, masks)
    return dx if node.edges[0] else None, *others


def _projected_backward(
    f: Tape,
    kernel: Lora,
    xs: Inputs,
    ps: Sequence[Projection],
    grads: Sequence[Tensor],
    casts: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, of what dropout made of it, and of the adapters: of projections that read the same x."""
    x, dropped = xs
    dtype, rows = x.dtype, x.dims[:-1]
    adapters = [cast(f, side, dtype) for p in ps for side in (p.a, p.b)] if not kernel.saves_casts else list(casts)
    lows, grads_of = adapter_gradients(f, kernel, ps, x, grads, masks)
    f.module = ps[0].part.name
    weight = weight_of(f, kernel, ps[0], grads[0].dtype, buffered=False)
    if kernel.overwrites_input and len(ps) > 1:
        into(f)
        dx = Tensor(x.storage, x.dims, x.dtype)
    else:
        dx = product_of(f, (*rows, x.dims[-1]), dtype)
    del weight
    for mask in masks[:1]:
        add_through(f, mask, dtype)
    for index, (p, g) in enumerate(zip(ps[1:], grads[1:], strict=True), 1):
        f.module = p.part.name
        weight = weight_of(f, kernel, p, g.dtype, buffered=False)
        into(f)
        del weight
        for mask in masks[index : index + 1]:
            add_through(f, mask, dtype)
    of_dropped = of_dropped_input(f, dropped, output=len(ps) == 1)
    del lows, adapters
    return dx, of_dropped, *grads_of


def output(f: Tape, kernel: Lora, x: Tensor, p: Projection, dropout: float) -> Tensor:
    """`LoRA_W`, `LoRA_O`: saves x; the gradient of x is a new tensor."""
    xs = dropped_of(f, kernel, x, [p], dropout)
    node = record(f, _qkv_backward, kernel, xs, [p], dropout)
    f.module = p.part.name
    drops = bool(dropout) and kernel.drops_inside
    masks = masked(f, x) if drops else ()
    out = matmul_lora(f, kernel, x, p, buffered=not drops)
    save(f, node, kernel, xs, [p], *masks[:1])
    return Tensor(out.storage, out.dims, out.dtype, node)

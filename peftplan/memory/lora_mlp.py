"""LoRA's gated MLP in one autograd function: gate, up and down. Letters and sources: `lora_products`."""

from collections.abc import Sequence

from peftplan.job.kernel_facts import Lora
from peftplan.memory.lora_products import (
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
    products_into,
    record,
    replayed,
    save,
    weight_of,
)
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Tensor


def mlp(f: Tape, kernel: Lora, x: Tensor, ps: Sequence[Projection], dropout: float) -> Tensor:
    """`LoRA_MLP`: saves x, the gate before its activation, its partner, and the masks of dropout inside."""
    gate, up, down = ps
    xs = dropped_of(f, kernel, x, ps, dropout)
    node = record(f, _mlp_backward, kernel, xs, ps, dropout)
    drops = bool(dropout) and kernel.drops_inside
    masks = []
    sides = []
    for p in (gate, up):
        f.module = p.part.name
        if drops:
            mask, dropped = masked(f, x)
            masks.append(mask)
        sides.append(matmul_lora(f, kernel, x, p, buffered=not drops))
    if drops:
        del dropped
    hidden = f.new(sides[0].dims, x.dtype, "mul")
    f.module = down.part.name
    if drops:
        mask, dropped = masked(f, hidden)
        masks.append(mask)
    out = matmul_lora(f, kernel, hidden, down, buffered=not drops)
    save(f, node, kernel, xs, ps, *sides, *masks)
    return Tensor(out.storage, out.dims, out.dtype, node)


def _of_product(f: Tape, kernel: Lora, dy: Tensor, down: Projection, mask: Tensor | None) -> Tensor:
    """The gradient of gate times partner; the part of it that comes through the adapter goes through the mask."""
    if mask is None:
        return matmul_lora(f, kernel, dy, down, buffered=True, back=True)
    weight = weight_of(f, kernel, down, dy.dtype, buffered=False)
    product = product_of(f, (*dy.dims[:-1], down.a.dims[1]), dy.dtype)
    del weight
    low = product_of(f, (*dy.dims[:-1], down.rank), dy.dtype)
    through = product_of(f, mask.dims, dy.dtype)
    del low
    gradient = replayed(f, mask, dy.dtype)
    del through, gradient
    return product


def _mlp_backward(f: Tape, node: Node, saved: Sequence[Tensor], dy: Tensor) -> Gradients:
    """Gate, partner and the gradient of their product are overwritten by their gradients and by the product itself."""
    assert isinstance(node.context, Saved)
    kernel, (gate, up, down), drops, twice = node.context
    x, dropped, e, g, *others = saved
    masks, casts = (others, []) if drops else ([], others)
    dtype, rows = x.dtype, x.dims[:-1]
    adapters = [cast(f, side, dtype) for p in (gate, up, down) for side in (p.a, p.b)] if not kernel.saves_casts else list(casts)
    f.module = down.part.name
    product = _of_product(f, kernel, dy, down, masks[2] if drops else None)
    after = None
    if kernel.saves_casts:
        low_down, of_down = adapter_gradients(f, kernel, [down], product, [dy])
        low_up, of_up = adapter_gradients(f, kernel, [up], x, [g])
        low_gate, of_gate = adapter_gradients(f, kernel, [gate], x, [e])
    else:
        if drops:
            after = replayed(f, masks[2], dtype)  # lasts to the end
        of_down, of_gate, of_up = ([f.new(side.dims, dtype, "empty_like") for side in (p.a, p.b)] for p in (down, gate, up))
        low_down = [product_of(f, (*rows, down.rank), dtype)]
        into(f)
        low_down = [product_of(f, (down.rank, *rows), dtype)]
        into(f)
        low_down = []
        low_up, low_gate = ([product_of(f, (*rows, p.rank), dtype)] for p in (up, gate))
        products_into(f, (up, gate), rows, dtype, [masks[1], masks[0]] if drops else ())
    f.module = up.part.name
    weight = weight_of(f, kernel, up, dtype, buffered=False)
    if kernel.overwrites_input:
        into(f)
        dx = Tensor(x.storage, x.dims, x.dtype)
    else:
        dx = product_of(f, (*rows, x.dims[-1]), dtype)
    del weight
    if drops:
        add_through(f, masks[1], dtype)
    f.module = gate.part.name
    weight = weight_of(f, kernel, gate, dtype, buffered=False)
    into(f)
    del weight
    if drops:
        add_through(f, masks[0], dtype)
    of_dropped = of_dropped_input(f, None if twice else dropped, output=False)
    del low_down, low_up, low_gate, adapters, product, after
    return (dx if node.edges[0] else None, of_dropped, *of_gate, *of_up, *of_down)

"""Experts of mixtures as NeMo Automodel divides them with HybridEP's exchange, beside Transformer Engine's
attention.

Source: nemo_automodel 0.7.0, components/moe/experts.py (`GroupedExpertsDeepEP`, `GroupedExpertsTE`), megatron/token_dispatcher.py
(`_HybridEPManager`, which holds the weights of the latest rows, and with them a graph); the exchange is that of
`memory.models.automodel_ep`.
"""

from __future__ import annotations

from peftplan.job.further_tokens import STACK
from peftplan.memory import te_float8
from peftplan.memory.experts import to_local
from peftplan.memory.fused_attention import number
from peftplan.memory.models.automodel_adapted import adapted, adapters
from peftplan.memory.models.automodel_chunks import in_chunks
from peftplan.memory.models.automodel_ep import activated, combined, dispatched, exchange, gated, on_all, weighted
from peftplan.memory.models.automodel_moe import Activated, by_engine, pads, product_of, projected
from peftplan.memory.models.style import Call
from peftplan.memory.units import experts as experts_of
from peftplan.memory.units import further
from peftplan.tape.tensors import Node, Tensor


def experts(
    c: Call,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    name: str = "mlp",
    *,
    after: bool = False,
    between: Activated = gated,
) -> Tensor:
    """`forward` of the experts: rows of other ranks in the order of this rank's experts, and back. `after`: weights multiply what
    the experts give; `between`: what is between their products."""
    f, units, stack = c.at(f"{name}.experts"), c.model.units, c.style.stack
    unit = further(stack, divided=True) if stack.startswith(STACK) else experts_of(c.number)
    dims, (x, weights) = x.dims, units.enter_with_all(unit, x, weights)
    params = c.model.part(f"{stack}.{name}.experts", c.number).params
    up_name = "gate_up_proj" if "gate_up_proj" in params else "up_proj"
    rows, owned, all_experts = indices.dims, number(params[up_name].dims[0]), c.block.mlp.num_experts
    masked = f.new(rows, "int64", "masked_fill")
    of_all = on_all(f, f.to(weights, "fp32"), all_experts)
    layout = exchange(f, x, owned, ranks=all_experts // owned)
    chosen, probabilities = dispatched(f, x, of_all, layout, rows)
    if isinstance(chosen.node, Node):
        chosen.node.context = layout
    c.model.dispatcher[:] = [probabilities, *c.model.compiled]
    del masked, of_all
    if pads(c):
        chosen, probabilities = (te_float8.padded(f, y) for y in (chosen, probabilities))
    if c.model.running.rows_of_experts == "most":
        second = in_chunks(f, params, chosen, probabilities)
    elif "down_proj_bias" in params:
        offsets = f.new((owned,), "int32", "to")
        few, kernel = c.model.running.rows_of_experts == "few", c.model.running.kernels.experts
        second, _ = projected(f, params, chosen, probabilities, offsets, few=few, kernel=kernel)
    else:
        up, down = (to_local(f, params[part]) for part in (up_name, "down_proj"))
        offsets = f.new((owned,), "int32", "to")
        product = product_of(f, c.model.running.kernels.experts, offsets)
        factors = adapters(c, f"{stack}.{name}.experts", owned)
        out = product(chosen, up, up.dims[1])
        out, *_of_up = (out,) if factors is None else adapted(f, product, chosen, out, factors[0])
        _read = chosen if factors is None or by_engine(c) else None
        del chosen
        after = after and factors is None
        ones = f.new(probabilities.dims, "fp32", "ones_like") if after else None
        inner = between(f, out, probabilities) if ones is None else activated(f, out, ones)
        out = inner if factors is None and not by_engine(c) else out
        second = product(inner, down, down.dims[1])
        second, *_of_down = (second,) if factors is None else adapted(f, product, inner, second, factors[1])
        _activated = inner if by_engine(c) else None
        del inner, out
        if after:  # the fake gate's weights have no gradient
            second = weighted(f, second, probabilities if c.model.running.kernels.gate is None else probabilities.detach())
    second = te_float8.padded(f, second) if pads(c) else second
    return units.leave(unit, combined(f, second, layout, dims))

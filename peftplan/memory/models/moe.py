"""Mixtures of experts in decoders of the Llama shape: routers and the blocks around the experts.

Sources: transformers 5.24, models/{mixtral,qwen2_moe,qwen3_moe,granitemoe}/modeling_*.py. Router losses are left out, as those
classes compute them only where `output_router_logits` is set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peftplan.errors import NeedsTraceError
from peftplan.memory import ops
from peftplan.memory.activations import activation
from peftplan.memory.experts import chunked_gate, divided_in_place, experts, row_sum, top_k
from peftplan.memory.methods.param_wrapper import Stacked, matrix
from peftplan.memory.models.decoder import Call, Style, decoder, gated_mlp
from peftplan.memory.tape import Tensor

Routed = tuple[Tensor, Tensor, Tensor]
Route = Callable[[Call, Tensor, str], Routed]
"""Hidden states and the router's name → router logits, weights and indices of each token's experts."""


def run_experts(c: Call, x: Tensor, indices: Tensor, weights: Tensor, name: str = "mlp.experts") -> Tensor:
    """The fused experts of a layer."""
    f = c.at(name)
    params = Stacked(c.model, f"{c.style.stack}.{name}", c.number, transposed=False)
    gate = chunked_gate(partial(activation, name=c.block.mlp.activation))
    return experts(f, x, indices, weights, params, gate, kernel=c.model.running.flash, transposed=False)


def router_logits(c: Call, x: Tensor, name: str) -> Tensor:
    """`F.linear(x, weight)`."""
    f = c.at(name)
    weight, _update = matrix(c.model, f"{c.style.stack}.{name}", c.number)
    return ops.linear(f, x, weight)


def best(c: Call, probabilities: Tensor, *, normed: bool) -> tuple[Tensor, Tensor]:
    """Weights and indices of each token's experts; `normed`: divided by their sum, in place."""
    values, indices = top_k(c.tape, probabilities, c.block.mlp.num_experts_per_tok)
    return divided_in_place(c.tape, values, row_sum(c.tape, values)) if normed else values, indices


def mixtral_route(c: Call, x: Tensor, name: str) -> Routed:
    """`MixtralTopKRouter.forward`: the best of a softmax over all experts, made to sum to one, in fp32."""
    f = c.tape
    logits = router_logits(c, x, name)
    probabilities = ops.keeps_output(f, f.to(logits, "fp32"), "softmax", passing=True)
    return (logits, *best(c, probabilities, normed=True))


def qwen_route(c: Call, x: Tensor, name: str) -> Routed:
    """`Qwen2MoeTopKRouter.forward`: as Mixtral's, made to sum to one if the config says so, in the logits' dtype."""
    f = c.tape
    logits = router_logits(c, x, name)
    probabilities = ops.softmax(f, logits, "fp32")
    values, indices = best(c, probabilities, normed=c.block.mlp.router.norm_topk_prob)
    values = f.to(values, logits.dtype)
    return logits, values, indices


def granite_route(c: Call, x: Tensor, name: str) -> Routed:
    """`GraniteMoeTopKRouter.forward`: a softmax over the best alone."""
    f = c.tape
    logits = f.to(router_logits(c, x, name), "fp32")
    chosen, indices = top_k(f, logits, c.block.mlp.num_experts_per_tok)
    weights = f.to(ops.keeps_output(f, chosen, "softmax", passing=True), x.dtype)
    return logits, weights, indices


def routed_block(c: Call, x: Tensor, *, route: Route, router: str, name: str) -> Tensor:
    """`MixtralSparseMoeBlock.forward`."""
    check(c)
    _logits, weights, indices = route(c, x, router)
    return run_experts(c, x, indices, weights, name)


def qwen2_block(c: Call, x: Tensor) -> Tensor:
    """`Qwen2MoeSparseMoeBlock.forward`: a shared expert behind a gate of its own."""
    check(c)
    shared = gated_mlp(c, x, "mlp.shared_expert")
    _logits, weights, indices = qwen_route(c, x, "mlp.gate")
    out = run_experts(c, x, indices, weights)
    gate = ops.keeps_output(c.tape, c.linear("mlp.shared_expert_gate", x), "sigmoid")
    shared = ops.mul(c.at("mlp"), shared, gate)
    del gate
    return ops.add(c.tape, out, shared)


def check(c: Call) -> None:
    """Raise NeedsTraceError for what few configs ask of a router."""
    if c.block.mlp.router.noise:
        raise NeedsTraceError("noise before a router")
    if c.block.mlp.router.loss:
        raise NeedsTraceError("a loss of routers")


mixtral = partial(decoder, style=Style(mixture=partial(routed_block, route=mixtral_route, router="mlp.gate", name="mlp.experts")))
qwen2_moe = partial(decoder, style=Style(mixture=qwen2_block))
qwen3_moe = partial(decoder, style=Style(mixture=partial(routed_block, route=qwen_route, router="mlp.gate", name="mlp.experts")))
granitemoe = partial(
    decoder,
    style=Style(
        multiplied=True,
        mixture=partial(routed_block, route=granite_route, router="block_sparse_moe.router", name="block_sparse_moe.experts"),
    ),
)

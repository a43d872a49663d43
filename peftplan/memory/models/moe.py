"""Mixtures of experts in decoders of the Llama shape: routers and the blocks around the experts.

Sources: transformers, models/{mixtral,qwen2_moe,qwen3_moe,granitemoe,deepseek_v2,deepseek_v3,glm4_moe}/modeling_*.py. The loss
of the routers' load is `memory.router_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peftplan.arch.blocks import Router
from peftplan.distributed.fsdp1 import Fsdp1
from peftplan.errors import NeedsTraceError, NoEngineError
from peftplan.memory.activations import activation
from peftplan.memory.experts import chunked_gate, divided_in_place, experts, row_sum, taken, top_k
from peftplan.memory.methods.param_wrapper import Stacked, matrix, update, updated
from peftplan.memory.models.decoder import decoder
from peftplan.memory.models.expert_loop import MIXTRAL, QWEN, looped, looped_block
from peftplan.memory.models.mlps import gated_mlp
from peftplan.memory.models.style import Call, Style
from peftplan.memory.units import experts as experts_of
from peftplan.tape import ops, products
from peftplan.tape.rotary import partly_rotary
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Node, Tensor
from peftplan.versions import EXPERTS_FUSED

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
    return products.linear(f, x, weight)


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


def routed(c: Call, route: Route, x: Tensor, name: str) -> Routed:
    """The router's logits, which the block's `_` holds while the experts run, and weights and indices of each token's experts."""
    logits, weights, indices = call_router(c, route, x, name)
    hand_out(c, logits)
    return logits, weights, indices


def call_router(c: Call, route: Route, x: Tensor, name: str) -> Routed:
    """The router, which is a module, on the hidden states."""
    part = c.model.part(f"{c.style.stack}.{name}", c.number)
    return c.tape.call(part.name, c.number, tuple(part.params.values()), x, lambda x: route(c, x, name))


def hand_out(c: Call, logits: Tensor) -> None:
    """Let the model's outputs hold a router's logits where they are asked for (`capture_outputs`)."""
    if c.model.router_logits is not None:
        c.model.router_logits.append(logits)


def routed_block(c: Call, x: Tensor, *, route: Route, router: str, name: str) -> Tensor:
    """`MixtralSparseMoeBlock`, which FSDP1 may have wrapped."""
    units, unit = c.model.units, experts_of(c.number)
    if not (isinstance(units, Fsdp1) and unit in units.by_name):
        return _routed_block(c, x, route=route, router=router, name=name)
    return units.leave(unit, _routed_block(c, units.enter_with(unit, x), route=route, router=router, name=name))


def _routed_block(c: Call, x: Tensor, *, route: Route, router: str, name: str) -> Tensor:
    """Its `forward`."""
    check(c)
    if c.block.mlp.apart:
        of_qwen = route is qwen_route
        normed = c.block.mlp.router.norm_topk_prob or not of_qwen
        return looped_block(c, x, names=QWEN if of_qwen else MIXTRAL, normed=normed)
    _logits, weights, indices = routed(c, route, x, router)
    return run_experts(c, x, indices, weights, name)


def qwen2_block(c: Call, x: Tensor) -> Tensor:
    """`Qwen2MoeSparseMoeBlock.forward`: a shared expert behind a gate of its own.

    The gradient of that gate's input comes first. It has two dims, so it is not a view and the others are added to it in place.
    """
    check(c)
    if c.block.mlp.apart:
        return _looped_qwen2_block(c, x)
    rows = x.view((f"b·{c.model.seq}", x.dims[-1]))
    shared = gated_mlp(c, x, "mlp.shared_expert")
    _logits, weights, indices = routed(c, qwen_route, x, "mlp.gate")
    out = run_experts(c, x, indices, weights)
    gate = ops.keeps_output(c.tape, c.linear("mlp.shared_expert_gate", rows), "sigmoid")
    shared = ops.mul(c.at("mlp"), gate, shared)
    del gate
    return ops.add(c.tape, out, shared)


def _looped_qwen2_block(c: Call, x: Tensor) -> Tensor:
    """The same before `versions.EXPERTS_FUSED`: the shared expert runs behind the loop."""
    rows = ops.reshaped(c.tape, x, (f"b·{c.model.seq}", x.dims[-1]))
    out = looped(c, rows, names=QWEN, normed=c.block.mlp.router.norm_topk_prob)
    shared = gated_mlp(c, rows, "mlp.shared_expert")
    gate = ops.keeps_output(c.tape, c.linear("mlp.shared_expert_gate", rows), "sigmoid")
    shared = ops.mul(c.at("mlp"), gate, shared)
    del gate
    return ops.reshaped(c.tape, ops.add(c.tape, out, shared), x.dims)


def wide_logits(c: Call, x: Tensor, name: str) -> Tensor:
    """`F.linear(x.type(torch.float32), weight.type(torch.float32))`."""
    f, of_router = c.at(name), (c.model, f"{c.style.stack}.{name}", c.number)
    delta = update(*of_router)
    wide = f.to(x, "fp32")
    return products.linear(f, wide, f.to(updated(*of_router, delta), "fp32"))  # read behind the input's copy


def deepseek_v2_route(c: Call, x: Tensor, name: str) -> Routed:
    """`DeepseekV2TopkRouter.forward`: the best of a softmax; first of groups by their best expert, if the config says so."""
    f, router = c.tape, c.block.mlp.router
    logits = wide_logits(c, x, name)
    scores = ops.softmax(f, logits, "fp32")
    if router.groups:
        of_groups, _ = top_k(f, _by_group(scores, router), 1)
        scores, *_kept_alive = of_best_groups(c, scores, of_groups)
    weights, indices = top_k(f, scores, c.block.mlp.num_experts_per_tok)
    return logits, ops.scale(f, weights), indices


def deepseek_v3_route(c: Call, x: Tensor, name: str) -> Routed:
    """`DeepseekV3TopkRouter.forward`: of groups by their two best experts after a correction; weights are sigmoids without it."""
    f, mlp = c.tape, c.block.mlp
    logits = wide_logits(c, x, name)
    scores = ops.keeps_output(f, logits, "sigmoid")
    corrected = ops.add(f, scores, Tensor(None, (mlp.num_experts,), "fp32"))
    of_groups = row_sum(f, top_k(f, _by_group(corrected, mlp.router), BEST_OF_GROUP)[0])
    corrected, *_kept_alive = of_best_groups(c, corrected, of_groups)
    indices = f.new((*scores.dims[:-1], mlp.num_experts_per_tok), "int64", "topk indices")
    weights = taken(f, scores, indices, indices.dims, "gather")
    if mlp.router.norm_topk_prob:
        weights = divided_in_place(f, weights, ops.shift(f, row_sum(f, weights)))
    return logits, ops.scale(f, weights), indices


BEST_OF_GROUP = 2


def _by_group(scores: Tensor, router: Router) -> Tensor:
    *rows, e = scores.dims
    assert isinstance(e, int)
    return scores.view((*rows, router.groups, e // router.groups))


def of_best_groups(c: Call, scores: Tensor, of_groups: Tensor) -> tuple[Tensor, ...]:
    """The scores, those of groups that are not among the best overwritten; and what else lives until the router returns."""
    f, dims = c.tape, scores.dims
    best = f.new((*dims[:-1], c.block.mlp.router.chosen), "int64", "topk indices")
    chosen = f.new(of_groups.dims, "fp32", "zeros_like")
    mask = f.new(dims, "fp32", "clone")
    as_bool = f.new(dims, "bool", "to")
    others = f.new(dims, "bool", "bitwise_not")
    del as_bool
    out = f.new(dims, scores.dtype, "masked_fill", f.record(_masked_backward, (scores,), others))
    return out, of_groups, best, chosen, mask


def _masked_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "masked_fill")


def deepseek_block(c: Call, x: Tensor, *, route: Route) -> Tensor:
    """`DeepseekV3MoE.forward`: experts beside shared ones.

    The experts read a view of their own, so their gradient waits for the factors of the experts' adapters.
    """
    check(c)
    if c.block.mlp.apart:
        raise NoEngineError(f"the experts of DeepSeek as before {EXPERTS_FUSED.named}")
    _logits, weights, indices = call_router(c, route, x, "mlp.gate")
    out = run_experts(c, ops.reshaped(c.tape, x), indices, weights)
    shared = gated_mlp(c, x, "mlp.shared_experts")
    return ops.add(c.at("mlp"), out, shared)


def check(c: Call) -> None:
    """Raise NeedsTraceError for router options that few configs set."""
    if c.block.mlp.router.noise:
        raise NeedsTraceError("router jitter noise")
    if c.block.mlp.router.hands_out and c.block.mlp.router.coefficient is None:
        raise NeedsTraceError("routers' logits among the outputs of a class that has no load-balancing loss")


mixtral = partial(decoder, style=Style(mixture=partial(routed_block, route=mixtral_route, router="mlp.gate", name="mlp.experts")))
qwen2_moe = partial(decoder, style=Style(mixture=qwen2_block, both_masks=True))
qwen3_moe = partial(decoder, style=Style(mixture=partial(routed_block, route=qwen_route, router="mlp.gate", name="mlp.experts")))
olmoe = partial(
    decoder,
    style=Style(
        qk_norm="flat",
        views_last=True,
        mixture=partial(routed_block, route=qwen_route, router="mlp.gate", name="mlp.experts"),
    ),
)
granitemoe = partial(
    decoder,
    style=Style(
        multiplied=True,
        mixture=partial(routed_block, route=granite_route, router="block_sparse_moe.router", name="block_sparse_moe.experts"),
    ),
)
glm4_moe = partial(
    decoder, style=Style(rotate=partly_rotary, by_head=True, mixture=partial(deepseek_block, route=deepseek_v3_route))
)

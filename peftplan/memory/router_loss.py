"""The loss of a mixture's load, which transformers makes of the logits of all routers and adds to the model's own.

n tokens (b·s), e experts, k experts a token. Source: transformers, models/mixtral/modeling_mixtral.py
(`load_balancing_loss_func`, which the other mixtures copy), utils/output_capturing.py (`capture_outputs`). Left out: most of what
is as small as e.
"""

from __future__ import annotations

from peftplan.memory.experts import top_k
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor


def balanced(model: Model, logits: list[Tensor]) -> Tensor:
    """The mean over experts of their share of the tokens times their mean probability. `logits`: of each layer's router."""
    f = model.tape
    f.module = ""
    k = next(block.mlp.num_experts_per_tok for block in model.arch.blocks if block.mlp.variant == "moe")
    mask = f.new(("b", "s"), "fp32", "to") if "attention_mask" in model.batch else None
    of_experts = None
    for of_layer in logits:
        probabilities = ops.softmax(f, of_layer, "fp32" if f.autocast else of_layer.dtype)
        _values, chosen = top_k(f, probabilities, k)
        counted = f.new(chosen.dims, "int32" if mask is None else "fp32", "to")
        del counted
        wide = f.to(probabilities, "fp32")
        shares = wide if mask is None else ops.mul(f, wide, mask)
        total = ops.summed(f, shares, shares.dims[-1:])
        of_experts = total if of_experts is None else ops.add(f, of_experts, total)
        del shares, wide
    assert of_experts is not None
    return ops.scale(f, ops.summed(f, _divided(f, of_experts)))


def _divided(f: Tape, total: Tensor) -> Tensor:
    return ops.mul(f, ops.scale(f, total, "div"), Tensor(None, total.dims, "fp32"))

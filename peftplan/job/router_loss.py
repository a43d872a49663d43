"""Whether a step adds the load-balancing loss of a mixture to the model's own."""

from __future__ import annotations

from peftplan.arch.modules import Architecture
from peftplan.errors import NoEngineError, RefusedError
from peftplan.job.script import Script
from peftplan.job.setup import Setup
from peftplan.versions import ROUTER_LOSS_BY_LAYER, named

LOSSES = ("full", "trl-chunked", "liger")
"""The losses whose heads hand the logits of all routers on, and were read."""
WITHOUT_NUM_EXPERTS = ("granitemoe",)
"""Model types whose config calls the number of experts otherwise, which trl reads (trainer/utils.py, `add_fused_lm_head`)."""


def router_loss(setup: Setup, architecture: Architecture) -> bool | None:
    """The resolved option: as the user says, else as the trainer or the model's config; None for a model that is no mixture, as
    its class does not read what asks for this loss.

    Raises RefusedError for a mixture whose class has no such loss, or for which trl's forward fails to make it.
    """
    routers = [block.mlp.router for block in architecture.blocks if block.mlp.variant == "moe"]
    having = [router for router in routers if router.coefficient is not None]
    if architecture.blocks and not routers:
        return None
    if setup.router_loss and architecture.blocks and not having:
        raise RefusedError(f"router_loss: {architecture.model_class} has no load-balancing loss")
    if setup.router_loss is not None or not having:
        adds = setup.router_loss
    elif setup.by.balances_experts and not setup.by_unsloth:
        adds = any(router.coefficient for router in having)
    else:
        adds = any(router.hands_out for router in having)
    if adds and setup.loss == "trl-chunked" and architecture.model_type in WITHOUT_NUM_EXPERTS:
        raise RefusedError(
            f"{named('trl')} refuses it: AttributeError: 'GraniteMoeConfig' object has no attribute 'num_experts'; set its "
            "router_aux_loss_coef to 0, and here --no-router-loss"
        )
    return adds


def check_router_loss(setup: Setup, script: Script) -> None:
    """Raise NoEngineError where the formulas do not know that loss."""
    if setup.router_loss and setup.loss not in LOSSES:
        raise NoEngineError(f"the load-balancing loss beside the {setup.loss} loss")
    if setup.router_loss and ROUTER_LOSS_BY_LAYER.after(script.transformers):
        raise NoEngineError(f"the load-balancing loss before {ROUTER_LOSS_BY_LAYER.named}")

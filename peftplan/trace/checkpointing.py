"""Turns on checkpointing with the call that the installed transformers has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

from peftplan.errors import RefusedError
from peftplan.job.setup import Setup


def checkpoint_layers(model: Any, setup: Setup) -> None:
    """Checkpoint the layers that a setup names. Raises RefusedError if the model or the installed transformers cannot.

    Source: transformers, modeling_utils.py (`activation_checkpointing_enable`); before it was
    `gradient_checkpointing_enable`, and before 5.17 it took neither `every_n_layers` nor `offload`.
    """
    if not setup.gradient_checkpointing:
        return
    if not model.supports_gradient_checkpointing:
        raise RefusedError(f"gradient_checkpointing: {type(model).__name__} does not support it in transformers; accepted: off")
    options = {"every_n_layers": setup.every_n_layers, "offload": setup.offload_checkpoints}
    arguments = {name: value for name, value in options.items() if value is not None}
    how = {"use_reentrant": setup.use_reentrant}
    try:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=how, **arguments)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how, **arguments)
    except TypeError as error:
        if not arguments:
            raise
        names = ", ".join("offload_checkpoints" if name == "offload" else name for name in arguments)
        raise RefusedError(f"{names}: transformers {version('transformers')} does not have it; 5.17 does") from error


def leave_frozen_layers(model: Any) -> None:
    """Checkpoint the layers alone in which something trains, and make the input of each a leaf, not the embeddings.

    Source: llamafactory 0.9.5, model/model_utils/checkpointing.py (`get_custom_gradient_checkpointing_func`).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.disable_input_require_grads()
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.gradient_checkpointing = any(p.requires_grad for p in layer.parameters())
        layer._gradient_checkpointing_func = partial(_of_leaf, layer._gradient_checkpointing_func)


def _of_leaf(checkpoint: Callable[..., Any], function: Callable[..., Any], hidden: Any, *others: Any, **named: Any) -> Any:
    return checkpoint(function, hidden.requires_grad_(True), *others, **named)

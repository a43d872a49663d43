"""Turns on checkpointing with the call that the installed transformers has."""

from __future__ import annotations

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

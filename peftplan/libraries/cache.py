"""The KV cache of any model that the installed transformers can run: filled with a few tokens, without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peftplan.deployment.kv_cache import STATE, CacheTensor
from peftplan.dtypes import parse_dtype
from peftplan.errors import PeftplanError, RefusedError
from peftplan.libraries.meta import build_config, build_model, model_class, quiet_transformers
from peftplan.libraries.replacing import replaced

BASE = "bf16"
"""The dtype that the model has on the meta device, in place of the one that it is loaded in."""
CLASSES = "transformers.cache_utils"
FEW = 8
"""Tokens that suffice to see the shapes. Few, because linear attention loops over them."""
TOKENS = {"keys": 2, "values": 2, "indexer_keys": 1}
"""Part of a cache → the dimension of its tokens."""
PARTS = ("keys", "values", "indexer_keys", "conv_states", "recurrent_states")
"""What transformers' cache layers hold: attention's tensors, and the states of linear attention and convolutions."""


def traced_cache(
    config: Mapping[str, Any], *, task_type: str | None, batch_size: int, context: int, dtype: str
) -> tuple[CacheTensor, ...]:
    """The tensors of the cache of `batch_size` sequences with `context` tokens each.

    Raises MissingExtraError without torch or transformers, RefusedError if the model keeps no such cache or cannot run so.
    """
    if task_type != "CAUSAL_LM":
        raise RefusedError(f"peftplan does not know which cache a model of task {task_type} keeps")
    with quiet_transformers():
        hf_config = build_config(config, name="model")
        model = build_model(config, hf_config, model_class(config, hf_config, name="model", task_type=task_type), name="model")
        try:
            cache = _decoded(model.eval(), batch_size, min(context, FEW))
        except PeftplanError:
            raise
        except Exception as error:  # each model class raises its own kinds
            reason = str(error).strip().split("\n", 1)[0]
            raise RefusedError(f"{type(model).__name__} does not run without weights: {type(error).__name__}: {reason}") from None
    counts: dict[tuple[str, str, str, tuple[int, ...]], int] = {}
    for layer in getattr(cache, "layers", ()):
        if type(layer).__module__ != CLASSES:
            raise RefusedError(f"{type(model).__name__} keeps a cache of its own, {type(layer).__name__}")
        for part, tensor in _tensors(layer):
            stored_dtype = parse_dtype(tensor.dtype)
            key = (
                _kind(layer, part),
                part,
                dtype if stored_dtype == BASE else stored_dtype,
                _filled(layer, part, tuple(tensor.shape), context),
            )
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        raise RefusedError(f"{type(model).__name__} returns no cache of transformers' own classes")
    return tuple(
        CacheTensor(kind, part, stored_dtype, shape, layers) for (kind, part, stored_dtype, shape), layers in counts.items()
    )


def _decoded(model: Any, batch_size: int, context: int) -> Any:
    """The cache once the last of `context` tokens came alone, as while decoding."""
    import torch

    # The oldest transformers of `versions.FLOORS` asks whether autocast is on for the device `meta`, which torch does not know
    ids = torch.zeros((batch_size, context), dtype=torch.long, device="meta")
    with torch.no_grad(), torch.device("meta"), replaced({"torch.is_autocast_enabled": lambda *of: False}):
        first = model(input_ids=ids[:, 1:], use_cache=True) if context > 1 else None
        past = {} if first is None else {"past_key_values": first.past_key_values}
        return model(input_ids=ids[:, :1], use_cache=True, **past).past_key_values


def _tensors(layer: Any) -> Iterator[tuple[str, Any]]:
    import torch

    for part in PARTS:
        states = getattr(layer, part, None)
        for tensor in states.values() if isinstance(states, dict) else (states,):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                yield part, tensor


def _kind(layer: Any, part: str) -> str:
    """The kind of a part, as the formulas name it. States do not grow; windows grow up to their length."""
    if part.endswith("_states"):
        return STATE
    return f"sliding {layer.sliding_window}" if getattr(layer, "is_sliding", False) else "full"


def _filled(layer: Any, part: str, shape: tuple[int, ...], context: int) -> tuple[int, ...]:
    """The shape with all tokens, or those of a window and the one that came last; states have no tokens."""
    if part not in TOKENS:
        return shape
    place = TOKENS[part]
    tokens = min(context, layer.sliding_window) if getattr(layer, "is_sliding", False) else context
    return (*shape[:place], tokens, *shape[place + 1 :])

"""Calls that methods change: those with virtual tokens, and those with adapters after parts of a layer."""

from __future__ import annotations

from peftplan.memory.model import Model
from peftplan.memory.units import EMBEDDING
from peftplan.methods.adaptation import PROMPTED
from peftplan.tape import ops
from peftplan.tape.tensors import Tensor


def inputs(model: Model) -> Tensor:
    """The token embeddings, with a gradient where checkpointing asks for one (`enable_input_require_grads`)."""
    if model.received is not None:
        return model.received
    if not model.virtual_tokens:
        return _words(model)
    from peftplan.memory.methods import virtual_tokens

    virtual_tokens.masked(model)
    prompted = model.running.peft_type in PROMPTED
    if not prompted:
        model.past = virtual_tokens.prefixed(model)
    words = _words(model)
    return virtual_tokens.prompted(model, words) if prompted else words


def _words(model: Model) -> Tensor:
    assert model.arch.input_embedding is not None
    model.units.enter(EMBEDDING)
    x = model.asking_gradient(model.embedding(model.arch.input_embedding, ("b", "s")))
    if model.running.noisy_embeddings:
        x = ops.add(model.tape, x, model.tape.new(x.dims, x.dtype, "noise"))
    x = model.units.leave(EMBEDDING, x)
    if model.running.shows_picture:  # the mean of its features, times nought
        x = ops.add(model.tape, x, model.tape.new((1,), x.dtype, "mul"))
    return x


def into_cache(model: Model, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The KV cache: a copy of keys and values that the outputs hold, unless `use_cache` is off (never with checkpointing)."""
    if model.past:
        from peftplan.memory.methods.virtual_tokens import continued

        return continued(model, k, v)
    if not model.caches:
        return k, v
    k, v = ops.cached(model.tape, k), ops.cached(model.tape, v)
    model.kept.append((k.detach(), v.detach()))
    return k, v


def behind(model: Model, name: str, x: Tensor, layer: int) -> Tensor:
    """The output of a part of a layer, after its adapter if the method adds one there."""
    if not model.has(f"{name}.adapter_up", layer):
        return x
    from peftplan.memory.methods.bottleneck import bottleneck

    return bottleneck(model, name, x, layer)

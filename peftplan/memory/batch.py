"""The tensors of a step's batch on the device: what a model's forward takes, in the shapes of the trace engine.

Source: the data collators of transformers; pictures and sound of the sizes that the config states.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.arch.modules import Architecture
from peftplan.ledger import Dim
from peftplan.memory.model import Model
from peftplan.tape.tensors import Tensor

PER_SAMPLE = ("SEQ_CLS", "IMAGE_CLS")
WHISPER_INPUT = "model.encoder.conv1"
MEL_FRAMES_PER_POSITION = 2
"""Whisper's second convolution has stride 2."""

ROW = "row"
"""Tokens of all ranks that share a row."""


def of_pictures_or_sound(arch: Architecture) -> bool:
    """Whether a batch holds what is large: another step may then find other room for it, as for gradients of a whole model."""
    return bool(arch.picture) or (arch.model_type == "whisper" and any(m.name == WHISPER_INPUT for m in arch.modules))


def batch_of(model: Model) -> dict[str, Tensor]:
    """The batch, made, by the names of the forward's arguments."""
    f = model.tape
    return {name: f.new(dims, dtype, name) for name, dtype, dims in _tensors(model)}


def shared(model: Model) -> list[Tensor]:
    """A rank's shares of the rows of a micro batch, and a copy of one, which locals hold until backward has ended. Shifted labels
    and positions stay with the batch; like its other tensors they keep the storage of whole rows.

    Source: transformers, trainer.py (`_prepare_context_parallel_inputs`); torch, _attention.py (`context_parallel`).
    """
    ring, f = model.running.ring, model.tape
    if model.running.ulysses > 1:  # `UlyssesSPDataLoaderAdapter.refill`
        model.batch["shift_labels"] = f.new(("b", "s"), "int64", "shift_labels")
        return [f.new(("b", "s"), "int64", f"share of {name}") for name in ("input_ids", "position_ids")]
    if ring is None:
        return []
    whole, share = ("b", "s", ring.ranks), ("b", "s")
    model.batch["shift_labels"] = f.new(whole, "int64", "shift_labels")
    model.batch["position_ids"] = f.new(share if f.several else whole, "int64", "position_ids")
    return [f.new(share, "int64", f"share of {name}") for name in (*model.batch, "positions")]


def _tensors(model: Model) -> Iterator[tuple[str, str, tuple[Dim, ...]]]:
    arch, ring = model.arch, model.running.ring
    if ring is not None:  # a mask of ones as collators add it; positions alone, in another order, would make one of all pairs
        yield from ((name, "int64", ("b", "s", ring.ranks)) for name in ("input_ids", "labels", "attention_mask"))
        return
    if model.running.ulysses > 1:  # of the rank's own row, which the data loader below DeepSpeed's holds
        yield from ((name, "int64", ("b", ROW)) for name in ("input_ids", "labels", "position_ids"))
        return
    if arch.picture:
        yield "pixel_values", _dtype(model), ("b", *arch.picture)
    elif of_pictures_or_sound(arch):
        yield "input_features", _dtype(model), sound(model)
    else:
        yield "input_ids", "int64", ("b", "s")
    if arch.task_type == "QUESTION_ANS":
        yield from ((name, "int64", ("b",)) for name in ("start_positions", "end_positions"))
    else:
        yield "labels", "int64", ("b",) if arch.task_type in PER_SAMPLE else ("b", model.running.logits_to_keep or "s")
    if model.running.padding and not arch.picture:
        yield "attention_mask", "int64", ("b", "s")


def sound(model: Model) -> tuple[Dim, ...]:
    """Mel frames of a whole window."""
    positions, mels = (model.part(f"model.encoder.{name}").weight for name in ("embed_positions", "conv1"))
    assert positions is not None
    assert mels is not None
    frames = positions.dims[0]
    assert isinstance(frames, int)
    return ("b", mels.dims[1], MEL_FRAMES_PER_POSITION * frames)


def _dtype(model: Model) -> str:
    """Processors give fp32, which only autocast takes beside weights of 16 bits."""
    if model.running.autocast:
        return "fp32"
    first = model.arch.modules[0]
    return next(iter(model.part(first.name).params.values())).dtype

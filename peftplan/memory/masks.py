"""Attention masks of decoders, as transformers makes them once for all layers.

Source: transformers, masking_utils.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.tape.tensors import Tensor

if TYPE_CHECKING:
    from peftplan.memory.model import Model


def causal_mask(model: Model, dtype: str, window: int | None = None) -> Tensor | None:
    """`create_causal_mask`: for eager a mask of the model's dtype; for sdpa a boolean one where there is padding, a window
    no longer than the sequence, a prefix, or an older transformers; else none, since the kernels know causal attention.
    """
    f, s, running = model.tape, model.seq, model.running
    model.units.read_mask()
    if model.own_mask is not None:
        return model.own_mask
    windowed = window is not None and model.key_len >= window
    if model.running.attention == "eager":
        _seen = seen_keys(model, windowed=window is not None)
        return f.new(("b", 1, s, model.keys), dtype, "attention_mask")
    if running.attention == "sdpa" and (running.padding or running.masks_unpadded or windowed or model.keys != s):
        return seen_keys(model, windowed=window is not None)
    return None


def seen_keys(model: Model, *, windowed: bool, padded: bool | None = None) -> Tensor:
    """`sdpa_mask`: which keys a query sees, each condition `and`ed to those before (`and_masks`): the window, causality, and
    padding or one sequence's number. `padded`: whether the class passes a mask of the padding; None: the one of the batch.
    """
    f = model.tape
    of_all = (1, 1, model.seq, model.keys)
    packed = padded is None and model.running.masks_unpadded and model.keys == model.seq
    padded = packed or ("attention_mask" in model.batch if padded is None else padded)
    if windowed:
        near = f.new(of_all, "bool", "gt")
        seen = f.new(of_all, "bool", "bitwise_and")
        del near
        causal = f.new(of_all, "bool", "le")
        seen = f.new(of_all, "bool", "bitwise_and" if padded else "attention_mask")
        del causal
    else:
        seen = f.new(of_all, "bool", "le" if padded else "attention_mask")
    if padded:
        seen = f.new(of_all, "bool", "bitwise_and")
        _same = f.new(("b", *of_all[1:]), "bool", "eq") if packed else None
        seen = f.new(("b", *of_all[1:]), "bool", "attention_mask")
    return seen


def seen_in_blocks(model: Model, dtype: str, *, windowed: bool) -> Tensor:
    """The same of tokens that see each other in blocks, as no token of a text does: a mask is made all the same (`or_masks`,
    `blockwise_overlay`), for eager attention of numbers."""
    f = model.tape
    of_all = (1, 1, model.seq, model.keys)
    of_rows = ("b", *of_all[1:])
    seen = f.new(of_all, "bool", "le")
    if windowed:
        near = f.new(of_all, "bool", "gt")
        seen = f.new(of_all, "bool", "bitwise_and")
        del near
    seen = f.new(of_all, "bool", "bitwise_or")
    alike = f.new(of_rows, "bool", "eq")
    alike = f.new(of_rows, "bool", "bitwise_and")
    seen = f.new(of_rows, "bool", "bitwise_or")
    del alike
    if "attention_mask" in model.batch:
        seen = f.new(of_rows, "bool", "bitwise_and")
        seen = f.new(of_rows, "bool", "bitwise_and")
    return f.new(of_rows, dtype, "attention_mask") if model.running.attention == "eager" else seen

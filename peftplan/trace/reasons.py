"""Why a trace failed, in one line: the error of torch or transformers, and its meaning if it is known."""

from __future__ import annotations

MEANINGS: tuple[tuple[str, str], ...] = (
    (
        "expected scalar type torch.uint8",
        "the model's code multiplies by a packed 4-bit weight, which fails on a GPU too; accepted: quant none, or that layer in "
        "quant_skip_modules",
    ),
    (
        "to out tensor with dtype torch.uint8",
        "the model's code clamps a packed 4-bit weight, which fails on a GPU too (Gemma 3n: prediction_coefs, correction_coefs); "
        "accepted: quant none, or these layers in quant_skip_modules",
    ),
    (
        "only Tensors of floating point dtype can require gradients",
        "a module that peft trains in full (the head) is itself quantized, which fails on a GPU too; accepted: its name in "
        "quant_skip_modules",
    ),
    ("DynamicOutputShapeException", "the size of a tensor depends on the values of others, which a trace does not have"),
)
"""A part of an error's text, and the meaning that is added to it."""

MAX_LENGTH = 200


def reason(error: Exception) -> str:
    """The kind of error, its first line, and its meaning where it is known."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = f"{type(error).__name__}: {' '.join(lines[:1])[:MAX_LENGTH]}"
    meaning = next((meaning for part, meaning in MEANINGS if part in message), None)
    return message if meaning is None else f"{message} ({meaning})"

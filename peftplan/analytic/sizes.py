"""The named sizes of a job, and what of its batch and sequence decides which operations run."""

from __future__ import annotations

from typing import Any

from peftplan.arch.modules import Architecture
from peftplan.job.loss_sizes import LossSizes
from peftplan.memory.fused_attention import MASK_MULTIPLE

MULTIPLES = (8, 16, 32, 64, 128)
"""Multiples to which kernels round the sequence."""
BLOCK = 64
"""Rows that the memory-efficient kernel takes at a time."""


def windows_of(architecture: Architecture) -> tuple[int, ...]:
    """The longest sequence that gets no mask for each sliding window of a model, each once (transformers, masking_utils.py:
    `kv_length >= local_attention_size` gets one, where a window that looks both ways states the size of one side).
    """
    windowed = (a for block in architecture.blocks for a in block.attentions if a.window)
    return tuple(sorted({(a.window if a.causal else a.window // 2) - 1 for a in windowed if a.window}))


def shape_facts(batch_size: Any, seq_len: Any, windows: tuple[int, ...], loss: LossSizes) -> tuple[Any, ...]:
    """What of batch and sequence decides which operations run: one sequence, ragged masks, shorter windows, chunks of a loss.

    Whole numbers or arrays of them; `seq_len` with virtual tokens.
    """
    ragged = (seq_len % MASK_MULTIPLE > 0, (seq_len - loss.virtual_tokens) % MASK_MULTIPLE > 0)
    return (batch_size > 1, *ragged, *(seq_len > window for window in windows), *loss.facts(batch_size, loss.length(seq_len)))


def sizes(b: Any, s: Any, *, virtual_tokens: int, loss: LossSizes) -> dict[str, Any]:
    """The named sizes of a batch of b sequences of s tokens, numbers or arrays: k is the sequence with virtual tokens."""
    named = {"b": b, "s": s, "k": s + virtual_tokens}
    named |= {f"{name}%{m}": -(-named[name] // m) * m for name in ("s", "k") for m in MULTIPLES}
    named |= {f"{name}/{BLOCK}": -(-named[name] // BLOCK) for name in ("s", "k")}
    named |= {f"{name}{more:+}": named[name] + more for name in ("s", "k") for more in (1, -1)}
    return named | loss.named(b, loss.length(s + virtual_tokens))

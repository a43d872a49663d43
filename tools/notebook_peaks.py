"""What a notebook of Unsloth that printed its reserved bytes leaves open, and what its release did otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LOSSES = (
    ((2025, 8, 4), "logits in chunks of half the free memory, on an A100 all of them (unsloth_zoo 2025.9.1, `fused_losses`)"),
    ((2025, 1), "no logits, or all of up to 1,024 tokens (unsloth 2025.1.5, `models/llama.py:1015`)"),
    ((2024,), "all logits of a batch (unsloth 2024.8, `models/llama.py:904`; 2024.11.6, `:966`)"),
)
"""First release → how its loss takes the logits. The release that is counted, 2026.10.9, fills buffers of a fixed size."""
COPIES = ("nb/AMD-", "nb/Kaggle-", "nb/HuggingFace Course-")
"""Starts of the paths of notebooks with the same output as another one."""
WITHOUT_BF16 = "T4"
"""The end of the name of a card that computes no bf16."""
FORCED_FP32 = ("gemma-3", "functiongemma", "gpt-oss")
"""Parts of the names of models that Unsloth computes in fp32 there (models/loader.py, `FORCE_FLOAT32`)."""
LENGTHS = "lengths of the rows"


def left_open(record: Mapping[str, Any], counted: int, *, lengths: bool = True) -> Iterator[str]:
    """What decides the printed bytes and does not stand in the config: the data, the card, and the release that ran. `counted`:
    trainable parameters; `lengths`: those of the rows are not known otherwise."""
    measured = record["measured"]
    stated = [call["kwargs"] for call in record["values"]["calls"]]
    if lengths and not any(call.get("packing") is True for call in stated):
        yield LENGTHS  # a batch is as long as its longest row
    if measured["gpu"].endswith(WITHOUT_BF16):
        whole = any(call.get("full_finetuning") is True for call in stated)
        forced = any(name in str(call.get("model_name", "")).lower() for call in stated for name in FORCED_FP32)
        yield "weights in fp32" if whole else "computed in fp32" if forced else "fp16 in place of bf16"
    trainable = measured.get("trainable")
    if trainable not in (None, counted):
        yield f"other adapters ({trainable:,} parameters printed)"
    if "unsloth" in measured:
        release = tuple(map(int, measured["unsloth"].split(".")))
        yield next(loss for first, loss in LOSSES if release >= first)

"""Reserved peaks that Unsloth's notebooks printed beside those that are counted, and what their releases did otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peftplan.planning.configs import ConfigEntry
from peftplan.units import GIB
from tests.job.configs.published import records

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


def rows(entries: Mapping[str, ConfigEntry]) -> Iterator[tuple[str, ...]]:
    """Notebook, release, card, reserved bytes that it printed, those that are counted, drift, and what its config leaves open."""
    for record in records("unsloth"):
        measured = record.get("measured", {})
        entry = entries[record["path"]]
        printed = measured.get("peak_reserved_gb")
        if not printed or entry.peak_reserved is None or entry.bound is not None or record["path"].startswith(COPIES):
            continue
        counted = entry.peak_reserved / GIB
        drift = f"{100 * (counted / printed - 1):+.1f} %"
        left_open = "; ".join(_left_open(record, entry))
        release = measured.get("unsloth", "–")
        yield (record["path"][3:], release, measured["gpu"], f"{printed:.2f}", f"{counted:.2f}", drift, left_open)


def _left_open(record: Mapping[str, Any], entry: ConfigEntry) -> Iterator[str]:
    """What decides the printed bytes and does not stand in the config: the data, the card, and the release that ran."""
    measured = record["measured"]
    stated = [call["kwargs"] for call in record["values"]["calls"]]
    if not any(call.get("packing") is True for call in stated):
        yield LENGTHS  # a batch is as long as its longest row
    if measured["gpu"].endswith(WITHOUT_BF16):
        whole = any(call.get("full_finetuning") is True for call in stated)
        forced = any(name in (entry.model or "").lower() for name in FORCED_FP32)
        yield "weights in fp32" if whole else "computed in fp32" if forced else "fp16 in place of bf16"
    trainable = measured.get("trainable")
    if trainable not in (None, entry.trainable_parameters):
        yield f"other adapters ({trainable:,} parameters printed)"
    if "unsloth" in measured:
        release = tuple(map(int, measured["unsloth"].split(".")))
        yield next(loss for first, loss in LOSSES if release >= first)

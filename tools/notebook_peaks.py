"""Reserved peaks that Unsloth's notebooks printed beside those that are counted, and what their releases did otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peftplan.planning.configs import ConfigEntry
from peftplan.units import GIB
from tests.job.configs.published import records

LOSSES = (
    ((2025, 8, 4), "logits in chunks of half the free memory, on an A100 all of them (unsloth_zoo 2025.9.1, `fused_losses`)"),
    ((2025, 1), "no logits, or all of up to 1,024 tokens (unsloth 2025.1.5, `models/llama.py:1015`)"),
    ((2024,), "all logits of a batch (unsloth 2024.8, `models/llama.py:904`; 2024.11.6, `:966`)"),
)
"""First release → how its loss takes the logits. The release that is counted, 2026.10.9, fills buffers of a fixed size."""
OWN_EXPERTS = "adapters on attention alone, as releases of 2025 have them (3,981,312 parameters printed)"
COPIES = ("nb/AMD-", "nb/Kaggle-", "nb/HuggingFace Course-")
"""Starts of the paths of notebooks with the same output as another one."""


def rows(entries: Mapping[str, ConfigEntry]) -> Iterator[tuple[str, ...]]:
    """Notebook, release, card, reserved bytes that it printed, those that are counted, drift, and the loss of the release."""
    for record in records("unsloth"):
        measured = record.get("measured", {})
        entry = entries[record["path"]]
        printed = measured.get("peak_reserved_gb")
        if not printed or entry.peak_reserved is None or entry.bound is not None or record["path"].startswith(COPIES):
            continue
        counted = entry.peak_reserved / GIB
        release = tuple(map(int, measured["unsloth"].split(".")))
        loss = next(loss for first, loss in LOSSES if release >= first)
        if "gpt-oss" in record["path"] and release < (2026,):
            loss = OWN_EXPERTS
        drift = f"{100 * (counted / printed - 1):+.1f} %"
        yield (record["path"][3:], measured["unsloth"], measured["gpu"], f"{printed:.2f}", f"{counted:.2f}", drift, loss)

"""Cards as people write them."""

from __future__ import annotations

UPPER = ("rtx", "gtx", "rx", "xt", "xtx", "agx", "nx", "dgx", "sff", "nvl", "ai")
"""Parts of a card's id that are written in capitals; others with a digit are too."""


def card_name(gpu: str) -> str:
    """`RTX 4090` for rtx-4090, which `--gpu` takes too; capacities as they were typed."""
    return gpu if gpu[0].isdigit() else " ".join(map(_word, gpu.split("-")))


def _word(part: str) -> str:
    if part == "pcie":
        return "PCIe"
    return part.upper() if part in UPPER or any(map(str.isdigit, part)) else part.capitalize()

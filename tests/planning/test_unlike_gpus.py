"""Jobs whose GPUs need unlike amounts, asked about several cards: whose peaks they are, and that none are computed again."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.analytic import engine
from peftplan.job.inventory import Inventory

UNLIKE: dict[str, Any] = {"batch_size": 1, "seq_len": 64, "gpus": 2, "strategy": "zero2"}
FEW, MANY = "rtx-3060", "rtx-3090"
"""Cards of one compute capability, with 28 and 82 multiprocessors."""


def test_each_card_gets_the_peaks_of_its_multiprocessors() -> None:
    """For 64 tokens bitsandbytes multiplies more of the 4-bit weights as they are stored on the smaller card."""
    job: dict[str, Any] = {"method": "qlora", "r": 8, **UNLIKE}
    alone = [peftplan.estimate("llama-3.2-1b", gpu=card, **job) for card in (FEW, MANY)]
    of_few, of_many = (estimate.peaks for estimate in alone)
    assert of_few is not None
    assert of_many is not None
    assert of_few.reserved != of_many.reserved
    both = peftplan.estimate("llama-3.2-1b", gpu=[FEW, MANY], **job)
    assert [verdict.needed_bytes for verdict in both.gpus] == [estimate.gpus[0].needed_bytes for estimate in alone]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_peaks_that_tell_the_fullest_gpu_are_not_computed_again(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inventories: list[Inventory] = []
    peaks_of = engine.peaks_of_one

    def counting(inventory: Inventory, compute_capability: str, known: engine.Known) -> Any:
        inventories.append(inventory)
        return peaks_of(inventory, compute_capability, known)

    monkeypatch.setattr(engine, "peaks_of_one", counting)
    peftplan.estimate("llama-3.2-1b", method=method, gpu=FEW, **UNLIKE | {"gpus": 3})
    holdings = [id(inventory.holding) for inventory in inventories]
    assert len(holdings) == len(set(holdings)) == (2 if method == "full" else 1)

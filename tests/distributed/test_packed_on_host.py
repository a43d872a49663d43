"""4-bit weights that are packed on the host, of which FSDP2 moves a unit at a time to the card (`device_map="cpu"`)."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import PeftplanError
from tools.rank_jobs import compared, rows

PACKED: dict[str, Any] = {"method": "qlora", "gpus": 2, "strategy": "fsdp2", "quant_storage": "bf16", "device_map": "cpu"}
REHEARSED = [row for row in rows() if row["program"].get("device_map") == "cpu"]


@pytest.mark.parametrize("row", REHEARSED, ids=lambda row: row["name"])
def test_a_rank_loads_one_unit_at_a_time(row: dict[str, Any]) -> None:
    shares = compared(row)
    assert shares is not None
    assert (shares["load"], shares["reserved"]) == (0, 0)
    assert max(map(abs, shares.values())) < 0.0003


def test_ranks_of_a_node_pack_a_model_each() -> None:
    host = peftplan.estimate("llama-3.2-1b", **PACKED).to_dict()["host"]
    assert host["per_node"]["loading"] == 2 * host["loading"]["bytes"] > 1.5e9
    assert "quantized there" in host["loading"]["how"]


def test_70b_on_two_small_cards_is_proposed_with_its_weights_on_the_host() -> None:
    job = {"method": "qlora", "gpu": "2xrtx-4090", "strategy": "fsdp2"}
    first = peftplan.estimate("llama-3-70b", advice="best", **job).advice["rtx-4090"].changes[0]
    assert first.options == {"offload_params": "cpu", "quant_storage": "bf16", "device_map": "cpu"}
    assert first.verdict == "fits"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"strategy": "fsdp1"}, "device_map: accelerate .* refuses a quantized model on the host under FSDP1"),
        ({"quant_storage": "uint8"}, "stored as whole numbers on the host; add --quant-storage bf16"),
        ({"strategy": "ddp"}, "accepted: none under a strategy, or cpu for 4-bit weights under fsdp2"),
        ({"method": "lora", "quant_storage": None}, "accepted: none under a strategy, or cpu for 4-bit weights under fsdp2"),
        ({"gpus": None, "strategy": None, "quant_storage": None}, "accepted on one GPU: none, auto, cuda"),
    ],
)
def test_other_jobs_refuse_it(options: dict[str, Any], line: str) -> None:
    with pytest.raises(PeftplanError, match=line):
        peftplan.estimate("llama-3.2-1b", **{**PACKED, **options})

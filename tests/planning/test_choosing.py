"""The smallest card that takes a job, found without asking all of them."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.planning.choosing import smallest_gpu, which_gpu


@pytest.mark.parametrize(
    "options",
    [
        {"method": "qlora", "seq_len": 512},
        {"method": "full"},
        {"method": "lora", "dtype": "bf16", "batch_size": 64},
        {"method": "full", "gpus": 4, "strategy": "fsdp2"},
        {"method": "lora", "gpus": 2, "strategy": "device-map"},
    ],
    ids=str,
)
@pytest.mark.parametrize("allow_tight", [False, True])
def test_the_smallest_card_is_the_first_of_all(options: dict[str, Any], allow_tight: bool) -> None:
    first = next(iter(which_gpu("llama-3.2-1b", allow_tight=allow_tight, **options)), None)
    assert smallest_gpu("llama-3.2-1b", allow_tight=allow_tight, **options) == first


def test_what_no_card_takes_has_none() -> None:
    assert smallest_gpu("llama-3.2-1b", method="full", batch_size=4096, loss="full") is None

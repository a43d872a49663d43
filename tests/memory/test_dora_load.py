"""DoRA's first norms against loading as it was rehearsed: both engines share `Norm.take`; neither can witness the other."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from tools.rehearsed_jobs import LOOP

SHAPE = {"method": "lora", "use_dora": True, "r": 8, "batch_size": 1, "seq_len": 128, "device_map": "none"}
REHEARSED: dict[str, tuple[dict[str, Any], int]] = {
    "fp16, multiplied as fp32": (
        {"method": "qlora", "dtype": "fp16", "compute_dtype": "fp16", "trainer": "plain", "script": LOOP},
        225_291_776,
    ),
    "8 bits, restored as fp32": ({"quant": "int8", "kbit_prepare": False, "trainer": "transformers"}, 196_648_960),
}
"""Jobs of SmolLM2 135M → the highest level of loading, by `tools.rehearsed_jobs` with the CUDA build of torch 2.13."""


@pytest.mark.parametrize("job", REHEARSED)
def test_loading_holds_what_was_rehearsed(job: str) -> None:
    options, rehearsed = REHEARSED[job]
    assert estimate("smollm2-135m", **{**SHAPE, **options}).to_dict()["memory"]["peak_by_phase"]["load"] == rehearsed

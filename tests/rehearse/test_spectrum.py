"""Only the parameters that Spectrum's file names train: SFTTrainer on the emulated card (sft_spectrum.py, trl 1.16).

A row has the first layers of Llama 3.1 8B, two rows of so many tokens in two micro batches, and what was held.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.job.configs.read import read_values
from tools.rank_grid import cut
from tools.rehearsed_jobs import read

PATTERNS = "configs/spectrum/snr_results_meta-llama-Meta-Llama-3.1-8B_unfrozenparameters_30percent.yaml"


@pytest.mark.parametrize("row", read(Path(__file__).with_name("spectrum.jsonl")), ids=lambda row: f"liger={row['liger']}")
def test_formulas_hold_what_the_program_holds(row: dict[str, Any]) -> None:
    values = {"model_name_or_path": "meta-llama/Llama-3.1-8B", "dtype": "bfloat16", "spectrum_config_path": PATTERNS}
    values |= {"max_length": row["length"], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plan = read_values(values | {"use_liger_kernel": row["liger"], "use_reentrant": False}, file="a.yaml", tool="trl")
    options = {**plan.options, "use_reentrant": False, "device_map": "none"}  # the program loads on the host
    peaks = peftplan.estimate(cut("llama-3.1-8b", row["layers"]), **options).peaks
    assert peaks is not None
    assert peaks.reserved == pytest.approx(row["reserved"], rel=1e-3)
    assert peaks.allocated == pytest.approx(row["allocated"], rel=1e-5)
    assert peaks.by_phase == {phase: pytest.approx(nbytes, rel=5e-5) for phase, nbytes in row["by_phase"].items()}

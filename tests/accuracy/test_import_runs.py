"""How a published row becomes a record: units, what is taken as said, and what no setup describes."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from peftplan.accuracy.engines import read_cases
from peftplan.datafiles import DATA


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("import_runs", DATA.parent / "tools" / "import_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["import_runs"] = module
    spec.loader.exec_module(module)
    return module


FMS: dict[str, Any] = {
    "id": "x1",
    "source": "fms-acceleration benchmark refs",
    "licence": "Apache-2.0",
    "outcome": "ok",
    "model": "mistralai/Mistral-7B-v0.1",
    "method": "qlora",
    "peft": {"r": 16.0, "alpha": 16.0, "dropout": 0.1, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "c_attn"]},
    "base_dtype": "float16",
    "amp": "fp16",
    "grad_ckpt": True,
    "micro_batch": 4,
    "grad_accum": 1,
    "seq_len": 4096,
    "gpu": "NVIDIA A100 80GB",
    "n_gpus": 1,
    "value": 21229000000.0,
    "unit": "bytes",
    "value_bytes": 21229000000,
    "extra": {"framework_config": "baseline-peft-bnb", "nvidia_smi_peak_MiB_minus_first_sample": 100.0},
}


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (9.69, "GB(1e9)", 10_000_000),
        (51.6, "GB(1e9)", 100_000_000),
        (14949, "MiB", 2**20),
        (3.0324, "GiB", 107_374),
        (5.0, "bytes", 1),
    ],
)
def test_the_last_digit_in_bytes(tool: ModuleType, value: float, unit: str, expected: int) -> None:
    assert tool.rounding(value, unit) == expected


def test_who_prepared_the_quantized_base_is_read_from_the_configuration(tool: ModuleType) -> None:
    """TRL of that time called prepare_model_for_kbit_training; the accelerated plugin does not upcast."""
    baseline = tool.fms(FMS)
    accelerated = tool.fms({**FMS, "extra": {"framework_config": "accelerated-peft-bnb"}})
    assert (baseline.run.options["kbit_prepare"], accelerated.run.options["kbit_prepare"]) == (True, False)
    assert baseline.run.method_config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (baseline.run.options["dtype"], baseline.run.options["autocast"]) == ("fp16", "fp16")
    assert baseline.peaks.device_bytes == 100 * 2**20
    assert accelerated.peaks.device_bytes is None
    assert baseline.circumstances.gpu_id == "a100-80gb"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kernels": "fms fused-ops-and-kernels"}, "fused kernels"),
        ({"model": "mistralai/Mixtral-8x7B-Instruct-v0.1"}, "experts are fused parameters"),
        ({"seq_len": None}, "length of the sequences is not recorded"),
        ({"base_dtype": None}, "dtype of the base is not recorded"),
        ({"source": "litgpt config_hub"}, "litgpt's own model code"),
    ],
)
def test_what_no_setup_describes_says_why(tool: ModuleType, change: dict[str, Any], why: str) -> None:
    files, reasons = tool.convert([{**FMS, **change}], [])
    assert list(files) == ["not_expressible"]
    assert why in files["not_expressible"][0]
    assert sum(reasons.values()) == 1


def test_the_shipped_records_keep_what_their_sources_measured() -> None:
    """Hand-copied from the sources: bytes of one run each."""
    found = {case.record.id: case.record.peaks for case in read_cases([])}
    assert found["pk00008"].overall.allocated == 72_434_837_504
    assert found["pk01155"].by_phase["backward"].allocated == int(6838.541015625 * 2**20)
    assert found["peft/adalora/llama-3.2-3B-rank32"].overall.reserved == 22_781_362_176
    assert (found["pk01702"].device_bytes, found["pk01702"].context_bytes) == (14949 * 2**20, 1343 * 2**20)
    assert found["pk02320"].overall.reserved == 5_370_000_000
    assert found["pk01871"].overall.reserved == round(66.72 * 2**30)

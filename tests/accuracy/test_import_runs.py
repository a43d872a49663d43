"""How a published row becomes a record: units, what is taken as said, and what no setup describes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from peftplan.accuracy.engines import read_cases
from tools.import_runs import fitcheck, projects, rows, vramcalc
from tools.import_runs.__main__ import convert

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
def test_the_last_digit_in_bytes(value: float, unit: str, expected: int) -> None:
    assert rows.rounding(value, unit) == expected


def test_who_prepared_the_quantized_base_is_read_from_the_configuration() -> None:
    """TRL of that time called prepare_model_for_kbit_training; the accelerated plugin does not upcast."""
    baseline = projects.fms(FMS)
    accelerated = projects.fms({**FMS, "extra": {"framework_config": "accelerated-peft-bnb"}})
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
def test_what_no_setup_describes_says_why(change: dict[str, Any], why: str) -> None:
    files, reasons = convert([{**FMS, **change}], [])
    assert list(files) == ["not_expressible"]
    assert why in files["not_expressible"][0]
    assert sum(reasons.values()) == 1


def test_the_shipped_records_keep_what_their_sources_measured() -> None:
    """Hand-copied from the sources: bytes of one run each."""
    peaks = {case.record.id: case.record.peaks for case in read_cases([])}
    assert peaks["pk00008"].overall.allocated == 72_434_837_504
    assert peaks["pk01155"].by_phase["backward"].allocated == int(6838.541015625 * 2**20)
    assert peaks["peft/adalora/llama-3.2-3B-rank32"].overall.reserved == 22_781_362_176
    assert (peaks["pk01702"].device_bytes, peaks["pk01702"].context_bytes) == (14949 * 2**20, 1343 * 2**20)
    assert peaks["pk02320"].overall.reserved == 5_370_000_000
    assert peaks["pk01871"].overall.reserved == round(66.72 * 2**30)


IDENTITY: dict[str, Any] = {
    "model_id": "deepseek-ai/deepseek-coder-1.3b-instruct",
    "quantization": "nf4",
    "lora_rank": 16,
    "lora_targets": ["q_proj", "v_proj"],
    "grad_checkpoint": True,
    "batch_size": 4,
    "seq_len": 1024,
}
MEASURED = {"peak_allocated_mib": 2070.0, "peak_reserved_mib": 2126.0, "cuda_context_mib": 141.0, "process_mib": 2267.0}


@pytest.fixture
def archive(
    tmp_path: Path,
) -> Path:
    """One run per session, and one at a ceiling that ran out of memory."""
    folder = tmp_path / "data" / "measurements"
    (folder / "incoming").mkdir(parents=True)
    sessions = {
        session: {
            "measured_on": session[3:],
            "torch": "2.10.0+cu128",
            "transformers": "5.0.0",
            "peft": "0.19.1",
            "bitsandbytes": None,
        }
        for session in fitcheck.ARCHIVE.values()
    }
    (folder / "manifest.json").write_text(json.dumps({"sessions": sessions}))
    run = {"model_id": "meta-llama/Llama-3.2-1B", "measured": MEASURED, "run": {**IDENTITY, "attn_impl": "eager"}}
    for name in fitcheck.ARCHIVE:
        (folder / f"{name}.json").write_text(json.dumps({"runs": [{**run, "run": {**run["run"], "model_id": run["model_id"]}}]}))
    texts = [
        "File measure.py, line 818, in measure",
        "torch.OutOfMemoryError: Tried to allocate 2.94 GiB. If reserved but unallocated",
    ]
    failed = {"registered": {"identity": {**IDENTITY, "kernel": "flash", "role": "ceiling-oom"}}, "stderr_tail": texts}
    with zipfile.ZipFile(folder / "incoming" / fitcheck.CEILINGS, "w") as ceilings:
        ceilings.writestr("final/abc.json", json.dumps(failed))
        ceilings.writestr("final/predictions.json", "[]")
    return tmp_path


def test_runs_of_an_archive_that_the_rows_do_not_list(archive: Path) -> None:
    listed = {"data/measurements/t4-sweep-2026-09-15.json#runs[0]"}
    records = [fitcheck.fitcheck(row) for row in fitcheck.archived(archive, listed)]
    one_by_one, _, _, failed = records
    assert [record.id for record in records] == [
        "fitcheck/t4-qlora-2026-09-01/0", "fitcheck/t4-phase3-2026-09-16/0", "fitcheck/final-t4-20260921/0", "fitcheck/final/abc",
    ]  # fmt: skip
    assert [bool(record.differs) for record in records] == [False, True, True, True]
    assert (one_by_one.run.script.transformers, one_by_one.circumstances.versions["transformers"]) == ("5.16.1", "5.0.0")
    assert (one_by_one.peaks.overall.reserved, one_by_one.peaks.device_bytes) == (2126 * 2**20, 2267 * 2**20)
    assert one_by_one.peaks.by_phase == {}  # that session printed none
    assert (failed.outcome, failed.error) == ("oom", "torch.OutOfMemoryError: Tried to allocate 2.94 GiB.")
    assert failed.note == "in the warm step"
    assert failed.run.options["attn_implementation"] == "sdpa"
    assert failed.run.model_name == IDENTITY["model_id"]


def test_a_run_of_vramcalcs_benchmark(tmp_path: Path) -> None:
    """Autocast loads in fp32; sdpa has a mask of its own; inference is no training step."""
    recorded = {
        "status": "ok", "gpu_name": "NVIDIA RTX A6000", "timestamp": "2026-10-10T14:41:30+00:00",
        "versions": {"torch": "2.14.1+cu130", "transformers": "4.57.6", "peft": "0.21.2"},
        "measured": {"weights": 5, "states": 3, "peak": 2, "total": 10, "overhead": 7},
        "params": {
            "arch": {"name": "Llama-3.2-1B"}, "mode": "train", "dtype": "bf16", "batch": 1, "seq_len": 2048, "lora_rank": 16,
            "grad_checkpoint": True, "precision": "amp", "attn_impl": "sdpa",
        },
    }  # fmt: skip
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results.jsonl").write_text(json.dumps(recorded))
    (row,) = vramcalc.benchmark_rows(tmp_path)
    record = vramcalc.vramcalc(row)
    assert (record.id, record.peaks.overall.allocated, record.peaks.context_bytes) == ("vramcalc/0", 10, 7)
    options = record.run.options
    assert (options["dtype"], options["autocast"], options["padding"], options["keep_gradients"]) == ("fp32", "bf16", True, True)
    assert record.run.method_config["lora_alpha"] == 16
    assert record.run.script.outputs_end_with_backward
    assert record.exact
    with pytest.raises(rows.NotExpressibleError, match="no training step"):
        vramcalc.vramcalc({**row, "mode": "deployment"})

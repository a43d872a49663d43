"""How a published row becomes a record: units, what is taken as said, and what no setup describes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftplan.accuracy.engines import read_cases
from peftplan.datafiles import DATA

TOOLS = DATA.parent / "tools"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("import_runs", TOOLS / "import_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(TOOLS))
        sys.modules["import_runs"] = module
        spec.loader.exec_module(module)
        yield module


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


IDENTITY: dict[str, Any] = {
    "kernel": "eager",
    "quantization": "nf4",
    "double_quant": False,
    "precision": "fp16",
    "lora_rank": 32,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "grad_checkpoint": True,
    "batch_size": 2,
    "seq_len": 1024,
}
SESSION = {
    "measured_on": "2026-09-15",
    "gpu_name": "Tesla T4",
    "torch": "2.14.0+cu130",
    "transformers": "5.17.0",
    "peft": "0.20.0",
    "bitsandbytes": None,
    "cuda_context_mib": 140.875,
}
SWEEP = "t4-sweep-2026-09-15.json"


def shipped(record_id: str) -> dict[str, Any]:
    (found,) = (case.record.payload() for case in read_cases([]) if case.record.id == record_id)
    return found


def archive(folder: Path, runs: list[dict[str, Any]], results: list[dict[str, Any]], **session: Any) -> Path:
    """An archive of one session and one file, in the form of fitcheck-llm's."""
    entries = [
        {"role": "calibration", "session": "t4", "file": SWEEP, "index": at, "model_id": run["model_id"], "identity": run["run"]}
        for at, run in enumerate(runs)
    ]
    manifest = {"sessions": {"t4": {**SESSION, **session}}, "rows": entries}
    named = {"provenance": {"run_id": "the run"}}
    (folder / "validation").mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / SWEEP).write_text(json.dumps({**named, "runs": runs}))
    (folder / "validation" / "verdicts.json").write_text(json.dumps({**named, "results": results}))
    return folder


def in_archive(model: str = "Qwen/Qwen2.5-1.5B-Instruct", *, measured: dict[str, Any] | None = None) -> dict[str, Any]:
    """The first run of the sweep, which is pk01155."""
    read = {**shipped("pk01155")["steps"][0], "sdpa_backend": "n/a (not sdpa)", "weight_breakdown": {"nf4_packed": 624.75}}
    return {"model_id": model, "run": deepcopy(IDENTITY), "measured": {**read, **(measured or {})}}


def imported(tool: ModuleType, folder: Path, known: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    files, _ = tool.convert([], [], tool.archived(folder, known))
    return [json.loads(line) for name in sorted(files) for line in files[name]]


def test_a_row_of_the_archive_is_the_record_that_its_copy_made(tool: ModuleType, tmp_path: Path) -> None:
    (found,) = imported(tool, archive(tmp_path, [in_archive()], []))
    kept = {name: value for name, value in found.items() if name not in ("id", "digest")}
    assert kept == {name: value for name, value in shipped("pk01155").items() if name != "id"}
    assert found["id"] == "fitcheck/t4/0"
    assert imported(tool, tmp_path, (f"data/measurements/{SWEEP}#runs[0]",)) == []


def test_what_was_measured_again_is_one_record(tool: ModuleType, tmp_path: Path) -> None:
    """And says so; loaded by threads, a quantized base says that too."""
    again = in_archive(measured={"peak_reserved_mib": 7536.0})
    (found,) = imported(tool, archive(tmp_path, [in_archive(), again], [], transformers="5.0.0"))
    assert found["peaks"]["overall"]["reserved"] == 7548 * 2**20
    assert found["note"].endswith("are not the same twice. Measured 2 times: reserved 7548, 7536 MiB; allocated the same.")
    assert "four threads" in found["note"]


def test_a_model_without_facts_is_left_out_with_its_reason(tool: ModuleType, tmp_path: Path) -> None:
    (found,) = imported(tool, archive(tmp_path, [in_archive("somebody/a-model-of-their-own")], []))
    assert found["why"] == "the config of the model is not among the published facts"


def test_verdicts_of_the_archive(tool: ModuleType, tmp_path: Path) -> None:
    """One run that went well, of which the process's bytes are known, and one that ran out of memory."""
    identity = {**IDENTITY, "model_id": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "kernel": "flash"}
    results = [
        {"row_id": "a", "identity": identity, "outcome": "completed", "measured_process_mib": 100.875},
        {"row_id": "b", "identity": {**identity, "batch_size": 64}, "outcome": "oom", "measured_process_mib": None},
    ]
    good, bad = imported(tool, archive(tmp_path, [in_archive()], results), (f"data/measurements/{SWEEP}#runs[0]",))
    assert (good["id"], good["outcome"], good["peaks"]["device_bytes"]) == ("fitcheck/t4/a", "ok", int(100.875 * 2**20))
    assert (bad["id"], bad["outcome"]) == ("fitcheck/t4/b", "oom")
    assert bad["peaks"] == {"context_bytes": int(140.875 * 2**20)}
    assert bad["run"]["script"] == {"repeats_kv": True}
    assert bad["circumstances"]["path"] == "data/measurements/validation/verdicts.json#results[1]"

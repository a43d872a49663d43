"""What the rows of all sources share: options, circumstances, units, and a record of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftplan.accuracy.records import Record
from peftplan.job.trainers import TRAINERS
from peftplan.units import GB, GIB, MIB

Row = dict[str, Any]
Options = dict[str, Any]

UNITS = {"bytes": 1, "MiB": MIB, "GiB": GIB, "GB(1e9)": GB}
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "bf16": "bf16"}
GPU_IDS = {
    "Tesla T4": "t4",
    "NVIDIA A100 80GB": "a100-80gb",
    "NVIDIA A100 80GB (docs say A100)": "a100-80gb",
    "NVIDIA GeForce RTX 4080 (Windows 11, display attached)": "rtx-4080",
    "Tesla V100 16GB": "v100-16gb",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX A6000": "rtx-a6000",
    "RTX 3090 24GB": "rtx-3090",
    "RTX 4090 24GB": "rtx-4090",
}
"""Cards that the sources name beyond doubt."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOLERANCE = {
    "analytic": {"allocated": 4.0, "phases": 5.0, "reserved": 3.0, "device": 2.0},
    "trace": {"allocated": 1.5, "phases": 1.5, "reserved": 3.0, "device": 2.0},
}
"""Percent, for runs that state everything that ran."""
UNSTATED = {"torch": "2.4", "transformers": "4.40"}
"""The stack that rows are asked with which do not say theirs: one of 2024, as most are. Each leaves something open anyway."""

OF_JUNE_2024 = {"bitsandbytes": "0.43.1"}
"""The newest there was before July 2024: rows of fms-acceleration that do not say theirs are older."""


class NotExpressibleError(Exception):
    """A row that no setup describes; the message says why."""


def rounding(value: float, unit: str) -> int:
    """The last printed digit in bytes: 9.69 GB has 0.01 GB."""
    decimals = len(repr(value).partition(".")[2]) if isinstance(value, float) and not value.is_integer() else 0
    return int(UNITS[unit] / 10**decimals)


def options(trainer: str, row: Row, **changes: Any) -> Options:
    """Every option of a row: what the trainer presets, what the row says, and `changes` on top."""
    chosen: Options = {
        **TRAINERS[trainer].defaults._asdict(),
        "trainer": trainer,
        "dtype": DTYPES[row["base_dtype"]],
        "adapter_dtype": "fp32",
        "batch_size": row["micro_batch"],
        "seq_len": row["seq_len"],
        "gradient_accumulation_steps": row.get("grad_accum") or 1,
        "gradient_checkpointing": row["grad_ckpt"],
        "padding": False,
        "keep_gradients": False,
        "kbit_prepare": False,
        **changes,
    }
    return chosen


def circumstances(row: Row) -> Row:
    """Where, with what and by whom."""
    fields = {
        name: row[name] for name in ("gpu", "framework", "commit", "date", "source", "repo", "path", "licence") if row.get(name)
    }
    versions = {name.replace("_", "-"): str(version) for name, version in (row.get("versions") or {}).items()}
    cuda = versions.pop("cuda", None) or (versions.get("torch", "").partition("+cu")[2] or None)
    return {**fields, "gpu_id": GPU_IDS.get(row["gpu"]), "num_gpus": row["n_gpus"], "versions": versions, "cuda": cuda}


def lora(row: Row, targets: object) -> Row:
    """The LoRA part of a run."""
    peft = row["peft"]
    fields = {"r": int(peft["r"]), "lora_alpha": int(peft["alpha"]), "lora_dropout": float(peft["dropout"])}
    return {"method": row["method"], "method_config": {**fields, "target_modules": targets}}


def record(row: Row, run: Row, *, covers: str, peaks: Row, **more: Any) -> Record:
    """A record of a row of PEAKS."""
    counts = {name: row[f"{name}_params"] for name in ("trainable", "total") if row.get(f"{name}_params")}
    peaks = {"rounding_bytes": rounding(row["value"], row["unit"]), **peaks}
    unstated = {package: version for package, version in UNSTATED.items() if package not in (row.get("versions") or {})}
    run = {**run, "script": {**unstated, **run.get("script", {})}}
    fields = {"id": row["id"], "run": run, "circumstances": circumstances(row), "outcome": row["outcome"], "covers": covers}
    fields |= {"peaks": peaks, "counts": counts, "note": row.get("note"), **more}
    return Record.model_validate_json(json.dumps(fields))


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

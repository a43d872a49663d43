"""fitcheck-llm's archive of T4 measurements (`data/measurements` of its source distribution) as rows of `tools/import_runs.py`.

`manifest.json` says which rows there are, in which session each was measured, and with which versions. A setup that was measured
again in its session is one row, the first, with what the others read in its note. Rows that the archive itself excludes were
copied by hand from a notebook and rounded there; they are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peftplan.units import MIB

Row = dict[str, Any]

SOURCE = "fitcheck-llm archived T4 measurements"
FOLDER = "data/measurements"
VERDICTS = "validation"
"""The folder, below, of runs of which only the outcome and the process's bytes are known."""
FRAMEWORK = "HF transformers + PEFT plain loop (scripts/measure.py: >=1 warmup step, then measured step; synthetic batch)"
NOTE = (
    "peak_reserved_mib = torch.cuda.max_memory_reserved; process_mib = reserved + cuda_context_mib (mem_get_info"
    " total-free-reserved). prepare_model_for_kbit_training used for quantised bases (embeddings/norms/lm_head upcast to fp32)."
    " use_reentrant=False."
)
THREADS = (
    "transformers 5.0.0 copied weights to the card in four threads ahead of their quantization (core_model_loading.py,"
    " GLOBAL_WORKERS): the holes that loading left, and reserved bytes with them, are not the same twice."
)
"""Of quantized bases. From 5.17.0 at the latest they are copied one by one."""
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
ATTENTION = {"eager": "eager", "flash": "sdpa"}
"""The archive's kernels: on a T4 its `flash` is torch's memory-efficient kernel."""


def measurements(folder: Path, known: Iterable[str]) -> Iterator[Row]:
    """One row per setup and session that was measured, but for those whose `path` is known."""
    manifest = _read(folder / "manifest.json")
    again: dict[str, list[tuple[Row, Row]]] = {}
    for entry in manifest["rows"]:
        if entry["role"] != "excluded":
            found = _read(folder / entry["file"])["runs"][entry["index"]]
            again.setdefault(_setup(entry), []).append((entry, found))
    have = set(known)
    for of_setup in again.values():
        entry, found = of_setup[0]
        if not have & {_path(one) for one, _ in of_setup}:
            yield _measured(entry, found, manifest["sessions"][entry["session"]], [run["measured"] for _, run in of_setup])


def verdicts(folder: Path) -> Iterator[Row]:
    """One row per run of which the archive says whether it ran out of memory."""
    manifest = _read(folder / "manifest.json")
    for path in sorted((folder / VERDICTS).glob("*.json")):
        found = _read(path)
        session = _session_of(found["provenance"]["run_id"], folder, manifest)
        for at, result in enumerate(found["results"]):
            yield _outcome(result, f"{FOLDER}/{VERDICTS}/{path.name}#results[{at}]", session, manifest["sessions"][session])


def _read(path: Path) -> Row:
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return found


def _setup(entry: Row) -> str:
    """What two measurements of one setup in one session have in common."""
    return json.dumps([entry["session"], entry["model_id"], entry["identity"]], sort_keys=True)


def _path(entry: Row) -> str:
    return f"{FOLDER}/{entry['file']}#runs[{entry['index']}]"


def _session_of(run_id: str, folder: Path, manifest: Row) -> str:
    """The session of the measurements that came out of the same run of the archive's programs."""
    files = {entry["file"]: entry["session"] for entry in manifest["rows"]}
    (session,) = {files[name] for name in files if (_read(folder / name).get("provenance") or {}).get("run_id") == run_id}
    return str(session)


def _circumstances(run: Row, session: Row, model: str) -> Row:
    """What rows of both kinds say: the setup, where it ran and with what. `run`: the archive's own words for a setup."""
    four_bit = run["quantization"] == "nf4"
    versions = {name: session[name] for name in ("torch", "transformers", "peft", "bitsandbytes") if session[name]}
    rank = run["lora_rank"]
    return {
        "source": SOURCE,
        "repo": "pypi:fitcheck-llm 0.3.1 sdist",
        "licence": "MIT",
        "date": session["measured_on"],
        "framework": FRAMEWORK,
        "gpu": session["gpu_name"],
        "n_gpus": 1,
        "versions": versions,
        "model": model,
        "method": "qlora" if four_bit else "lora",
        "peft": {"r": rank, "alpha": 2 * rank, "dropout": 0.0, "targets": run["lora_targets"]},
        "base_dtype": DTYPES[run["precision"]],
        "double_quant": run.get("double_quant", False),
        "micro_batch": run["batch_size"],
        "grad_accum": 1,
        "seq_len": run["seq_len"],
        "grad_ckpt": run["grad_checkpoint"],
        "attn": ATTENTION[run["kernel"]],
        "unit": "MiB",
        "note": f"{NOTE} {THREADS}" if four_bit and session["transformers"] == "5.0.0" else NOTE,
    }


def _measured(entry: Row, found: Row, session: Row, repeats: list[Row]) -> Row:
    measured, row = found["measured"], _circumstances(found["run"], session, found["model_id"])
    again = f" {_repeated(repeats)}" if len(repeats) > 1 else ""
    return {
        **row,
        "id": f"fitcheck/{entry['session']}/{entry['index']}",
        "path": _path(entry),
        "outcome": "ok",
        "metric_class": "peak_allocated",
        "trainable_params": measured["trainable_params"],
        "total_params": measured["total_params"],
        "value": measured["peak_allocated_mib"],
        "value_bytes": int(measured["peak_allocated_mib"] * MIB),
        "extra": measured,
        "note": row["note"] + again,
    }


def _repeated(repeats: list[Row]) -> str:
    """What each measurement of one setup read: `Measured 3 times: reserved 6996, 6984, 6996 MiB; allocated the same.`"""
    parts = []
    for name in ("reserved", "allocated"):
        read = [run[f"peak_{name}_mib"] for run in repeats]
        parts.append(f"{name} the same" if len(set(read)) == 1 else f"{name} {', '.join(f'{mib:g}' for mib in read)} MiB")
    return f"Measured {len(repeats)} times: {'; '.join(parts)}."


def _outcome(result: Row, path: str, session_name: str, session: Row) -> Row:
    identity, process = result["identity"], result["measured_process_mib"]
    return {
        **_circumstances(identity, session, identity["model_id"]),
        "id": f"fitcheck/{session_name}/{result['row_id']}",
        "path": path,
        "outcome": {"completed": "ok", "oom": "oom"}[result["outcome"]],
        "metric_class": "device",
        "value": process or 0,
        "value_bytes": None if process is None else int(process * MIB),
        "extra": {"cuda_context_mib": session["cuda_context_mib"]},
    }

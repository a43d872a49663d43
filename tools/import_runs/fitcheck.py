"""fitcheck-llm's T4 runs: those that PEAKS lists, and all others in the archive of its source distribution."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from peftplan.accuracy.records import Record
from peftplan.units import MIB
from tools.import_runs.rows import TOLERANCE, Row, lora, options, record

NOT_BUILT_IN = {
    "deepseek-ai/deepseek-coder-1.3b-instruct": {
        "_name_or_path": "deepseek-ai/deepseek-coder-1.3b-instruct",
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 32256,
        "tie_word_embeddings": False,
    }
}
"""Models of fitcheck-llm's runs that peftplan does not know by name, as its archive describes them."""
TOLERANCE_IN_THREADS = {
    "analytic": {"allocated": 4.0, "phases": 5.0},
    "trace": {"allocated": 1.5, "phases": 1.5, "reserved": 10.0},
}
"""Of runs that loaded in threads: what they reserve differs from run to run (`IN_THREADS`)."""
UNBOUNDED = ("fitcheck/t4-phase3-2026-09-16/4", "fitcheck/final-t4-20260921/5", "fitcheck/final-t4-20260921-133520/d043f8d89d19")
"""Those of which what they reserved is further off than that: +15, -13 and -11 %."""
OLDER = {"torch": "2.10.0", "transformers": "5.0.0"}
"""The stack of fitcheck-llm's rows, also of those labelled 2.14.0: they reserve what 2.10.0 does, and 2.14.0 does not."""
MISLABELLED = {
    "what": "ran with torch 2.10.0 and transformers 5.0.0, not with the 2.14.0 and 5.17.0 of its label (docs/trace-drift.md)",
    "evidence": "measured bytes",
}
IN_THREADS = (
    "transformers 5.0.0 copies weights to the card in threads while others are quantized, so that one setup reserves other bytes "
    "in every run (docs/trace-drift.md)"
)
ONE_BY_ONE = "2026-09-01"
"""The day of the one session whose weights were not copied in threads."""
UPGRADED = {**OLDER, "transformers": "5.16.1"}
"""Its notebook (fitcheck.ipynb in the sdist of 0.3.0) first installs the newest transformers: a wheel of 12.1 MB."""
COPIED_ONE_BY_ONE = {
    "what": "ran with transformers 5.16.1, which copies weights one by one, not with its label's 5.0.0 (docs/trace-drift.md)",
    "evidence": "files of the source",
}
ARCHIVE = {
    "t4-qlora-2026-09-01": "t4-2026-09-01",
    "t4-sweep-2026-09-15": "t4-2026-09-15",
    "t4-phase3-2026-09-16": "t4-2026-09-16",
    "final-t4-20260921": "t4-2026-09-21",
}
"""Files of fitcheck-llm's archive → the session in its manifest, which has the versions."""
RAN_OUT = {"line 818, in measure": "in the warm step", "line 835, in measure": "in the measured step, with optimizer states"}
"""Where memory ran out, by the call in that session's scripts/measure.py."""
CEILINGS = "final-t4-20260921-133520.zip"
"""The runs of its last session at the largest batch that it expected to fit, and at the next one."""


def fitcheck(row: Row) -> Record:
    """fitcheck-llm's T4 runs: a plain loop, peaks by phase of a steady step (scripts/measure.py of its source distribution)."""
    extra = row["extra"]
    four_bit = row["method"] == "qlora"
    quant = {"quant": "nf4", "double_quant": row["double_quant"], "compute_dtype": "fp16"} if four_bit else {}
    set_here = {"attn_implementation": row["attn"], "use_cache": False, "kbit_prepare": four_bit, **quant}
    names = {"forward": "peak_forward_mib", "backward": "peak_backward_mib", "step": "peak_optimizer_mib"}
    in_threads = four_bit and row["date"] != ONE_BY_ONE
    tolerance = TOLERANCE_IN_THREADS if in_threads else TOLERANCE
    if row["id"] in UNBOUNDED:
        tolerance = {
            engine: {name: bound for name, bound in of.items() if name != "reserved"} for engine, of in tolerance.items()
        }
    inferred = [
        *([MISLABELLED] if "2.14" in row["versions"]["torch"] else []),
        *([COPIED_ONE_BY_ONE] if row["date"] == ONE_BY_ONE else []),
    ]
    return record(
        row,
        {
            "model": row["model"],
            **lora(row, row["peft"]["targets"]),
            "options": options("plain", row, **set_here),
            "script": {"repeats_kv": row["attn"] == "sdpa", **(UPGRADED if row["date"] == ONE_BY_ONE else OLDER)},
        },
        covers="steady-step",
        peaks={
            "by_phase": {phase: {"allocated": int(extra[name] * MIB)} for phase, name in names.items() if name in extra},
            "overall": {"allocated": row["value_bytes"], "reserved": int(extra["peak_reserved_mib"] * MIB)},
            "device_bytes": int(extra["process_mib"] * MIB),
            "context_bytes": int(extra["cuda_context_mib"] * MIB),
            "rounding_bytes": MIB if row["date"] == ONE_BY_ONE else 0,
        }
        if extra
        else {},
        kept_alive=["outputs"],
        steps=[{name: value for name, value in extra.items() if isinstance(value, (int, float))}] if extra else [],
        tolerance=tolerance,
        differs=[IN_THREADS] if in_threads else [],
        error=row.get("error"),
        inferred=inferred,
        note=row.get("note"),
    )


def archived(source: Path, listed: set[str]) -> Iterator[Row]:
    """The runs of fitcheck-llm's archive that PEAKS does not list, in its form: of its four sessions, and at the batch sizes
    around the one at which it expected memory to run out."""
    folder = source / "data" / "measurements"
    sessions = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sessions"]
    for name, session in ARCHIVE.items():
        session_row, path = sessions[session], f"data/measurements/{name}.json"
        for number, run in enumerate(json.loads((source / path).read_text(encoding="utf-8"))["runs"]):
            if f"{path}#runs[{number}]" not in listed:
                yield archived_row(run, session_row, run["run"], f"fitcheck/{name}/{number}", f"{path}#runs[{number}]")
    with zipfile.ZipFile(folder / "incoming" / CEILINGS) as ceilings:
        for name in sorted(ceilings.namelist()):
            run = json.loads(ceilings.read(name))
            registered = run["registered"]["identity"] if isinstance(run, dict) and "registered" in run else {}
            if registered.get("role", "").startswith("ceiling"):
                attention = {"flash": "sdpa"}.get(registered["kernel"], registered["kernel"])
                ident = f"fitcheck/{Path(name).parent.name}/{Path(name).stem}"
                path = f"data/measurements/incoming/{CEILINGS}#{name}"
                yield archived_row(run, sessions["t4-2026-09-21"], {"attn_impl": attention, **registered}, ident, path)


def archived_row(run: Row, session: Row, setup: Row, ident: str, path: str) -> Row:
    """One of them. `setup`: its `run` block, or of a run that failed what was registered before."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    measured = run.get("measured", {})
    four_bit = setup["quantization"] == "nf4"
    model = setup.get("model_id") or run["model_id"]
    return {
        "id": ident,
        "source": "fitcheck-llm archived T4 measurements",
        "repo": "pypi:fitcheck-llm 0.3.1 sdist",
        "path": path,
        "licence": "MIT",
        "date": session["measured_on"],
        "outcome": "ok" if measured else "oom",
        "error": None if measured else run["stderr_tail"][-1].partition(" If reserved but")[0],
        "note": None if measured else next(note for line, note in RAN_OUT.items() if line in run["stderr_tail"][0]),
        "model": NOT_BUILT_IN.get(model, model),
        "method": "qlora" if four_bit else "lora",
        "peft": {"r": setup["lora_rank"], "alpha": 2 * setup["lora_rank"], "dropout": 0.0, "targets": setup["lora_targets"]},
        "base_dtype": "float16",
        "double_quant": False,
        "grad_ckpt": setup["grad_checkpoint"],
        "attn": setup["attn_impl"],
        "micro_batch": setup["batch_size"],
        "seq_len": setup["seq_len"],
        "gpu": "Tesla T4",
        "n_gpus": 1,
        "framework": "HF transformers + PEFT plain loop (scripts/measure.py)",
        "versions": {name: session[name] for name in packages if session[name]},
        "trainable_params": measured.get("trainable_params"),
        "total_params": measured.get("total_params"),
        "value": measured.get("peak_allocated_mib", 0),
        "unit": "MiB",
        "value_bytes": int(measured.get("peak_allocated_mib", 0) * MIB),
        "extra": measured,
    }

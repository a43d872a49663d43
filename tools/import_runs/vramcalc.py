"""vramcalc's runs on an RTX A6000: benchmarks/results.jsonl of its source distribution."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from peftplan.accuracy.records import Record
from tools.import_runs.rows import ATTENTION, NotExpressibleError, Row, lora, options, record

VRAMCALC_MODELS = {
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "meta-Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B",
}
"""Names in vramcalc's benchmark, whose shapes are those of these repositories."""
OWN_MASK = (
    "padding stands for a mask that is made though nothing is hidden: transformers 4.55 to 4.57 takes a batch without one for "
    "packed sequences where nothing is cached (masking_utils.py, `find_packed_sequence_indices`)"
)


def vramcalc(row: Row) -> Record:
    """vramcalc's benchmark (src/vramcalc/bench.py): a plain loop that frees outputs after backward and zeroes gradients in place;
    peaks of three steps after one, each with an emptied cache."""
    if row["mode"] != "train":
        raise NotExpressibleError("inference: no training step")
    mixed = row["precision"] == "amp"
    masked = row["attn_impl"] == "sdpa"
    base = {"base_dtype": "float32" if mixed else row["dtype"], "micro_batch": row["batch"], "seq_len": row["seq_len"]}
    set_here = {
        "autocast": row["dtype"] if mixed else "none",
        "attn_implementation": row["attn_impl"],
        "use_cache": False,
        "padding": masked,
        "keep_outputs": True,
        "keep_gradients": True,
    }
    adapter = (
        {"peft": {"r": row["lora_rank"], "alpha": row["lora_rank"], "dropout": 0.0}, "method": "lora"}
        if row["lora_rank"]
        else None
    )
    return record(
        row,
        {
            "model": row["model"],
            **(lora(adapter, ATTENTION) if adapter else {"method": "full"}),
            "options": options("plain", {**base, "grad_ckpt": row["grad_checkpoint"]}, **set_here),
            "script": {"outputs_end_with_backward": True, "empties_cache": True},
        },
        covers="steady-step",
        peaks={"overall": {"allocated": row["value"]}, "context_bytes": row["overhead"], "rounding_bytes": 0},
        kept_alive=["outputs, until backward ends", "gradients"],
        tolerance={"analytic": {"allocated": 1.0}, "trace": {"allocated": 0.3}},
        note=OWN_MASK if masked else None,
    )


def benchmark_rows(source: Path) -> Iterator[Row]:
    """The lines of vramcalc's benchmarks/results.jsonl, flat."""
    path = "benchmarks/results.jsonl"
    for number, line in enumerate((source / path).read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        model = row["params"]["arch"]["name"]
        yield {
            **row["params"],
            "id": f"vramcalc/{number}",
            "source": "vramcalc benchmark",
            "repo": "pypi:vramcalc 0.1.2 sdist",
            "path": f"{path}#{number}",
            "licence": "MIT",
            "date": row["timestamp"].partition("T")[0],
            "outcome": row["status"],
            "model": VRAMCALC_MODELS.get(model, model),
            "method": "lora" if row["params"]["lora_rank"] else "full",
            "gpu": row["gpu_name"],
            "n_gpus": 1,
            "framework": "HF transformers + PEFT plain loop (src/vramcalc/bench.py)",
            "versions": row["versions"],
            "value": row["measured"]["total"],
            "unit": "bytes",
            "value_bytes": row["measured"]["total"],
            "overhead": row["measured"]["overhead"],
        }

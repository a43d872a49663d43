"""peft's benchmark: one run per method."""

from __future__ import annotations

import json

from peftplan.accuracy.records import Record
from peftplan.job.trainers import TRAINERS
from tools.import_runs.rows import DTYPES, GPU_IDS, Row

BEFORE, LONGEST = 104, 690
"""Lengths of the longest padded batch of peft's benchmark and of the one before it: not recorded, chosen once by two of its rows
(docs/trace-drift.md)."""
AGAIN = (
    "whether adapters are enabled again before the first step: assumed, as LoRA-FA's run reserved on average what LoRA's did "
    "(14.37 and 14.40 GB), and as its trainable parameters were counted with A frozen"
)
"""Of peft's benchmark; it changes LoRA-FA alone."""
LENGTHS_CHOSEN = f"{LONGEST} tokens in the longest padded batch, after {BEFORE}: chosen by the rows of LoRA and IA3, for all"
AGAIN_CHOSEN = "adapters are enabled again before the first step: chosen by the average that this run reserved, near LoRA's"


def metamath(row: Row) -> Record:
    """peft's benchmark: a plain loop, `max_memory_reserved` of the whole run, evaluation by generation included."""
    adapter = row["adapter_config"]
    lora_fa = {"method": "lora-fa"} if row["experiment"].endswith("lorafa") else {}
    run = {"method": "full"} if adapter is None else {**lora_fa, "peft_config": adapter}
    set_here = {
        **TRAINERS["plain"].defaults._asdict(),
        "trainer": "plain",
        "dtype": DTYPES[row["dtype"]],
        "adapter_dtype": "fp32" if row["autocast_adapter_dtype"] else DTYPES[row["dtype"]],
        "batch_size": row["batch_size"],
        "seq_len": LONGEST,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": row["gradient_checkpointing"],
        "attn_implementation": row["attn_implementation"] or "sdpa",
        "padding": True,
        "keep_gradients": False,
        "kbit_prepare": False,
        "use_cache": True,
    }
    script = {"earlier_seq_lens": [BEFORE], "outputs_outlive_step": True, "empties_cache": True}
    script |= {"enables_adapters_again": True} if adapter is not None else {}
    fields = {
        "id": f"peft/{row['experiment']}",
        "run": {"model": row["base_model"], **run, "options": set_here, "script": script},
        "circumstances": {
            "gpu": row["gpu"],
            "gpu_id": GPU_IDS[row["gpu"]],
            "versions": {name: row[name] for name in ("torch", "transformers", "peft")},
            "cuda": row["torch"].partition("+cu")[2],
            "framework": "a plain loop (method_comparison/MetaMathQA/run.py)",
            "source": "peft benchmark",
            "repo": "huggingface/peft",
            "path": row["source"].removeprefix("huggingface/peft "),
            "licence": "Apache-2.0",
        },
        "outcome": "ok",
        "covers": "whole-run",
        "peaks": {"overall": {"reserved": row["max_memory_reserved_bytes"]}},
        "counts": {"trainable": row["num_trainable_params"], "total": row["num_total_params"]},
        "kept_alive": ["outputs with the KV cache, until the next forward has returned"],
        "steps": [{"reserved_avg_bytes": row["reserved_avg_bytes"]}],
        "unknown": [
            f"tokens of the longest padded batch, and of the one before: {LONGEST} after {BEFORE} assumed for every method",
            *([AGAIN] if adapter is not None else []),
        ],
        "inferred": [
            {"what": what, "evidence": "measured bytes"} for what in (LENGTHS_CHOSEN, *([AGAIN_CHOSEN] if lora_fa else []))
        ],
        "differs": ["empty_cache ran every 10 steps, and evaluation by generation (batch 50, up to 800 tokens) is covered"],
        "note": f"adapter file: {row['file_size_bytes']} bytes",
    }
    return Record.model_validate_json(json.dumps(fields))

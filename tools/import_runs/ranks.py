"""Published peaks of a rank of several GPUs as run records: `python -m tools.import_runs.ranks ROWS`.

ROWS is a JSON Lines file of rows copied from public sources, each with its source and licence. Writes a file of records per
source, and the rows that no setup describes into data/runs/not_expressible.jsonl, each with the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftplan.accuracy.jsonl import to_line
from peftplan.accuracy.records import Record
from peftplan.job.sources import load_config
from tools.import_runs.__main__ import RUNS, not_expressible
from tools.import_runs.projects import LITGPT, refuse
from tools.import_runs.rows import (
    ATTENTION,
    DTYPES,
    OF_JUNE_2024,
    NotExpressibleError,
    Options,
    Row,
    lora,
    options,
    read_rows,
    record,
)

MODELS: dict[str, object] = {
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "NousResearch/Llama-2-70b-hf": "meta-llama/Llama-2-70b-hf",
    "mistral-community/Mistral-7B-v0.2 (base)": {
        **load_config("mistral-7b-v0.1"),
        "sliding_window": None,
        "_name_or_path": "mistral-community/Mistral-7B-v0.2",
    },
}
"""Models of the same shapes that peftplan has by name; v0.2 of Mistral 7B is v0.1 without its window."""

TARGETS = {"bigcode/gpt_bigcode-santacoder": ["c_attn"]}
"""Of the targets that the scenarios name, those that a model has, if not `ATTENTION`."""


CACHED = ("bigcode/gpt_bigcode-santacoder",)
"""Models whose class keeps keys and values under checkpoints, unless it is told not to; fms-hf-tuning leaves it to the config."""


SPECIAL = {"bigcode/gpt_bigcode-santacoder": 49_158}
"""Length of a tokenizer to which fms-hf-tuning resizes the tables (tuning/data/tokenizer_data_utils.py), with the pad token that
it adds: SantaCoder's has 49,152 tokens, an end of text and four that mark what is filled in. Inferred: with it the persistent
bytes of eight ranks of QLoRA are 2,048 apart, and with 49,280 rows 247,808."""


def resized(name: str) -> dict[str, object]:
    """The model of that name as the program trains it: with a pad token more, where its tokenizer has no other than the model."""
    config = load_config(name)
    return {**config, "vocab_size": SPECIAL.get(name, config["vocab_size"] + 1), "_name_or_path": name}


def of_rank(
    row: Row, distributed: Options, setup: Options, *, targets: object, script: Options, model: object = None, **more: Any
) -> Record:
    """The record of a row: what divides the job, and the options that differ from Trainer's. `model`: if not the one named."""
    row_facts = {
        "micro_batch": row["batch"],
        "seq_len": row["seq"],
        "base_dtype": row["dtype"],
        "grad_ckpt": row["checkpointing"],
    }
    row_facts |= {"n_gpus": row["world"], "outcome": "ok", "unit": row["unit"].partition(" (")[0]}
    row = {**row, **row_facts}
    run = {"method": "full"} if row["method"] == "full" else lora(row, targets)
    run |= {"distributed": {**distributed, "gpus": row["world"]}, "options": options("transformers", row, **setup)}
    metric = row["metric_class"].removeprefix("peak_")
    return record(
        row,
        {"model": model or MODELS.get(row["model"], row["model"]), **run, "script": script},
        peaks={"overall": {metric: row["value_bytes"]}},
        **more,
    )


FSDP1 = {"strategy": "fsdp1", "backward_prefetch": "pre", "cpu_ram_efficient_loading": True}


NOT_CAST = {"accelerate": "0.28"}
"""What rows of fms-acceleration that do not say their versions ran with: at their commits accelerated-peft's requirements.txt
asks for accelerate < 0.29, whose FSDP1 casts nothing to fp32. peft before 0.12, of July 2024, leaves adapters in the dtype in
which their layer is stored (tuners/lora/layer.py, `update_layer`)."""


def four_bit(dtype: str) -> Options:
    """NF4 with double quantization, stored in a float dtype, so that FSDP shards it."""
    return {"quant": "nf4", "double_quant": True, "compute_dtype": dtype, "quant_storage": dtype}


def fms(row: Row) -> Record:
    """fms-acceleration's benchmark: HF Trainer or TRL, packed, FlashAttention-2, peaks of the training stage on rank 0."""
    plugins, dtype = row["framework_config"], DTYPES[row["dtype"]]
    if "autogptq" in plugins:
        raise NotExpressibleError(
            "fms-acceleration makes AutoGPTQ's packed weights parameters of 16 bits, which FSDP shards (autogptq_utils.py:76)"
        )
    if "foak" in plugins or "liger" in plugins:
        raise NotExpressibleError("fused kernels of fms-acceleration replace transformers' forward, its loss and peft's LoRA")
    if "scattermoe" in plugins:
        raise NotExpressibleError("fms-acceleration's ScatterMoE replaces transformers' experts")
    if "seq" not in row:
        raise NotExpressibleError("the length of the sequences is not recorded")
    quant = four_bit(dtype) if row["method"] == "qlora" else {}
    versions = row.get("versions") or {}
    return of_rank(
        row,
        FSDP1 if versions else FSDP1 | NOT_CAST,
        {
            "autocast": "none" if row["amp"] == "no" else row["amp"],
            "optim": "adamw_torch",
            "attn_implementation": "flash_attention_2",
            "use_reentrant": True,
            **quant,
            **({} if versions else {"adapter_dtype": dtype}),
            **({"use_cache": True} if row["model"] in CACHED else {}),
        },
        targets=TARGETS.get(row["model"], ATTENTION),
        script={} if versions else OF_JUNE_2024,
        model=resized(str(MODELS.get(row["model"], row["model"]))),
        covers="training",
        steps=[{"torch_mem_alloc_bytes_steady": int(row["steady_bytes"]), "framework_config": plugins}],
        unknown=[] if versions else ["versions of the libraries, but for accelerate < 0.29: those of June 2024 assumed"],
        inferred=[{"what": f"{SPECIAL[row['model']]:,} rows of the table", "evidence": "measured bytes"}]
        if row["model"] in SPECIAL
        else [],
        differs=[f"transformers {versions.get('transformers', 'of 2024')}, whose code is not that of transformers 5"],
    )


def fsdp_qlora(row: Row) -> Record:
    """AnswerDotAI's own FSDP1 loop: what it printed at the end, loading included."""
    if "no_shard" in row["strategy"]:
        raise NotExpressibleError("FSDP1's NO_SHARD has no formula")
    quant = four_bit("bf16") if row["method"] == "qlora" else {}
    offload = {"offload_params": "cpu"} if "offload" in row["strategy"] else {}
    return of_rank(
        row,
        {**FSDP1, **offload},
        {
            "adapter_dtype": "bf16",
            "autocast": "none",
            "optim": "adamw_torch",
            "attn_implementation": "sdpa",
            "use_reentrant": True,
            **quant,
        },
        targets=["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"],
        script={"torch": "2.2", "transformers": "4.38", "bitsandbytes": "0.43.0"},
        covers="whole-run",
        unknown=[
            "versions: torch 2.2, transformers 4.38 and bitsandbytes 0.43.0, of March 2024, assumed",
            "attention: sdpa assumed; flash-attn ran if it was installed",
            "dtype of adapters: bf16 assumed, as `train.py` casts the model",
        ],
        differs=["transformers of early 2024, whose code is not that of transformers 5"],
    )


ZERO2 = {"reduce_bucket_size": 200_000_000, "allgather_bucket_size": 200_000_000, "overlap_comm": False}
ZERO3 = {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
SWIFT: dict[str, Options] = {
    "examples/train/multi-gpu/ddp/train.sh": {"strategy": "ddp"},
    "examples/train/multi-gpu/deepspeed/train_zero2.sh": {"strategy": "zero2", **ZERO2},
    "examples/train/multi-gpu/deepspeed/train_zero3.sh": {"strategy": "zero3", **ZERO3, "overlap_comm": False},
    "examples/train/multi-gpu/fsdp2_lora/train.sh": {"strategy": "fsdp2", "cpu_ram_efficient_loading": True},
}
"""ms-swift's scripts of one text model → what they launch (`swift/config/zero2.json`, `zero3.json`, `fsdp2_lora/fsdp2.json`)."""


def swift(row: Row) -> Record:
    """ms-swift's example scripts: a rounded number in a comment; r 8, alpha 32, all linear layers, bf16."""
    if row["path"] not in SWIFT:
        raise NotExpressibleError(
            "a comment in a script, without metric, card and lengths, of pictures, preference pairs or packs"
        )
    row_facts = {
        "dtype": "bfloat16",
        "checkpointing": True,
        "grad_accum": 8,
        "gpu": "not stated",
        "metric_class": "peak_reserved",
    }
    return of_rank(
        {**row, **row_facts, "peft": {"r": 8, "alpha": 32, "dropout": 0.05}},
        SWIFT[row["path"]],
        {"attn_implementation": "sdpa"},
        targets="all-linear",
        script={"torch": None, "transformers": None},  # today's: the script is of 2026
        covers="whole-run",
        unknown=[
            "metric: reserved bytes assumed",
            "lengths: `--max_length 2048` assumed, which self-cognition's samples do not reach",
            "card, versions, lora_dropout 0.05, dtype of adapters (fp32 assumed)",
        ],
    )


TITAN = "torchtitan's own model code in pre-training; most rows checkpoint some operations, compile, or multiply in fp8"
LICENCES = {
    "rasbt/LLM-finetuning-scripts": "Apache-2.0 (see repo LICENSE)",
    "foundation-model-stack/fms-acceleration": "Apache-2.0",
}
"""Licences of repositories whose rows do not repeat them."""
NO_METRIC = "neither the metric nor the script's settings are stated"
SOURCES: dict[str, tuple[str, Callable[[Row], Record]]] = {
    "fms-acceleration benchmark refs": ("fms_fsdp1", fms),
    "fsdp_qlora benchmarks_03_2024.md": ("fsdp_qlora", fsdp_qlora),
    "ms-swift example comments": ("ms_swift_ranks", swift),
    "ms-swift Benchmark.md": ("", refuse("the model exists only as code of its repository; the metric is summed over devices")),
    "litgpt resource-tables": ("", refuse(LITGPT)),
    "torchtune README/docs": ("", refuse("torchtune's own model code; which of its three statistics was printed is not stated")),
    "torchtitan benchmarks": ("", refuse(TITAN)),
    "torchao docs": ("", refuse(TITAN)),
    "PEFT README/docs": ("", refuse(NO_METRIC)),
    "Axolotl example READMEs": ("", refuse(NO_METRIC)),
    "rasbt falcon-7b benchmark (prose)": ("", refuse(NO_METRIC)),
    "LLM-Adapters README (commented-out table)": ("", refuse(NO_METRIC)),
    "GLM-4 finetune README": ("", refuse(NO_METRIC)),
    "GitHub issues/PRs": ("", refuse("AutoGPTQ's packed weights as fms-acceleration makes them; the targets are not stated")),
}
"""Source → the file of its records, and the function that maps a row."""


def main() -> None:
    """Write the files; rows of other imports stay."""
    rows = read_rows(Path(sys.argv[1]))
    files: dict[str, list[str]] = {}
    refused: dict[str, str] = {}
    for row in rows:
        name, to_record = SOURCES[row["source"]]
        try:
            line = to_line(to_record(row))
            files.setdefault(name, []).append(line)
        except NotExpressibleError as error:
            refused[row["id"]] = not_expressible({"licence": LICENCES.get(str(row.get("repo")), "not stated"), **row}, str(error))
    for name, lines in files.items():
        (RUNS / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{len(lines):4} {name}.jsonl")
    path = RUNS / "not_expressible.jsonl"
    imported = {row["id"] for row in rows}
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)
    others = [line for line in kept if json.loads(line)["id"] not in imported]
    path.write_text("".join([*others, *refused.values()]), encoding="utf-8")
    print(f"{len(refused):4} rows not expressible")


if __name__ == "__main__":
    main()

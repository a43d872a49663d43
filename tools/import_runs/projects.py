"""Single-GPU training peaks of other projects, each with what its rows leave open."""

from __future__ import annotations

from collections.abc import Callable

from peftplan.accuracy.records import Record
from peftplan.units import GIB, MIB
from tools.import_runs.fitcheck import fitcheck
from tools.import_runs.rows import ATTENTION, DTYPES, OF_JUNE_2024, NotExpressibleError, Row, lora, options, record
from tools.import_runs.vramcalc import vramcalc


def fms(row: Row) -> Record:
    """fms-acceleration's benchmark: HF Trainer or TRL, packed to 4096 tokens, FlashAttention-2, peaks of the training stage."""
    if "kernels" in row and "fused" in (row["kernels"] or ""):
        raise NotExpressibleError("fused kernels of fms-acceleration replace transformers' forward, its loss and peft's LoRA")
    if "Mixtral" in row["model"]:
        raise NotExpressibleError(
            "transformers 4 held each expert in linear layers, which bitsandbytes quantized; in transformers 5, which peftplan"
            " describes, experts are fused parameters that stay in 16 bits"
        )
    if row["model"].startswith("ibm-research/"):
        raise NotExpressibleError("the config of the model is not among the published facts")
    if not row.get("seq_len"):
        raise NotExpressibleError("the length of the sequences is not recorded")
    if not row.get("base_dtype"):
        raise NotExpressibleError("the dtype of the base is not recorded")
    extra = row["extra"]
    dtype, four_bit = DTYPES[row["base_dtype"]], row["method"] == "qlora"
    quant = {"quant": "nf4", "double_quant": True, "compute_dtype": dtype} if four_bit else {}
    set_here = {
        "autocast": "none" if row["amp"] == "no" else row["amp"],
        "optim": "adamw_torch",
        "attn_implementation": "flash_attention_2",
        "use_reentrant": True,  # what `gradient_checkpointing_enable` takes before transformers 5
        "kbit_prepare": four_bit and extra["framework_config"] == "baseline-peft-bnb",
        **quant,
    }
    run = {"method": "full"} if row["method"] == "full" else lora(row, ATTENTION)
    smi = extra.get("nvidia_smi_peak_MiB_minus_first_sample")
    version = (row.get("versions") or {}).get("transformers", "of 2024")
    script = {} if row.get("versions") else OF_JUNE_2024
    return record(
        row,
        {"model": row["model"], **run, "options": options("transformers", row, **set_here), "script": script},
        covers="training",
        peaks={"overall": {"allocated": row["value_bytes"]}, "device_bytes": int(smi * MIB) if smi else None},
        steps=[{name: value for name, value in extra.items() if value is not None}],
        unknown=[] if row.get("versions") else ["versions of the libraries: those of 2024 assumed"],
        differs=[
            "device bytes are nvidia-smi's once a second, less its first sample, and may miss the peak",
            f"transformers {version}, whose trainer and modeling code are not those of transformers 5",
        ],
    )


def canifinetune(row: Row) -> Record:
    """canifinetune's own bench on Windows: a plain loop, whole run with loading."""
    if row["model"] == "sshleifer/tiny-gpt2":
        raise NotExpressibleError("the config of the model is not among the published facts")
    four_bit = row["method"] == "qlora"
    quant = {"quant": "nf4", "double_quant": row["double_quant"], "compute_dtype": "bf16"} if four_bit else {}
    set_here = {"autocast": "none", "optim": "paged_adamw_8bit", "attn_implementation": "sdpa", "use_cache": False, **quant}
    return record(
        row,
        {
            "model": row["model"],
            **lora(row, ATTENTION),
            "options": options("plain", row, **set_here, kbit_prepare=four_bit),
            "script": {"outputs_outlive_step": True},
        },
        covers="whole-run",
        peaks={"overall": {"allocated": row["value_bytes"], "reserved": round(row["extra"]["peak_reserved_GiB"] * GIB)}},
        kept_alive=["outputs, until the next forward has returned"],
        steps=row["extra"]["snapshots_GiB"],
        unknown=["autocast: none assumed; canifinetune 0.4.1, later than this commit, runs under bf16"],
        inferred=[{"what": "no autocast: bf16 autocast would have made other bytes", "evidence": "measured bytes"}],
    )


def bert(row: Row) -> Record:
    """transformers' page on training on one GPU, 2022: what the driver shows at the end, context included."""
    if row.get("grad_ckpt") is None:
        raise NotExpressibleError("whether layers were recomputed is not recorded")
    optimizer = row["optimizer"]
    own = "adafactor" if optimizer == "Adafactor" else "adamw_bnb_8bit" if "8bit" in optimizer else "adamw_torch"
    differs = ["transformers of 2022, whose BERT is not that of transformers 5"]
    if own == "adamw_torch":
        differs.append("transformers' own AdamW of that time, a loop over parameters: plain torch AdamW is assumed")
    trainer = (
        "plain" if own == "adamw_bnb_8bit" else "transformers"
    )  # passed to Trainer from outside: no 32-bit states of embeddings
    set_here = {
        "task_type": "SEQ_CLS",
        "num_labels": 2,
        "autocast": row["amp"],
        "optim": own,
        "attn_implementation": "eager",
        "keep_outputs": False,
        "use_cache": False,
    }
    return record(
        row,
        {"model": "bert-large-uncased", "method": "full", "options": options(trainer, row, **set_here)},
        covers="whole-run",
        peaks={"device_bytes": row["value_bytes"], "context_bytes": 1343 * MIB},
        unknown=row["unknown"],
        differs=differs,
    )


def distilbert(row: Row) -> Record:
    """A Lightning Fabric loop over transformers' DistilBERT; dropout is on, evaluation is covered."""
    if row["base_dtype"] == "float64":
        raise NotExpressibleError("fp64 is no dtype that peftplan knows")
    set_here = {
        "task_type": "SEQ_CLS",
        "num_labels": 2,
        "autocast": row["amp"].removesuffix("-mixed"),
        "optim": "adamw_torch",
        "attn_implementation": "eager",
        "use_cache": False,
    }
    return record(
        row,
        {"model": "distilbert-base-uncased", "method": "full", "options": options("plain", row, **set_here)},
        covers="whole-run",
        peaks={"overall": {"reserved": row["value_bytes"]}},
        kept_alive=["outputs"],
        differs=[
            "torch's Adam, whose states are those of AdamW",
            "transformers 4.28, whose DistilBERT is not that of transformers 5",
        ],
    )


def swift(row: Row) -> Record:
    """ms-swift's benchmark, torch 2.1."""
    if not row["model"].startswith("01-ai/"):
        why = (
            "its config is not among the published facts"
            if "OpenBuddy" in row["model"]
            else "it exists only as code of its repository"
        )
        raise NotExpressibleError(f"{row['model']}: {why}")
    set_here = {"optim": "adamw_torch", "attn_implementation": "flash_attention_2"}
    return record(
        row,
        {
            "model": row["model"],
            **lora(row, ["q_proj", "k_proj", "v_proj"]),
            "options": options("transformers", row, **set_here),
        },
        covers="whole-run",
        peaks={"overall": {"reserved": row["value_bytes"]}},
        unknown=[*row["unknown"], "targets: q_proj, k_proj and v_proj assumed", "autocast bf16 and fp32 adapters assumed"],
        differs=[
            "transformers of January 2024; rehearsed with 4.36.2, peft 0.7.1 and torch 2.13, the job reserves what is estimated,"
            " within 0.02 %: what is more is of its lengths, of torch 2.1.1 or of ms-swift"
        ],
    )


def refuse(why: str) -> Callable[[Row], Record]:
    """For sources of which no row can be a record."""

    def always(row: Row) -> Record:
        raise NotExpressibleError(why)

    return always


LITGPT = "litgpt's own model code: fused qkv, bf16 adapters, loss in chunks of 128 tokens"
TORCHTUNE = "torchtune's own model code; lengths vary with the data and are not recorded"
SOURCES: dict[str, tuple[str, Callable[[Row], Record]]] = {
    "fitcheck-llm archived T4 measurements": ("fitcheck_t4", fitcheck),
    "vramcalc benchmark": ("vramcalc_a6000", vramcalc),
    "fms-acceleration benchmark refs": ("fms_acceleration", fms),
    "canifinetune RTX 4080 baselines": ("canifinetune", canifinetune),
    "HF transformers docs": ("bert_large", bert),
    "rasbt LLM-finetuning-scripts (DistilBERT precision experiment)": ("distilbert", distilbert),
    "ms-swift Benchmark.md": ("ms_swift", swift),
    "litgpt resource-tables": ("", refuse(LITGPT)),
    "litgpt config_hub": ("", refuse(LITGPT)),
    "torchtune README optimisation staircase": ("", refuse(TORCHTUNE)),
    "torchao docs": ("", refuse(TORCHTUNE)),
    "Unsloth notebooks": ("", refuse("Unsloth's own kernels and offloaded checkpointing; lengths vary with the data")),
    "TRL example notebooks": ("", refuse("offloaded activations or GRPO; lengths vary with the data and are not recorded")),
}
"""Source → the file of its records, and the function that maps a row."""

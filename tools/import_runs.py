"""Published measurements as run records: writes data/runs/<source>.jsonl and data/runs/not_expressible.jsonl.

`python tools/import_runs.py PEAKS METAMATH FITCHECK`: two JSON Lines files of rows copied from public sources, each row with its
source and licence: single-GPU training peaks of many projects, and peft's benchmark, one run per method; and the unpacked source
distribution of fitcheck-llm 0.3.1 (PyPI), whose archive has more of its T4 runs than PEAKS. What a row leaves open is decided
here, once, and said in its record under `unknown` (assumed) or `differs` (known not to be what the setup says).
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peftplan.accuracy.jsonl import digest, to_line
from peftplan.accuracy.records import Record
from peftplan.planning.setup import PRESETS
from peftplan.units import GB, GIB, MIB

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "data" / "runs"
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
}
"""Cards that the sources name beyond doubt."""
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
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOLERANCE = {
    "analytic": {"allocated": 4.0, "phases": 5.0, "reserved": 3.0, "device": 2.0},
    "trace": {"allocated": 1.5, "phases": 1.5, "reserved": 3.0, "device": 2.0},
}
"""Percent, for runs that say all that ran."""
TOLERANCE_IN_THREADS = {"analytic": {"allocated": 4.0, "phases": 5.0}, "trace": {"allocated": 1.5, "phases": 1.5}}
"""Of runs that loaded in threads: what they reserve differs from run to run (`IN_THREADS`)."""
BEFORE, LONGEST = 104, 690
"""Lengths of the longest padded batch of peft's benchmark and of the one before it: not recorded, chosen once by two of its rows
(docs/trace-drift.md)."""

UNSAID = {"torch": "2.4", "transformers": "4.40"}
"""The stack of rows that do not say: they are of 2022 to 2025, when no version differs by what `planning.script` tells apart."""
OLDER = {"torch": "2.10.0", "transformers": "5.0.0"}
"""The stack of fitcheck-llm's rows, also of those labelled 2.14.0: they reserve what 2.10.0 does, and 2.14.0 does not."""
MISLABELLED = "taken as run with torch 2.10.0 and transformers 5.0.0, against its label: docs/trace-drift.md"
IN_THREADS = (
    "transformers 5.0.0 copies weights to the card in threads while others are quantized, so that one setup reserves other bytes "
    "in every run (docs/trace-drift.md)"
)
ONE_BY_ONE = "2026-09-01"
"""The day of the one session whose weights were not copied in threads."""
COPIED_ONE_BY_ONE = "weights were copied one by one: the session's ten figures are what that reserves (docs/trace-drift.md)"
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

AGAIN = (
    "whether adapters are enabled again before the first step: assumed, as LoRA-FA's run reserved on average what LoRA's did "
    "(14.37 and 14.40 GB), and as its trainable parameters were counted with A frozen"
)
"""Of peft's benchmark; it changes LoRA-FA alone."""


class NotExpressibleError(Exception):
    """A row that no setup describes; the message says why."""


def rounding(value: float, unit: str) -> int:
    """The last printed digit in bytes: 9.69 GB has 0.01 GB."""
    decimals = len(repr(value).partition(".")[2]) if isinstance(value, float) and not value.is_integer() else 0
    return int(UNITS[unit] / 10**decimals)


def options(trainer: str, row: Row, **changes: Any) -> Options:
    """Every option of a row: what the trainer presets, what the row says, and `changes` on top."""
    found: Options = {
        **PRESETS[trainer],
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
    return found


def circumstances(row: Row) -> Row:
    """Where, with what and by whom."""
    said = {
        name: row[name] for name in ("gpu", "framework", "commit", "date", "source", "repo", "path", "licence") if row.get(name)
    }
    versions = {name.replace("_", "-"): str(version) for name, version in (row.get("versions") or {}).items()}
    cuda = versions.pop("cuda", None) or (versions.get("torch", "").partition("+cu")[2] or None)
    return {**said, "gpu_id": GPU_IDS.get(row["gpu"]), "num_gpus": row["n_gpus"], "versions": versions, "cuda": cuda}


def lora(row: Row, targets: list[str]) -> Row:
    """The LoRA part of a run."""
    peft = row["peft"]
    fields = {"r": int(peft["r"]), "lora_alpha": int(peft["alpha"]), "lora_dropout": float(peft["dropout"])}
    return {"method": row["method"], "method_config": {**fields, "target_modules": targets}}


def record(row: Row, run: Row, *, covers: str, peaks: Row, **more: Any) -> Record:
    """A record of a row of PEAKS."""
    counts = {name: row[f"{name}_params"] for name in ("trainable", "total") if row.get(f"{name}_params")}
    peaks = {"rounding_bytes": rounding(row["value"], row["unit"]), **peaks}
    unsaid = {package: version for package, version in UNSAID.items() if package not in (row.get("versions") or {})}
    run = {**run, "script": {**unsaid, **run.get("script", {})}}
    fields = {"id": row["id"], "run": run, "circumstances": circumstances(row), "outcome": row["outcome"], "covers": covers}
    fields |= {"peaks": peaks, "counts": counts, "note": row.get("note"), **more}
    return Record.model_validate_json(json.dumps(fields))


def fitcheck(row: Row) -> Record:
    """fitcheck-llm's T4 runs: a plain loop, peaks by phase of a steady step (scripts/measure.py of its source distribution)."""
    extra = row["extra"]
    four_bit = row["method"] == "qlora"
    quant = {"quant": "nf4", "double_quant": row["double_quant"], "compute_dtype": "fp16"} if four_bit else {}
    set_here = {"attn_implementation": row["attn"], "use_cache": False, "kbit_prepare": four_bit, **quant}
    names = {"forward": "peak_forward_mib", "backward": "peak_backward_mib", "step": "peak_optimizer_mib"}
    in_threads = four_bit and row["date"] != ONE_BY_ONE
    notes = [
        row.get("note"),
        MISLABELLED if "2.14" in row["versions"]["torch"] else None,
        COPIED_ONE_BY_ONE if row["date"] == ONE_BY_ONE else None,
    ]
    return record(
        row,
        {
            "model": row["model"],
            **lora(row, row["peft"]["targets"]),
            "options": options("plain", row, **set_here),
            "script": {"repeats_kv": row["attn"] == "sdpa", **OLDER},
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
        tolerance=TOLERANCE_IN_THREADS if in_threads else TOLERANCE,
        differs=[IN_THREADS] if in_threads else [],
        error=row.get("error"),
        note="; ".join(filter(None, notes)) or None,
    )


def archived(source: Path, listed: set[str]) -> Iterator[Row]:
    """The runs of fitcheck-llm's archive that PEAKS does not list, in its form: of its four sessions, and at the batch sizes
    around the one at which it expected memory to run out."""
    folder = source / "data" / "measurements"
    sessions = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sessions"]
    for name, session in ARCHIVE.items():
        said, path = sessions[session], f"data/measurements/{name}.json"
        for number, run in enumerate(json.loads((source / path).read_text(encoding="utf-8"))["runs"]):
            if f"{path}#runs[{number}]" not in listed:
                yield archived_row(run, said, run["run"], f"fitcheck/{name}/{number}", f"{path}#runs[{number}]")
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
        "model": NOT_BUILT_IN.get(setup.get("model_id") or run["model_id"], setup.get("model_id") or run["model_id"]),
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
        "kbit_prepare": four_bit and extra["framework_config"] == "baseline-peft-bnb",
        **quant,
    }
    run = {"method": "full"} if row["method"] == "full" else lora(row, ATTENTION)
    smi = extra.get("nvidia_smi_peak_MiB_minus_first_sample")
    version = (row.get("versions") or {}).get("transformers", "of 2024")
    return record(
        row,
        {"model": row["model"], **run, "options": options("transformers", row, **set_here)},
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
        unknown=["autocast: none assumed, as the figures alone say; canifinetune 0.4.1, later than this commit, runs under bf16"],
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
        differs=["transformers of early 2024, whose trainer and modeling code are not those of transformers 5"],
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


def metamath(row: Row) -> Record:
    """peft's benchmark: a plain loop, `max_memory_reserved` of the whole run, evaluation by generation included."""
    adapter = row["adapter_config"]
    lora_fa = {"method": "lora-fa"} if row["experiment"].endswith("lorafa") else {}
    run = {"method": "full"} if adapter is None else {**lora_fa, "peft_config": adapter}
    set_here = {
        **PRESETS["plain"],
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
        "differs": ["empty_cache ran every 10 steps, and evaluation by generation (batch 50, up to 800 tokens) is covered"],
        "note": f"adapter file: {row['file_size_bytes']} bytes",
    }
    return Record.model_validate_json(json.dumps(fields))


def not_expressible(row: Row, why: str) -> str:
    """One line of what no setup describes: the row's source, what it measured, and why."""
    kept = ("id", "source", "repo", "path", "commit", "licence", "model", "method", "gpu", "metric_class", "value_bytes")
    fields = {name: row[name] for name in kept if row.get(name) is not None} | {"why": why}
    return json.dumps({**fields, "digest": digest(fields)}, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def convert(peaks: Iterable[Row], benchmark: Iterable[Row]) -> tuple[dict[str, list[str]], Counter[str]]:
    """File name → lines; and how many rows each reason kept out."""
    files: dict[str, list[str]] = {"peft_metamath": [to_line(metamath(row)) for row in benchmark], "not_expressible": []}
    why: Counter[str] = Counter()
    for row in peaks:
        name, to_record = SOURCES[row["source"]]
        try:
            files.setdefault(name, []).append(to_line(to_record(row)))
        except NotExpressibleError as error:
            files["not_expressible"].append(not_expressible(row, str(error)))
            why[str(error)] += 1
    return {name: lines for name, lines in files.items() if lines}, why


def main() -> None:
    """Write every file, and say what was kept out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peaks", type=Path)
    parser.add_argument("metamath", type=Path)
    parser.add_argument("fitcheck", type=Path)
    args = parser.parse_args()
    peaks = read_rows(args.peaks)
    more = archived(args.fitcheck, {row["path"] for row in peaks if row.get("path")})
    files, why = convert([*peaks, *more], read_rows(args.metamath))
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, lines in sorted(files.items()):
        (RUNS / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{len(lines):4} {name}.jsonl")
    for reason, times in why.most_common():
        print(f"{times:4} rows not expressible: {reason}")


if __name__ == "__main__":
    main()

"""Other estimators on the same measured runs, in one run with peftplan's analytic engine: error, rows, verdicts, cold start.

    python benchmarks/peers.py [--write] [FILE…]

Needs the extra `peers`, best in an environment of its own. Every record of FILE, or of data/runs, is offered to every tool as it
can be told (benchmarks/peer_tools.py). `--write` stores the result in data/runs/peers.json, from which `peftplan check --report`
writes the table of the accuracy page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peer_tools import ATTENTION, TOOLS, Refused

from peftplan.accuracy.engines import RUNS, ask, read_cases
from peftplan.accuracy.peers import PEERS, Peers, Tool, table
from peftplan.accuracy.records import Record
from peftplan.errors import PeftplanError
from peftplan.hardware.gpus import find_gpu
from peftplan.job.sources import load, load_config
from peftplan.report import markdown

OURS = "peftplan"
REPEAT = 5
COLD = {
    "model": "mistralai/Mistral-7B-v0.1", "method": "lora", "quant": "none", "double_quant": False, "r": 16, "alpha": 32,
    "dropout": 0.0, "targets": ATTENTION, "dtype": "bf16", "autocast": "none", "optim": "adamw_torch", "batch": 1, "seq": 2048,
    "accumulation": 1, "checkpointing": True, "attention": "sdpa", "gpu": "a100-80gb", "gpu_gib": 80.0, "task": "CAUSAL_LM",
}  # fmt: skip
"""The job of the cold start."""
OUR_COLD = "import peftplan; peftplan.estimate('mistral-7b-v0.1', method='lora', r=16, target_modules='attention', dtype='bf16')"


def job_of(record: Record, folders: Path) -> dict[str, Any]:
    """A record in the plain words of `peer_tools`. Raises Refused for methods that only peftplan knows."""
    run, options = record.run, record.run.options
    raw = run.peft_config or {}
    kind = run.method_name
    config = load_config(run.model)
    architecture = load(run.model, task_type=options.get("task_type"), num_labels=options.get("num_labels"))
    fields = {**raw, **run.method_config}
    if kind not in ("full", "lora", "qlora") or fields.get("use_dora") or fields.get("init_lora_weights", True) is not True:
        raise Refused("methods other than full fine-tuning and LoRA")
    targets = fields.get("target_modules") or ["q_proj", "v_proj"]  # peft's own mapping for the models of these records
    gpu = find_gpu(record.circumstances.gpu_id) if record.circumstances.gpu_id else None
    folder = folders / re.sub(r"\W", "-", run.model_name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {
        "model": run.model_name,
        "folder": str(folder),
        "config": config,
        "task": architecture.task_type,
        "method": "full" if kind == "full" else "lora",
        "quant": options.get("quant") or "none",
        "double_quant": bool(options.get("double_quant")),
        "r": fields.get("r"),
        "alpha": fields.get("lora_alpha"),
        "dropout": fields.get("lora_dropout"),
        "targets": None if kind == "full" else targets,
        "dtype": options["dtype"],
        "autocast": options["autocast"],
        "optim": options["optim"],
        "batch": options["batch_size"],
        "seq": options["seq_len"],
        "accumulation": options["gradient_accumulation_steps"],
        "checkpointing": options["gradient_checkpointing"],
        "attention": options["attn_implementation"],
        "gpu": gpu.id if gpu else None,
        "gpu_gib": gpu.total_mib / 1024 if gpu and gpu.total_mib else None,
    }


def offered(name: str, record: Record, folders: Path) -> dict[str, int]:
    """What a tool says of a record. Raises Refused with its reason in one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return TOOLS[name](job_of(record, folders))
    except Refused:
        raise
    except Exception as error:  # the tool's own way to refuse, of any type
        message = " ".join(str(error).replace(str(folders), "").split())
        raise Refused(f"{type(error).__name__}: {message[:110]}") from None


def answers_of(name: str, records: list[Record], folders: Path) -> Tool | None:
    """Every record through one tool; None where it is not installed."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        return None
    answers: dict[str, dict[str, int]] = {}
    refused: Counter[str] = Counter()
    for record in records:
        try:
            answers[record.id] = offered(name, record, folders)
        except Refused as error:
            refused[str(error)] += 1
    return Tool(version=installed, cold_seconds=cold(name, folders), stated=answers, refused=dict(refused.most_common()))


def ours(records: list[Record], folders: Path) -> Tool:
    """The analytic engine on the same records."""
    answers: dict[str, dict[str, int]] = {}
    refused: Counter[str] = Counter()
    for record in records:
        answer = ask(record, "analytic")
        figures = {figure: answer.figures[figure] for figure in ("allocated", "reserved", "device") if figure in answer.figures}
        if figures:
            answers[record.id] = figures
        else:
            refused[answer.refused or "no peak stated"] += 1
    return Tool(version=peftplan_version(), cold_seconds=cold(OURS, folders), stated=answers, refused=dict(refused.most_common()))


def peftplan_version() -> str:
    """Ours, with the commit where this is a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RUNS, check=False)
    return f"{version(OURS)} ({done.stdout.strip()})" if done.returncode == 0 else version(OURS)


def cold(name: str, folders: Path) -> float | None:
    """Seconds of a fresh interpreter that imports the tool and estimates `COLD`, best of `REPEAT`; None where it refuses that."""
    folder = folders / "cold"
    folder.mkdir(exist_ok=True)
    config = load_config("mistral-7b-v0.1")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    job = {**COLD, "folder": str(folder), "config": config}
    code = OUR_COLD
    if name != OURS:
        job |= {"targets": ["q_proj", "v_proj"]} if name == "fitscout" else {}
        code = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom peer_tools import TOOLS\n"
        code += f"TOOLS[{name!r}](json.loads(sys.stdin.read()))"
    times = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], input=json.dumps(job), capture_output=True, text=True, check=False)
        if done.returncode:
            return None
        times.append(time.perf_counter() - start)
    return round(min(times), 3)


def main() -> None:
    """Ask every tool, print the table, and store it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="store the result in data/runs/peers.json")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        records = [case.record for case in read_cases(args.files) if case.record.run.strategy is None]
    except PeftplanError as error:
        sys.exit(f"peers: {error}")
    with tempfile.TemporaryDirectory() as temporary:
        folders = Path(temporary)
        tools = {OURS: ours(records, folders)}
        for name in TOOLS:
            if (tool := answers_of(name, records, folders)) is not None:
                tools[name] = tool
                print(f"{name} {tool.version}: {len(tool.stated)} of {len(records)} records", file=sys.stderr)
    peers = Peers(python=platform.python_version(), records=len(records), tools=tools)
    columns, rows = table(peers, records)
    print(markdown.table(columns, rows))
    if args.write:
        PEERS.write_text(peers.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

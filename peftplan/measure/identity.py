"""The identity of a measured run: its configuration as in a record, the key that a suite compares, and its circumstances.

Nothing here needs torch, so a suite finds out quickly what is left to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peftplan.accuracy.records import Circumstances, Record, Run, full_options
from peftplan.errors import PeftplanError
from peftplan.hardware.gpus import find_gpu
from peftplan.job.job import Job

WARMUP, STEPS = 1, 2
"""Optimizer steps. The first one creates the optimizer's states; two more show whether the state is steady."""

PACKAGES = ("peftplan", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "triton", "numpy")
SOURCE = "peftplan measure"
LICENCE = "Apache-2.0"
"""The licence of records measured with this command and added to this project."""

ALLOCATOR_VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUDA_MODULE_LOADING",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
)
"""Environment variables that change what is allocated or reserved."""


def run_of(job: Job) -> Run:
    """The job as a record states it: the method's own fields, and every option that is set."""
    has_method = job.method is not None and job.config is not None and not job.adapter
    return Run(
        model=job.model if isinstance(job.model, str) else job.architecture.name,
        method=job.method.name if has_method and job.method else None,
        peft_config=None if has_method else _plain(job.adapter),
        method_config=_plain(job.config.model_dump(mode="json", exclude_unset=True)) if has_method and job.config else {},
        options=_plain(full_options(job.setup.model_dump(mode="json"))),
        distributed=_strategy(job),
        script=job.script,
    )


def _strategy(job: Job) -> dict[str, object]:
    ranks = job.distributed
    return {} if ranks is None else {"strategy": ranks.strategy, **ranks.model_dump(mode="json", exclude_unset=True)}


def kept_alive(job: Job) -> tuple[str, ...]:
    """What the job's trainer holds on to, from forward to the end of the step or longer."""
    setup = job.setup
    references = {
        "outputs": setup.keep_outputs,
        "kv cache": setup.keep_outputs and setup.use_cache and not setup.gradient_checkpointing,
        "gradients": setup.keep_gradients,
    }
    return tuple(name for name, is_kept in references.items() if is_kept)


def key(run: Run) -> str:
    """The key of a configuration: ten hexadecimal digits of its sha256."""
    facts = run.model_dump(mode="json", exclude={"distributed"})  # the launcher's
    facts["options"] = {"device_map": "none", **facts["options"]}  # older records do not say it
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def lost(run: Run, *, gpu: str, error: str) -> Record:
    """The record of a run whose process wrote none: it crashed, was killed, or timed out."""
    return Record(
        id=new_id(run), run=run, circumstances=circumstances(gpu=gpu), outcome="failed", error=error, covers="whole-run"
    )


def circumstances(*, gpu: str, **facts: Any) -> Circumstances:
    """Where, when and with what this process runs."""
    return Circumstances(
        gpu=gpu,
        num_gpus=world_size(),
        rank=rank(),
        versions=_versions(PACKAGES),
        allocator=allocator_settings().get("PYTORCH_ALLOC_CONF", allocator_settings().get("PYTORCH_CUDA_ALLOC_CONF")),
        framework=SOURCE,
        commit=_commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=SOURCE,
        licence=LICENCE,
        **facts,
    )


def world_size() -> int:
    """The number of processes of this run, from the environment of torchrun or accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The rank of this process, from the same environment."""
    return int(os.environ.get("RANK", "0"))


def allocator_settings() -> dict[str, str]:
    """The variables of `ALLOCATOR_VARIABLES` that are set."""
    return {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}


def gpu_id(name: str) -> str | None:
    """The id that the catalogue has for a driver's name of a card, or None."""
    try:
        return find_gpu(name).id
    except PeftplanError:
        return None


def new_id(run: Run) -> str:
    """`llama-3.2-1b-qlora-1f3a5c7e9b-20260131T101112Z`, with the rank where there are several."""
    words = re.sub(r"[^a-z0-9.+]+", "-", f"{run.model} {run.method_name}".lower()).strip("-.")
    moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return "-".join([words[-80:], key(run), moment, *([f"rank{rank()}"] if world_size() > 1 else [])])


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The commit of the checkout that runs; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        process = subprocess.run(("git", "-C", str(here), "rev-parse", "HEAD"), capture_output=True, text=True, check=False)
    except OSError:
        return None
    return process.stdout.strip() or None


def _plain(value: Any) -> Any:
    """The value as JSON returns it: tuples and sets become lists."""
    return json.loads(json.dumps(value, default=list))

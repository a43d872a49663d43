"""Every tensor that a forward makes, also those that are gone before any peak: the formulas' events against the trace's.

A tensor that comes and goes between two peaks moves neither them nor what is alive there, but the allocator serves it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.analytic.compile_job import Compiled
from peftplan.job.job import Job
from peftplan.trace import engine
from peftplan.trace.traced import traced_config
from tests.memory.families import MODELS, B, R, S
from tests.memory.test_kept import Key, differences, dtype_on_cuda, job_of, module_name, shape_name

LINEAR: dict[str, Any] = {"r": R, "target_modules": "all-linear"}
NF4: dict[str, Any] = {"quant": "nf4"}
JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qlora": ("llama", "qlora", LINEAR),
    "qlora under autocast": ("llama", "qlora", {**LINEAR, "autocast": "bf16"}),
    "vera, 4-bit": ("llama", "vera", {**LINEAR, **NF4}),
    "adalora, 4-bit": ("llama", "adalora", {"target_modules": "all-linear", **NF4}),
    "lora": ("gpt2", "lora", {}),
    "lora, 8-bit": ("llama", "lora", {"quant": "int8"}),
    "full": ("gemma", "full", {}),
}
FLOATS = ("fp32", "bf16", "fp16")
"""Positions, moved labels and masks, which are whole numbers and truth values, are made in other steps by a trace."""


def made_by_formulas(job: Job, formulas: Compiled, sizes: dict[str, int]) -> Counter[Key]:
    """Module, shape and dtype of the tensors that the events of forward make."""
    timeline, named = formulas.timeline, formulas.sizes(B, S)
    leaves = {module.name for module in job.architecture.modules}
    modules = leaves | {name.rpartition(".")[0] for name in leaves}
    tensors: Counter[Key] = Counter()
    for _, start, end in (window for window in timeline.windows if window[0] == "forward"):
        for number, count in timeline.events[start:end]:
            kind = timeline.kinds[number]
            module, _, operation = kind.name.partition(" ")
            shape = tuple(named[dim] if isinstance(dim, str) else dim for dim in kind.dims)
            if count > 0 and kind.dtype in FLOATS and 0 not in shape:
                of_module = "." in module or module in modules
                tensors[module_name(module if operation and of_module else ""), shape_name(shape, sizes), kind.dtype] += count
    return tensors


def made_in_trace(job: Job, sizes: dict[str, int]) -> Counter[Key]:
    """The same of a trace's second step."""
    adapter = traced_config(job.method, job.config, job.adapter, job.adaptation)
    task, quant = job.architecture.task_type, job.quant
    run = engine.trace(
        job.model, task_type=task, peft_config=adapter, quant=quant, setup=job.setup, device=(8, 0), full_depth=True
    )
    window = [window for window in run.windows if window.phase == "forward"][-1]
    storages = [
        moment.storage for moment in run.log[window.start : window.end] if moment.kind == "alloc" and moment.storage.nbytes
    ]
    keys = [(module_name(s.module), shape_name(s.shape, sizes), dtype_on_cuda(s)) for s in storages]
    return Counter(key for key in keys if key[2] in FLOATS)


@pytest.mark.parametrize("name", JOBS)
def test_forward_makes_what_the_trace_makes(name: str) -> None:
    family, method, options = JOBS[name]
    config, sizes = MODELS[family]
    job, formulas = job_of(config, method, **options)
    ours, theirs = made_by_formulas(job, formulas, sizes), made_in_trace(job, sizes)
    assert sum(theirs.values()) > 60
    assert ours == theirs, differences(ours, theirs)

"""What forward keeps for backward, tensor by tensor: module, shape and dtype, against two witnesses that share no code with it.

The trace runs transformers' and peft's modules on fake tensors as CUDA would and logs every storage; torch's own
`saved_tensors_hooks` tell what autograd keeps of a real run on a CPU.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from math import prod
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")  # imported within a trace, its constants would be storages of it

import torch

from peftplan import estimate
from peftplan.analytic.compile_job import Compiled
from peftplan.analytic.compiled import compiled
from peftplan.depth.log import Storage, category_of
from peftplan.dtypes import parse_dtype
from peftplan.job.inventory import Inventory
from peftplan.job.job import Job
from peftplan.job.prepare import prepare
from peftplan.trace import engine
from peftplan.trace.traced import traced_config
from tests.memory.families import MODELS, B, R, S

LASTING = ("weights", "adapter_weights", "gradients", "optimizer_states", "buffers", "workspaces")
"""Categories that are no activations."""

Key = tuple[str, str, str]
"""Module, shape and dtype."""

PASSING_MODULES = re.compile(r"\.(?:\w*dropout|drop|act|act_fn|\w+_act_fn)$")
TUNER = re.compile(r"\.(?:default|base_layer)(?=\.|$)")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
BATCH = ("input_ids", "labels")
VIEWS = ("aten.view.", "aten.unsqueeze.", "aten.slice.")


def module_name(name: str) -> str:
    """Both sides' names of a module, in one convention.

    Layers have no numbers, peft's wrappers and the name of an adapter are left out, and what has no weights (dropout, an
    activation function) belongs to the module that it is in.
    """
    name = NUMBER.sub("{}", TUNER.sub("", name))
    name = name.removeprefix("base_model").removeprefix(".model").removeprefix(".")
    while PASSING_MODULES.search(name):
        name = PASSING_MODULES.sub("", name)
    return name


def shape_name(shape: tuple[int, ...], sizes: dict[str, int]) -> str:
    """A shape as the named sizes that it is made of, in alphabetical order: a storage is (b·s, h) as well as (b, s, h)."""
    parts: list[str] = []
    for dim in shape:
        made_of = [names for n in range(1, 5) for names in combinations(sizes, n) if prod(sizes[x] for x in names) == dim]
        assert len(made_of) <= 1, f"{dim} can be {made_of}: choose other sizes"
        parts += made_of[0] if made_of else () if dim == 1 else (str(dim),)
    return "·".join(sorted(parts))


def job_of(config: dict[str, Any], method: str, **options: Any) -> tuple[Job, Compiled]:
    """The job, and its analytic timeline."""
    adapter = {"r": R, "target_modules": "all-linear"} if method == "lora" else {}
    chosen = {"trainer": "plain", "use_cache": False, "batch_size": B, "seq_len": S, **adapter, **options}
    job = prepare(config, method=method, **chosen)
    estimated_job = estimate(config, method=method, **chosen)
    return job, compiled(Inventory(job, estimated_job.parameters, estimated_job.static), compute_capability="8.0")


def alive_after_forward(formulas: Compiled) -> list[Any]:
    """The analytic lines at the end of forward, without the batch."""
    end = max(end for phase, _, end in formulas.timeline.windows if phase == "forward")
    lines = formulas.timeline.lines(end, formulas.sizes(B, S))
    return [line for line in lines if line.category not in LASTING and line.name not in BATCH]


def estimated(job: Job, formulas: Compiled, sizes: dict[str, int]) -> Counter[Key]:
    """Ours. A line's name is a module and an operation, or an operation of the model's own forward."""
    names = [m.name for m in job.architecture.modules]
    parents = {name.rpartition(".")[0] for name in names} | {name.partition(".")[0] for name in names}
    kept: Counter[Key] = Counter()
    for line in alive_after_forward(formulas):
        module, _, operation = line.name.partition(" ")
        of_module = operation and ("." in module or module in parents)
        kept[module_name(module if of_module else ""), shape_name(line.shape, sizes), line.dtype] += line.copies
    return kept


def traced(job: Job, sizes: dict[str, int]) -> Counter[Key]:
    """The trace's: one step, at the end of whose forward no state of the optimizer exists, which is none of this test's."""
    run = engine.trace(
        job.model,
        task_type=job.architecture.task_type,
        peft_config=traced_config(job.method, job.config, job.adapter, job.adaptation),
        setup=job.setup,
        device=(8, 0),
        full_depth=True,
    )
    end = max(window.end for window in run.windows if window.phase == "forward")
    living: dict[int, Storage] = {}
    for moment in run.log[:end]:
        if moment.kind == "alloc":
            living[moment.storage.id] = moment.storage
        else:
            del living[moment.storage.id]
    return Counter(
        (module_name(s.module), shape_name(s.shape, sizes), dtype_on_cuda(s))
        for s in living.values()
        if category_of(s) not in LASTING and not s.op.startswith(("batch", *VIEWS))  # views make nothing: they show the batch
    )


def dtype_on_cuda(storage: Storage) -> str:
    """Mean and rstd of a LayerNorm are fp32 on CUDA (ATen layer_norm_kernel.cu), of the input's dtype on the CPU of a trace."""
    statistics = storage.op == "aten.native_layer_norm.default" and storage.shape[-1] == 1
    return "fp32" if statistics else storage.dtype


def differences(ours: Counter[Any], theirs: Counter[Any]) -> str:
    """Both differences, line by line."""
    sides = (("only ours", ours - theirs), ("only the witness's", theirs - ours))
    return "\n".join(f"{side}: {count} × {key}" for side, more in sides for key, count in sorted(more.items()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", list(MODELS))
def test_what_forward_keeps_is_what_the_trace_keeps(
    name: str, method: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "STEPS", 1)
    config, sizes = MODELS[name]
    if name == "t5" and attention == "eager":  # torch's math kernel keeps another mask on a CPU: fp32 in place of boolean
        config = {**config, "dropout_rate": 0.1}
    job, formulas = job_of(config, method, attn_implementation=attention)
    ours, theirs = estimated(job, formulas, sizes), traced(job, sizes)
    assert sum(theirs.values()) > 40
    assert ours == theirs, differences(ours, theirs)


@pytest.mark.parametrize("name", ["gemma", "t5"])
def test_layers_that_stand_as_copies_keep_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five layers the formulas run the first and the last, the trace all."""
    monkeypatch.setattr(engine, "STEPS", 1)
    config, sizes = MODELS[name]
    config = {**config, **{key: 5 for key in ("num_hidden_layers", "num_layers", "num_decoder_layers") if key in config}}
    job, formulas = job_of(config, "full")
    ours, theirs = estimated(job, formulas, sizes), traced(job, sizes)
    assert ours == theirs, differences(ours, theirs)


@pytest.mark.parametrize("name", list(MODELS))
def test_what_autograd_saves_on_a_cpu_is_alive(name: str) -> None:
    """A real run in fp32 with eager attention, where no kernel of CUDA's differs: each saved tensor is a line of ours."""
    config, sizes = MODELS[name]
    config = {**config, "attn_implementation": "eager", **dict.fromkeys(NO_DROPOUT, 0.0)}
    _, formulas = job_of(config, "full", attn_implementation="eager", dtype="fp32")
    kept: Counter[tuple[str, str]] = Counter()
    for line in alive_after_forward(formulas):
        kept[shape_name(line.shape, sizes), line.dtype] += line.copies
    saved = saved_by_autograd(config, sizes)
    assert sum(saved.values()) > 40
    by_caller = Counter({("", "fp32"): 1, ("b·s·v", "fp32"): 1})  # by the caller: loss and logits
    assert kept == saved + by_caller, differences(kept, saved + by_caller)


NO_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_probs_dropout_prob", "hidden_dropout_prob")


def saved_by_autograd(config: dict[str, Any], sizes: dict[str, int]) -> Counter[tuple[str, str]]:
    """Shape and dtype of each storage that autograd saves in a forward, without weights and the batch."""
    import transformers

    fields = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    hf_config = transformers.AutoConfig.for_model(config["model_type"], **fields)
    model = getattr(transformers, config["architectures"][0])(hf_config).train()
    ids = torch.randint(3, config["vocab_size"], (B, S))
    batch = {"input_ids": ids, "labels": ids.clone()}
    inputs = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in inputs:
            saved[tensor.untyped_storage().data_ptr()] = tensor if tensor._base is None else tensor._base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, use_cache=False)
    return Counter((shape_name(tuple(t.shape), sizes), parse_dtype(t.dtype)) for t in saved.values())

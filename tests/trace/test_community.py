"""Steps of schedulefree and grokadamw: the real packages where they are installed, and sums by hand.

Letters: n elements of all parameters in fp32.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

from peftplan import estimate
from peftplan.errors import RefusedError
from peftplan.optim import OPTIMIZERS
from peftplan.trace.community import CLASSES
from tests.trace.engine_case import HIDDEN, llama, lora, traced
from tests.trace.storages import Storages

SHAPES = ((96, 64), (64, 32), (48,))


def parameters() -> list[torch.nn.Parameter]:
    created = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    for p in created:
        p.grad = torch.ones_like(p)
    return created


def taken(optimizer: Any, *, steps: int) -> Counter[int]:
    """Storages that one more step after so many makes or touches: averages on the host are seen where ours are copies of them."""
    for _ in range(steps):
        optimizer.step()
    with Storages() as seen:
        optimizer.step()
    return Counter(seen.sizes)


@pytest.mark.parametrize(
    ("name", "package", "cls", "steps"),
    [
        ("schedule_free_adamw", "schedulefree", "AdamWScheduleFree", 1),
        ("schedule_free_radam", "schedulefree", "RAdamScheduleFree", 10),
        ("schedule_free_sgd", "schedulefree", "SGDScheduleFree", 1),
        ("grokadamw", "grokadamw", "GrokAdamW", 1),
    ],
)
def test_the_real_step_takes_the_same(name: str, package: str, cls: str, steps: int) -> None:
    module = pytest.importorskip(package)
    real = getattr(module, cls)(parameters())
    if hasattr(real, "train"):
        real.train()
    theirs, ours = taken(real, steps=steps), taken(CLASSES[name](parameters()), steps=steps)
    assert ours == theirs


@pytest.mark.parametrize(("optim", "copies"), [("schedule_free_adamw", 1), ("schedule_free_radam", 1), ("schedule_free_sgd", 0)])
def test_schedule_free_takes_copies_of_all_gradients(optim: str, copies: int) -> None:
    trace = traced(llama(), None, trainer="plain", optim=optim, seq_len=16, keep_outputs=False)
    at_step = trace.by_category("step")
    assert copies * at_step["gradients"] <= at_step.get("temporaries", 0) < copies * at_step["gradients"] + 64 * 1024
    # z, and a moment where there is one, in the parameters' dtype
    assert at_step["optimizer_states"] == (copies + 1) * at_step["gradients"]


def test_grokadamw_holds_nothing_on_the_device_between_parameters() -> None:
    trace = traced(llama(1), lora(["q_proj"], r=64), trainer="plain", optim="grokadamw", seq_len=16)
    matrix = 4 * 64 * HIDDEN  # A and B alike, fp32
    at_step = trace.by_category("step")
    assert "optimizer_states" not in at_step
    # of the second matrix: three averages, a multiple of the last, the sum with the gradient; of the first: its sum, still named
    assert at_step["temporaries"] // matrix == 6


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_torchao_over_whole_matrices_reserves_more_in_its_first_step(engine: str) -> None:
    """Rehearsed: the first step of a Llama of 24 M parameters holds 600.9 MB while it times its kernels, later ones 285.9."""
    options: dict[str, Any] = {"method": "full", "optim": "adamw_torch_8bit", "seq_len": 8}
    if engine == "trace":
        with pytest.raises(RefusedError, match="while it times its kernels"):
            estimate(llama(), engine=engine, **options)
    else:
        peaks = estimate(llama(), engine=engine, **options).peaks
        assert peaks is not None
        assert peaks.reserved is None


@pytest.mark.parametrize("name", [name for name, optimizer in OPTIMIZERS.items() if optimizer.untraced])
def test_an_optimizer_that_no_trace_steps_is_refused_with_its_reason(name: str) -> None:
    """The states are counted all the same. Where the analytic engine says no peak, it does not send to the trace."""
    options: dict[str, Any] = {"optim": name}
    if OPTIMIZERS[name].low_rank:
        options["optim_target_modules"] = "all-linear"
    with pytest.raises(RefusedError, match=f"optim: {name} cannot be traced: .*; leave out --engine trace"):
        traced(llama(), lora(), **options)
    counted = estimate(llama(), method="lora", target_modules=["q_proj"], **options)
    assert (counted.peaks is None) == name.startswith("galore")
    if counted.peaks is None:
        assert counted.not_modelled[0].startswith(f"optim {name}: it decomposes gradients into singular values")
    assert bool(counted.static.by_category()["optimizer_states"]) == (name != "lomo")

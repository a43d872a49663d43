"""Layers that are left out under ZeRO-3 are written into the log as if they had run: a run of all of them is the witness."""

from __future__ import annotations

import pytest

import peftplan
from peftplan.analytic import first_steps, steady
from peftplan.depth.skipped import NotAlikeError
from peftplan.job.inventory import Inventory
from peftplan.memory.model import Model

OF_TAPE = (
    "dims",
    "dtypes",
    "names",
    "made_in",
    "freed",
    "made_as",
    "category",
    "counts",
    "streams",
    "savers",
    "products",
    "marks",
)


def _inventory(model: str, **options: object) -> Inventory:
    question = peftplan.estimate(model, strategy="zero3", gpus=8, **options).origin  # type: ignore[arg-type]
    assert question is not None
    return question.inventory


def _steps(inventory: Inventory, *, in_full: bool) -> list[Model]:
    """The models after the first step and after a steady one."""
    new_model, program = steady.prepared(inventory, compute_capability="8.0", in_full=in_full)
    first = first_steps.first_step(inventory, new_model, program, compute_capability="8.0")
    later, _, _ = steady._run(inventory, compute_capability="8.0", late=False, in_full=in_full)
    first_steps._LAST.clear()
    return [first, later]


@pytest.mark.parametrize(
    ("model", "options", "layers"),
    [
        ("llama-3-70b", {"method": "lora", "batch_size": 4}, 80),
        ("llama-3-70b", {"method": "lora", "gradient_accumulation_steps": 3, "offload_params": "cpu"}, 80),
        ("llama-2-70b", {"method": "ia3", "gradient_checkpointing": False}, 80),
        ("qwen2.5-32b", {"method": "lora", "loss": "liger", "lora_dropout": 0.1}, 64),
    ],
)
def test_the_log_is_that_of_all_layers(model: str, options: dict[str, object], layers: int) -> None:
    inventory = _inventory(model, **options)
    for run, left_out in zip(_steps(inventory, in_full=True), _steps(inventory, in_full=False), strict=True):
        assert left_out.left_out
        assert all(3 * len(stack.layers) <= layers for stack in left_out.left_out), "few layers run"
        for field in OF_TAPE:
            assert getattr(left_out.tape, field) == getattr(run.tape, field), field
        ends = max(at for at, number in enumerate(run.tape.log) if number > 0) + 1
        assert left_out.tape.log[:ends] == run.tape.log[:ends]
        assert sorted(left_out.tape.log) == sorted(run.tape.log), "behind the step tensors may go in another order"


def test_a_job_whose_layers_differ_runs_all_of_them() -> None:
    """Of SOLAR 10.7B with a short reuse distance a log without the middle layers would free a tensor twice."""
    inventory = _inventory("solar-10.7b-v1.0", method="lora", stage3_max_reuse_distance=3 * 10**8)
    with pytest.raises(NotAlikeError):
        _steps(inventory, in_full=False)
    model, _, _ = steady._steady(inventory, compute_capability="8.0", late=False)
    assert model.left_out is None


def test_experts_that_reuse_does_not_count_bring_no_layer_nearer() -> None:
    """Without its experts 23 layers of Qwen3 235B-A22B are as far as 3e9 elements from their backward: few of 94 may not run."""
    inventory = _inventory("qwen3-235b-a22b", method="lora", target_modules=["q_proj"], stage3_max_reuse_distance=3 * 10**9)
    new_model, program = steady.prepared(inventory, compute_capability="8.0", in_full=False)
    assert first_steps.first_step(inventory, new_model, program, compute_capability="8.0").left_out == []
    first_steps._LAST.clear()


@pytest.mark.parametrize("options", [{"method": "full"}, {"method": "qlora"}, {"method": "lora", "eval_batch_size": 1}])
def test_what_may_differ_is_run_in_full(options: dict[str, object]) -> None:
    assert not steady.leaves_out(_inventory("llama-3.1-8b", **options).job)

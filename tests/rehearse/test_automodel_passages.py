"""Formulas against NeMo Automodel's recipes for retrieval, rehearsed as rank 0 (`tools.rehearsed_automodel`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.job.configs.read import read_values
from tools.rehearsed_automodel import options

FILE = Path(__file__).with_name("automodel_passages.jsonl")
ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
LARGEST = 0.016
"""Per cent of allocated bytes, 0.4 MB that the allocator leaves unsplit."""
LARGEST_STEP = 0.031
"""Per cent of `step`, 0.2 MB: numbers of whole rows, which the loss keeps until the next one."""


def job_of(row: dict[str, Any]) -> dict[str, Any]:
    """The job, on its card."""
    job = options(row)
    return job | {"gpu": f"{job.pop('gpus')}xa100-80gb"}


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['options']['trainer']} {row['model']} {row['layers']}" for row in ROWS])
def test_formulas_hold_what_the_recipe_holds(row: dict[str, Any]) -> None:
    peaks = peftplan.estimate(**job_of(row)).peaks
    assert peaks is not None
    for phase, kept in row["by_phase"].items():
        drift = 100 * (peaks.by_phase[phase] / kept - 1)
        assert abs(drift) <= (LARGEST_STEP if phase == "step" else LARGEST), (phase, drift)
    assert peaks.reserved == row["reserved"]


def test_passages_are_five_unless_said() -> None:
    five, default = (peftplan.estimate(**job_of(ROWS[0]) | {"n_passages": n}) for n in (5, None))
    assert five.peaks == default.peaks
    assert default.assumptions["n_passages"] == 5


@pytest.mark.parametrize("trainer", ["automodel-bi-encoder", "automodel-cross-encoder"])
def test_more_passages_need_more(trainer: str) -> None:
    job = job_of(ROWS[0]) | {"trainer": trainer}
    few, many = (peftplan.estimate(**job | {"n_passages": n}).peaks for n in (2, 3))
    assert few is not None
    assert many is not None
    assert few.by_phase["forward"] < many.by_phase["forward"]
    assert few.by_phase["load"] == many.by_phase["load"]


@pytest.mark.parametrize(
    "other",
    [
        {"gradient_checkpointing": True},
        {"method": "lora", "r": 8},
        {"padding": True},
        {"strategy": "ddp"},
        {"offload_params": "cpu"},
        {"reshard_after_forward": False},
        {"optim": "sgd"},
        {"attn_implementation": "eager"},
        {"model": "qwen3-4b"},
    ],
    ids=str,
)
def test_what_was_not_rehearsed_has_no_peak(other: dict[str, Any]) -> None:
    assert peftplan.estimate(**job_of(ROWS[0]) | other).peaks is None


def test_an_encoder_has_no_head() -> None:
    job = {"model": "llama-3.1-8b", "method": "full"}
    whole = peftplan.estimate(**job).trainable_parameters
    bare, scoring = (peftplan.estimate(**job, trainer=f"automodel-{kind}-encoder") for kind in ("bi", "cross"))
    assert bare.trainable_parameters == whole - 128_256 * 4096
    assert scoring.trainable_parameters == bare.trainable_parameters + 4096


DATA = "nemo_automodel.components.datasets.llm"
SHARED: dict[str, Any] = {
    "step_scheduler": {"global_batch_size": 128, "local_batch_size": 4},
    "distributed": {"strategy": "fsdp2", "dp_size": "none", "tp_size": 1, "cp_size": 1, "sequence_parallel": False},
}


def config_of(kind: str, **model: Any) -> dict[str, Any]:
    """A config of the tool's recipe."""
    apart = kind == "BiEncoder"
    lengths = {"q_max_len": 512, "p_max_len": 512} if apart else {"rerank_max_length": 512}
    data = {"model_type": "bi_encoder" if apart else "cross_encoder", "n_passages": 4}
    return SHARED | {
        "recipe": f"Train{kind}Recipe",
        "model": {
            "_target_": f"nemo_automodel.NeMoAutoModel{kind}.from_pretrained",
            "pretrained_model_name_or_path": "meta-llama/Llama-3.2-1B",
            "torch_dtype": "bfloat16",
            "pooling": "avg",
            **({} if apart else {"num_labels": 1}),
            **model,
        },
        "dataset": {"_target_": f"{DATA}.retrieval_dataset.RetrievalDatasetConfig", **data},
        "dataloader": {"collate_fn": {"_target_": f"{DATA}.{kind}Collator", **lengths}},
    }


KINDS = [("BiEncoder", "automodel-bi-encoder"), ("CrossEncoder", "automodel-cross-encoder")]


@pytest.mark.parametrize(("kind", "trainer"), KINDS)
def test_files_of_the_recipes_are_read(kind: str, trainer: str) -> None:
    plan = read_values(config_of(kind), file="a.yaml", tool="nemo-automodel")
    assert plan.unsupported == {}
    read = {name: plan.options[name] for name in ("trainer", "n_passages", "seq_len", "batch_size")}
    assert read == {"trainer": trainer, "n_passages": 4, "seq_len": 512, "batch_size": 4}


@pytest.mark.parametrize(
    "model",
    [{"pooling": "last"}, {"do_distributed_inbatch_negative": True}, {"l2_normalize": False}, {"extract_submodel": "text"}],
    ids=str,
)
def test_what_a_file_says_beyond_that_is_unsupported(model: dict[str, Any]) -> None:
    assert read_values(config_of("BiEncoder", **model), file="a.yaml", tool="nemo-automodel").unsupported


def test_queries_of_another_length_are_unsupported() -> None:
    values = config_of("BiEncoder")
    values["dataloader"]["collate_fn"]["q_max_len"] = 128
    assert "recipe" in read_values(values, file="a.yaml", tool="nemo-automodel").unsupported

"""Evaluations: they have a phase where their formula was rehearsed; elsewhere those with more rows than a training step, or with
logits that it leaves out, make the peak a lower bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.job import evaluating
from peftplan.job.configs.plan import Tool, bound
from peftplan.job.configs.read import read_values

ROWS = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
NEMO = {
    "step_scheduler.local_batch_size": 2,
    "validation_dataset._target_": "nemo_automodel.components.datasets.llm.squad.make_squad_dataset",
}

HELD_OUT = {"micro_batch_size": 2, "val_set_size": 0.1, "evals_per_epoch": 2}

UNSLOTH = {
    "args.call": "SFTConfig",
    "trainer.call": "SFTTrainer",
    "args.per_device_train_batch_size": 4,
    "args.eval_strategy": "steps",
}
GRPO = {"args.call": "GRPOConfig", "trainer.call": "GRPOTrainer"}
EIGHT = {"args.per_device_eval_batch_size": 8}


@pytest.mark.parametrize(
    ("tool", "values", "key"),
    [
        ("trl", {**ROWS, "eval_strategy": "steps"}, "per_device_eval_batch_size"),
        ("trl", {"per_device_train_batch_size": 2, "eval_strategy": "steps"}, "per_device_eval_batch_size"),  # 8 by default
        ("llamafactory", {**ROWS, "eval_strategy": "steps"}, "per_device_eval_batch_size"),
        ("swift", {**ROWS, "val_dataset": "mine"}, "per_device_eval_batch_size"),
        ("axolotl", {**HELD_OUT, "eval_batch_size": 4}, "eval_batch_size"),
        ("torchtune", {"batch_size": 2, "batch_size_val": 4, "run_val_every_n_steps": 10}, "batch_size_val"),
        ("nemo-automodel", {**NEMO, "validation_dataloader.batch_size": 4}, "validation_dataloader.batch_size"),
        ("unsloth", UNSLOTH | {"args.per_device_train_batch_size": 2}, "args.per_device_eval_batch_size"),
        ("unsloth", UNSLOTH | GRPO | EIGHT, "args.per_device_eval_batch_size"),
    ],
)
def test_more_rows_than_in_training(tool: Tool, values: dict[str, object], key: str) -> None:
    plan = read_values(values, file="a.yml", tool=tool)
    assert plan.unsupported[key].effect == "raises"
    assert bound({key: plan.unsupported[key]}) == "at_least"


@pytest.mark.parametrize(
    ("tool", "values", "key"),
    [
        ("trl", ROWS, "per_device_eval_batch_size"),  # eval_strategy is `no` by default
        ("trl", {**ROWS, "eval_strategy": "steps", "per_device_eval_batch_size": 2}, "per_device_eval_batch_size"),
        ("swift", {**ROWS, "val_dataset": "mine", "eval_strategy": "no"}, "per_device_eval_batch_size"),
        ("swift", {**ROWS, "val_dataset": "mine", "save_strategy": "no"}, "per_device_eval_batch_size"),
        ("swift", ROWS, "per_device_eval_batch_size"),
        ("axolotl", HELD_OUT, "eval_batch_size"),  # axolotl takes micro_batch_size
        ("axolotl", {**HELD_OUT, "evals_per_epoch": None, "eval_batch_size": 4}, "eval_batch_size"),  # `no` by default
        ("axolotl", {**HELD_OUT, "evals_per_epoch": None, "eval_strategy": "no", "eval_batch_size": 4}, "eval_batch_size"),
        ("torchtune", {"batch_size": 2, "batch_size_val": 4}, "batch_size_val"),
        ("nemo-automodel", NEMO, "validation_dataloader.batch_size"),
        ("unsloth", UNSLOTH, "args.per_device_eval_batch_size"),  # 4 by Unsloth's default
        ("unsloth", UNSLOTH | EIGHT, "args.per_device_eval_batch_size"),
    ],
)
def test_no_evaluation_or_no_more_rows(tool: Tool, values: dict[str, object], key: str) -> None:
    assert key not in read_values(values, file="a.yml", tool=tool).unsupported


@pytest.mark.parametrize(
    ("options", "exceeds"),
    [
        ("--gradient_accumulation_steps 32", False),
        ("--gradient_accumulation_steps 4", True),  # four rows a rollout, eight an evaluation
        ("--gradient_accumulation_steps 32 --local_rollout_forward_batch_size 4", True),
    ],
)
def test_an_evaluation_of_ppo_is_part_of_a_rollout(tmp_path: Path, options: str, exceeds: bool) -> None:
    file = tmp_path / "a.sh"
    command = "python examples/scripts/ppo/ppo.py --model_name_or_path EleutherAI/pythia-1b-deduped --eval_strategy steps"
    file.write_text(f"{command} --per_device_train_batch_size 1 {options}\n")
    assert ("per_device_eval_batch_size" in peftplan.read_config(file).unsupported) is exceeds


AXOLOTL = {
    "micro_batch_size": 2,
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_fused_linear_cross_entropy": True,
    "eval_steps": 10,
}
LLAMAFACTORY = {"stage": "sft", "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "eval_strategy": "steps"}


@pytest.mark.parametrize(
    ("tool", "values", "key"),
    [
        ("axolotl", {**AXOLOTL, "val_set_size": 8}, "val_set_size"),
        ("axolotl", {**AXOLOTL, "test_datasets": "mine"}, "test_datasets"),
        ("llamafactory", {**LLAMAFACTORY, "enable_liger_kernel": True}, "eval_strategy"),
    ],
)
def test_logits_of_an_evaluation_beside_liger_s_loss(tool: Tool, values: dict[str, object], key: str) -> None:
    """Its forward leaves logits out in training alone. LoRA of six layers of Qwen2.5 0.5B by axolotl, 2 x 1024 tokens, rehearsed:
    594,902,016 bytes without an evaluation, 3,596,961,792 with one of as many rows. Without Liger's loss the step has more.
    The same job by LLaMA-Factory 0.9.5: 677,430,784 in backward, 3,601,850,368 in the evaluation.
    """
    assert read_values(values, file="a.yml", tool=tool).unsupported[key].effect == "raises"
    fused = {"liger_fused_linear_cross_entropy", "enable_liger_kernel"}
    without = {name: value for name, value in values.items() if name not in fused}
    assert key not in read_values(without, file="a.yml", tool=tool).unsupported


@pytest.mark.parametrize("joined", [{"packing": True}, {"padding_free": True}])
@pytest.mark.parametrize(("rows", "evaluated"), [((2, 4), 2), ((2, 2), 1), ((2, 3), None), ((4, 2), None)])
def test_ms_swift_evaluates_one_row_too(joined: dict[str, object], rows: tuple[int, int], evaluated: int | None) -> None:
    """Its collator joins the rows of any batch into one (swift/template/base.py:1801, :2075): 4 evaluated rows of 512 tokens
    beside 2 trained ones were counted as 4 of 1,024 (6.65 GB; 3.54 rehearsed), packed rows of training as one of them."""
    values = {**joined, "split_dataset_ratio": 0.1, "max_length": 512, "attn_impl": "flash_attn"}
    sizes = dict(zip(("per_device_train_batch_size", "per_device_eval_batch_size"), rows, strict=True))
    plan = read_values({**values, **sizes}, file="a.yml", tool="swift")
    assert (plan.options["batch_size"], plan.options["seq_len"]) == (1, rows[0] * 512)
    assert plan.options.get("eval_batch_size") == evaluated
    assert ("per_device_eval_batch_size" in plan.unsupported) is (rows[1] > rows[0])  # an estimate takes it out if counted


def test_no_change_is_said_to_fit_beside_a_lower_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA was advised as `fits`, with the room that the steps of training leave."""
    monkeypatch.setattr(evaluating, "REHEARSED", {})
    file = tmp_path / "a.yml"
    file.write_text(
        "model_name_or_path: meta-llama/Llama-2-7b-hf\nuse_peft: true\ndataset_name: mine\n"
        "per_device_train_batch_size: 1\neval_strategy: steps\n"
    )
    (card,) = peftplan.estimate(config=file, gpu="t4").to_dict()["gpus"]
    assert (card["verdict"], card["needed_is_lower_bound"]) == ("does_not_fit", True)
    assert {change["verdict"] for change in card["advice"]} <= {None, "does_not_fit"}
    assert card["advice"]


def test_an_evaluation_with_a_formula_is_a_phase(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text(
        "model_name_or_path: HuggingFaceTB/SmolLM2-135M\nuse_peft: true\ndataset_name: mine\nmax_length: 512\n"
        "per_device_train_batch_size: 1\neval_strategy: steps\n"
    )
    result = peftplan.estimate(config=file)
    assert (result.bound, result.config and result.config["unsupported"]) == (None, {})
    assert (result.peaks and result.peaks.phase, result.assumptions.get("eval_batch_size")) == ("evaluate", 8)
    assert peftplan.estimate(config=file, engine="trace").bound == "at_least"


def test_an_evaluation_without_one_is_a_lower_bound() -> None:
    result = peftplan.estimate("smollm2-135m", method="lora", trainer="trl-tpo", seq_len=512, eval_batch_size=8)
    assert (result.bound, result.peaks and "evaluate" in result.peaks.by_phase) == ("at_least", False)


@pytest.mark.parametrize("options", [{}, {"strategy": "zero2", "gpus": 4}, {"strategy": "zero3", "gpus": 4}])
def test_arrays_of_sizes_have_evaluations_too(options: dict[str, Any]) -> None:
    result = peftplan.estimate("smollm2-135m", method="lora", seq_len=512, eval_batch_size=8, **options)
    grid = result.at(batch_size=[1, 2, 16], seq_len=[512, 1000, 512])
    for place, (rows, tokens) in enumerate(((1, 512), (2, 1000), (16, 512))):
        peaks = result.at(batch_size=rows, seq_len=tokens).peaks
        assert peaks is not None
        assert grid.requested_by_phase["evaluate"][place] == peaks.requested["evaluate"]  # type: ignore[attr-defined]


def test_an_evaluation_does_not_depend_on_the_rows_or_dropout_of_training() -> None:
    def evaluated(**options: object) -> int:
        peaks = peftplan.estimate("smollm2-135m", method="lora", seq_len=512, eval_batch_size=4, **options).peaks  # type: ignore[arg-type]
        assert peaks is not None
        return peaks.requested["evaluate"]  # type: ignore[attr-defined]

    assert evaluated() == evaluated(batch_size=8) == evaluated(lora_dropout=0.1) == evaluated(gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ({}, 2),
        ({"eval_batch_size": 4}, 4),
        ({"sample_packing": True, "attn_implementation": "sdpa", "eval_batch_size": 4}, 2),
        ({"sample_packing": True, "attn_implementation": "flash_attention_2"}, 1),  # of 2 x sequence_len
        ({"sample_packing": True, "attn_implementation": "flash_attention_2", "eval_sample_packing": False}, None),
        ({"eval_strategy": "no"}, None),
        ({"evals_per_epoch": 0}, None),
        ({"evals_per_epoch": None}, None),
        ({"evals_per_epoch": None, "eval_steps": 100}, 2),
        ({"evals_per_epoch": None, "eval_strategy": "epoch"}, 2),
        ({"evals_per_epoch": None, "evaluation_strategy": "epoch"}, 2),
    ],
)
def test_axolotl_evaluates_where_it_is_told_when_and_packs_as_in_training(values: dict[str, object], rows: int | None) -> None:
    plan = read_values({**HELD_OUT, **values}, file="a.yml", tool="axolotl")
    assert plan.options.get("eval_batch_size") == rows


def test_logits_for_metrics_are_a_lower_bound(tmp_path: Path) -> None:
    """Of a language model, with as many rows as a training step has; a classification's are a few bytes."""
    script = """
import transformers
model = transformers.{auto}.from_pretrained("HuggingFaceTB/SmolLM2-135M")
args = transformers.TrainingArguments("out", eval_strategy="steps", prediction_loss_only={loss_only})
trainer = transformers.Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
trainer.train()
"""
    bounds = []
    for auto, loss_only in (
        ("AutoModelForCausalLM", False),
        ("AutoModelForCausalLM", True),
        ("AutoModelForSequenceClassification", False),
    ):
        file = tmp_path / "train.py"
        file.write_text(script.format(auto=auto, loss_only=loss_only))
        bounds.append(peftplan.estimate(config=file).bound)
    assert bounds == ["at_least", None, None]


@pytest.mark.parametrize(("rows", "phase"), [(2, "backward"), (8, "evaluate")])
def test_evaluations_behind_training_are_counted(tmp_path: Path, rows: int, phase: str) -> None:
    """`run_clm.py` keeps what it predicts of each token for its metrics, which the data decide."""
    file = tmp_path / "run.sh"
    file.write_text(
        "python run_clm.py --model_name_or_path gpt2 --dataset_name mine --do_train --do_eval --output_dir out "
        f"--per_device_train_batch_size 2 --per_device_eval_batch_size {rows}\n"
    )
    estimate = peftplan.estimate(config=file)
    assert estimate.bound is None
    assert estimate.peaks is not None
    assert estimate.peaks.phase == phase
    assert estimate.config is not None
    assert "8 bytes of each evaluated token" in estimate.config["assumed"]["eval_batch_size"]


def test_fewer_evaluated_rows_are_advised_first() -> None:
    """Nothing that trains changes. Liger's loss came first, another trainer and QLoRA next."""
    (card,) = peftplan.estimate("llama-3.1-8b", method="lora", seq_len=1024, eval_batch_size=8, gpu="rtx-4090").to_dict()["gpus"]
    first = card["advice"][0]
    assert (first["options"], first["verdict"]) == ({"eval_batch_size": 1}, "fits")


def test_training_arguments_say_an_evaluation() -> None:
    """They had no effect."""
    transformers = pytest.importorskip("transformers")
    for strategy, evaluates in (("no", False), ("steps", True)):
        arguments = transformers.TrainingArguments("out", eval_strategy=strategy, eval_steps=10, use_cpu=True)
        result = peftplan.estimate("smollm2-135m", method="lora", seq_len=512, training_args=arguments)
        assert result.peaks is not None
        assert ("evaluate" in result.peaks.by_phase) is evaluates

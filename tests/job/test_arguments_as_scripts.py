"""Arguments of a trainer as an object and the same call in a script: one job, the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan

LORA = {"peft_type": "LORA", "r": 16, "target_modules": ["q_proj", "v_proj"]}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 10}
CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("TrainingArguments", each)
        for each in (
            {}, {"neftune_noise_alpha": 5}, {"label_smoothing_factor": 0.1}, {"bf16": True}, {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, EVALUATED,
            {"use_liger_kernel": True}, {"optim": "adamw_bnb_8bit"}, {"auto_find_batch_size": True}, {"max_grad_norm": 0},
            {"torch_empty_cache_steps": 4}, {"optim": "galore_adamw", "optim_target_modules": ["attn"]}, {"torch_compile": True},
            {**EVALUATED, "per_device_eval_batch_size": 16},
        )
    ),
    *(
        ("SFTConfig", each)
        for each in (
            {}, {"max_length": 4096}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}, {"padding_free": True},
            {"loss_type": "dft"}, {"assistant_only_loss": True}, {"activation_offloading": True}, EVALUATED, {"max_length": None},
            {"model_init_kwargs": {"dtype": "bfloat16"}}, {"neftune_noise_alpha": 5}, {"loss_type": "chunked_nll"},
            {"use_liger_kernel": True},
        )
    ),
    *(
        ("DPOConfig", each)
        for each in (
            {}, {"precompute_ref_log_probs": True}, {"loss_type": ["sigmoid", "sft"]}, {"padding_free": True},
            {"max_length": 512},
        )
    ),
    *(
        ("GRPOConfig", each)
        for each in (
            {}, {"num_generations": 4, "max_completion_length": 128}, {"beta": 0.04}, {"beta": 1.0}, {"use_vllm": True},
        )
    ),
    ("RewardConfig", {}), ("KTOConfig", {}), ("KTOConfig", {"loss_type": "apo_zero_unpaired"}),
]  # fmt: skip
"""Class of arguments, and what they say."""


def of_object(args: object, task: str) -> tuple[int | None, int | None, str | None]:
    """Allocated and reserved bytes, and the bound, of a model that the program has loaded on the host."""
    adapter = {**LORA, "task_type": task}
    try:
        result = peftplan.estimate("smollm2-135m", peft_config=adapter, training_args=args, device_map="none")
    except peftplan.InputError as error:
        return None, None, "unknown" if error.field.startswith("training_args.") else error.field
    return peaks_of(result.to_dict())


def of_script(name: str, fields: dict[str, Any], task: str, folder: Path) -> tuple[int | None, int | None, str | None]:
    """The same of a script."""
    loaded = f"AutoModelFor{'SequenceClassification' if task == 'SEQ_CLS' else 'CausalLM'}"
    trainer = "Trainer" if name == "TrainingArguments" else name.replace("Config", "Trainer")
    adapted = ", peft_config=adapter"
    lines = [
        f"from transformers import {loaded}, Trainer, TrainingArguments",
        "from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer",
        "from trl import SFTConfig, SFTTrainer",
        "from peft import LoraConfig, get_peft_model",
        f"model = {loaded}.from_pretrained('HuggingFaceTB/SmolLM2-135M')",
        f"adapter = LoraConfig(r=16, target_modules=['q_proj', 'v_proj'], task_type={task!r})",
        f"args = {name}(output_dir='out', {', '.join(f'{key}={value!r}' for key, value in fields.items())})",
    ]
    if trainer == "Trainer":
        lines, adapted = [*lines, "model = get_peft_model(model, adapter)"], ""
    lines += [f"trainer = {trainer}(model=model, args=args, train_dataset=data{adapted})", "trainer.train()", ""]
    (folder / "train.py").write_text("\n".join(lines), encoding="utf-8")
    return peaks_of(peftplan.estimate(config=folder / "train.py").to_dict())


def peaks_of(document: dict[str, Any]) -> tuple[int | None, int | None, str | None]:
    """Peaks, and what they are a bound of."""
    memory, config = document["memory"], document.get("config")
    return memory["peak_allocated"], memory["peak_reserved"], config and config["bound"]


def stand_in(name: str, fields: dict[str, Any]) -> object:
    """An object of a class of this name, which says these fields alone."""
    stated = {"per_device_train_batch_size": 8, **fields}
    return type(name, (), {**stated, "to_dict": lambda self: stated})()


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_an_object_is_its_call_in_a_script(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    task = "SEQ_CLS" if name == "RewardConfig" else "CAUSAL_LM"
    assert of_object(stand_in(name, fields), task) == of_script(name, fields, task, tmp_path)


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_an_object_of_the_library_is_its_call_in_a_script(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Its class fills in what is not said (`__post_init__`)."""
    module = pytest.importorskip("transformers" if name == "TrainingArguments" else "trl")
    task = "SEQ_CLS" if name == "RewardConfig" else "CAUSAL_LM"
    args = getattr(module, name)(output_dir="out", report_to=[], use_cpu=True, **{"bf16": False} | fields)
    script = {"bf16": False} | fields
    assert of_object(args, task) == of_script(name, script, task, tmp_path)

"""Trainers of TRL beside SFTTrainer: of pairs, of labelled completions, of rewards, with a teacher; axolotl's own of them."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .job import AXOLOTL, DTYPES, ROWS, adapter, arguments, evaluated, load, rows

WRITING = ("grpo", "rloo", "ssd")
"""Trainers whose policy writes the completions."""


def with_preferences(job: argparse.Namespace) -> None:
    """TRL's trainers of pairs, of single completions with a label, and of completions that the model writes itself.

    Their arguments come first: under ZeRO-3 they decide how the model is loaded.
    """
    name = job.trainer.partition("-")[2]
    config_class, trainer_class = classes(job, name)
    settings = {
        "beta": job.beta,
        "loss_type": job.loss_type.split(",") if name == "dpo" and job.loss_type else job.loss_type,
        "precompute_ref_log_probs": job.precompute_ref_log_probs or None,
        "num_generations": job.num_generations,
        "steps_per_generation": job.steps_per_generation,
        "max_completion_length": job.max_completion_length if name in WRITING else None,
        "max_length": None if name in WRITING else job.seq_len,
    }
    shape_config = AutoConfig.from_pretrained(job.model)
    generative = AutoModelForImageTextToText if hasattr(shape_config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        shape = generative.from_config(shape_config)
    fields = {key: value for key, value in settings.items() if value is not None}
    config = config_class(**fields, **arguments(job, shape))
    model = load(job, AutoModelForSequenceClassification if name == "reward" else generative)
    peft = adapter(job)
    if job.trainer in AXOLOTL and name not in ("dpo", "kto") and peft is not None:  # HFRLTrainerBuilder.build
        model, peft = get_peft_model(model, peft), None
        model.enable_input_require_grads()
    rewards = (
        {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]} if name in ("grpo", "rloo") else {}
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dataset = texts(job, name, tokenizer)
    if job.tool_turns:
        answer_completions(job, trainer_class, tokenizer)
        dataset = dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
        rewards = {"reward_funcs": lambda completions, **_: [1.0] * len(completions), "environment_factory": Environment}
    trainer_class(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        **({} if peft is None else {"peft_config": peft}),
        **rewards,
        **evaluated(job, dataset),
    ).train()


TURNS = (
    "{% for message in messages %}{{ message.get('content') or '' }}{% for call in message.get('tool_calls') or [] %}"
    "{{ call.function.name }}{{ call.function.arguments }}{% endfor %}{{ eos_token }}{% endfor %}"
)
"""A chat template that ends each turn with a token of its own."""


class Environment:
    """It has one tool."""

    def reset(self, **_: object) -> None:
        """Start again."""

    def answer(self) -> str:
        """Answer.

        Returns:
            An answer.
        """
        return "done"


def answer_completions(job: argparse.Namespace, trainer_class: Any, tokenizer: Any) -> None:
    """Let each completion of the first turn call a tool, whose answer is the last that has room; then the policy goes on.

    The card cannot say what is written, nor where it ends.
    """
    from trl.trainer import grpo_trainer

    called = [{"type": "function", "function": {"name": "answer", "arguments": {}}}]
    tokenizer.chat_template, tokenizer.response_template = TURNS, {}
    grpo_trainer.parse_response = lambda *_, **__: {"role": "assistant", "content": "", "tool_calls": called}
    turn = trainer_class._generate_single_turn

    def ended(trainer: Any, prompt_ids: list[list[int]], *rest: Any, **more: Any) -> Any:
        completions, logprobs = turn(trainer, prompt_ids, *rest, **more)
        answer = trainer._get_tool_suffix_ids([{"role": "tool", "name": "answer", "content": Environment().answer()}])
        again = len(prompt_ids[0]) == job.seq_len
        print("turn", len(prompt_ids), len(prompt_ids[0]), len(completions[0]), len(answer), flush=True)
        return completions if again else [c[: job.max_completion_length - len(answer)] for c in completions], logprobs

    trainer_class._generate_single_turn = ended


def with_teacher(job: argparse.Namespace) -> None:
    """TRL's trainers with a teacher in the student's dtype: GKDTrainer and GOLDTrainer on rows of one length, none of which the
    student ends itself, since that holds less; DistillationTrainer on what the student writes.
    """
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    completion = job.max_completion_length or job.seq_len - 1

    def batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = torch.tensor([example["input_ids"] for example in examples])
        prompt = tokens[:, : job.seq_len - completion]
        labels = tokens.clone()
        labels[:, : prompt.shape[1]] = -100
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": labels,
            "prompts": prompt,
            "prompt_attention_mask": torch.ones_like(prompt),
        }

    model = load(job)
    teacher = AutoModelForCausalLM.from_pretrained(job.teacher_model, dtype=DTYPES[job.dtype])
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if job.trainer == "trl-distillation":
        DistillationTrainer(
            model=model,
            teacher_model=teacher,
            args=DistillationConfig(max_completion_length=completion, **arguments(job, model)),
            train_dataset=texts(job, "grpo", tokenizer),
            processing_class=tokenizer,
            peft_config=adapter(job),
        ).train()
        return
    weight = {} if job.beta is None else {"beta": job.beta}
    settings = {"max_length": job.seq_len, "lmbda": 0.0, **weight, **arguments(job, model)}
    if job.trainer == "trl-gold":
        trainer_class, config = GOLDTrainer, GOLDConfig(max_completion_length=completion, **settings)
    else:
        trainer_class, config = GKDTrainer, GKDConfig(max_new_tokens=completion, **settings)
    trainer_class(
        model=model,
        teacher_model=teacher,
        args=config,
        data_collator=batch,
        train_dataset=rows(job, model).remove_columns("labels"),
        processing_class=tokenizer,
        peft_config=adapter(job),
    ).train()


EXPERIMENTAL = ("orpo", "cpo", "tpo", "ssd")
"""Trainers that trl calls experimental; the last one is in trl before 1.11."""


def classes(job: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """The class of the arguments and that of the trainer."""
    called = "Reward" if name == "reward" else name.upper()
    if job.trainer in AXOLOTL:
        return of_axolotl(called)
    home = importlib.import_module(f"trl.experimental.{name}" if name in EXPERIMENTAL else "trl")
    return getattr(home, f"{called}Config"), getattr(home, f"{called}Trainer")


def of_axolotl(called: str) -> tuple[Any, Any]:
    """Those of axolotl, which replaces two functions of trl before it imports its trainers (`PatchManager`)."""
    import trl.trainer.utils
    from axolotl.monkeypatch.trainer.utils import entropy_from_logits, selective_log_softmax

    trl.trainer.utils.selective_log_softmax = selective_log_softmax
    trl.trainer.utils.entropy_from_logits = entropy_from_logits
    from axolotl.core import training_args
    from axolotl.core.trainers import dpo
    from axolotl.core.trainers import trl as trainers

    if called == "DPO":
        return dpo.DPOStrategy.get_training_args_class(), dpo.DPOStrategy.get_trainer_class()
    return getattr(training_args, f"Axolotl{called}Config"), getattr(trainers, f"Axolotl{called}Trainer")


def texts(job: argparse.Namespace, name: str, tokenizer: Any) -> Dataset:
    """Rows of text, of which the tokenizer makes as many tokens as the job says, the one at the end included.

    With padding the completions of a batch differ in length.
    """

    def text(word: str, tokens: int) -> str:
        every = len(word * ROWS) // len(tokenizer(word * ROWS, add_special_tokens=False)["input_ids"])
        return (word * tokens)[: every * tokens]

    completion = job.max_completion_length or job.seq_len - 1
    if job.trainer in AXOLOTL and name in ("orpo", "cpo") and tokenizer.bos_token_id is not None:
        completion -= 1  # trl 1.9 cuts a row that is too long down to its first tokens
    prompt = text("ask ", job.seq_len - (job.max_completion_length or job.seq_len - 1) - job.tool_turns)
    others = completion // 2 if job.padding else completion
    if name in WRITING:
        return Dataset.from_dict({"prompt": [prompt] * ROWS})
    if name == "kto":
        answers = [text("good", completion - 1), text("poor", others - 1)] * (ROWS // 2)
        labels = [True, job.trainer in AXOLOTL] * (ROWS // 2)  # axolotl's memory depends on the kinds: of one, it is largest
        return Dataset.from_dict({"prompt": [prompt] * ROWS, "completion": answers, "label": labels})
    pair = {"chosen": [text("good", completion - 1)] * ROWS, "rejected": [text("poor", others - 1)] * ROWS}
    third = {"reference": [text("fine", completion - 1)] * ROWS} if name == "tpo" else {}
    return Dataset.from_dict({"prompt": [prompt] * ROWS, **pair, **third})

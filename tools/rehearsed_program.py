"""One job as a program of the libraries that it names: nothing of peftplan runs in it.

    python tools/rehearsed_program.py MODEL [OPTIONS of `peftplan estimate`]

It says what a user would write for those options, with Trainer, SFTTrainer or a loop, on a rank's own share of several GPUs too.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = 256
FLAGS = argparse.BooleanOptionalAction
CLASSIFIERS = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
PER_SAMPLE = ("ForSequenceClassification", "ForImageClassification")
"""Ends of names of classes that want one label per sample."""
OTHER_TRAINERS = ("trl-dpo", "trl-kto", "trl-reward", "trl-orpo", "trl-cpo", "trl-grpo", "trl-rloo", "trl-gkd")


def options() -> argparse.Namespace:
    """The options that a job may have, under the names of `peftplan estimate`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--method", default="lora", choices=("full", "lora", "qlora"))
    parser.add_argument("--task-type", choices=tuple(CLASSIFIERS))
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--target-modules", default="all-linear")
    parser.add_argument("--use-dora", action=FLAGS, default=False)
    parser.add_argument("--use-rslora", action=FLAGS, default=False)
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--autocast", choices=("none", "bf16", "fp16"))
    parser.add_argument("--trainer", default="transformers", choices=("transformers", "trl", "plain", *OTHER_TRAINERS))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action=FLAGS)
    parser.add_argument("--use-reentrant", action=FLAGS)
    parser.add_argument("--optim")
    parser.add_argument("--attn-implementation")
    parser.add_argument("--max-completion-length", type=int)
    parser.add_argument("--precompute-ref-log-probs", action=FLAGS, default=False)
    parser.add_argument("--beta", type=float)
    parser.add_argument("--loss-type")
    parser.add_argument("--num-generations", type=int)
    parser.add_argument("--steps-per-generation", type=int)
    parser.add_argument("--padding", action=FLAGS, default=False)
    parser.add_argument("--strategy", choices=("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3"))
    parser.add_argument("--offload-params", choices=("none", "cpu"), default="none")
    parser.add_argument("--offload-optimizer", choices=("none", "cpu"), default="none")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--local_rank", type=int)
    return parser.parse_args()


def checkpoints(job: argparse.Namespace) -> bool:
    """Whether layers are recomputed: both trainers do so unless told otherwise."""
    return job.trainer != "plain" if job.gradient_checkpointing is None else job.gradient_checkpointing


def class_of(job: argparse.Namespace, config: Any) -> Any:
    """The class that a task wants, else the one that the model's config names."""
    return CLASSIFIERS[job.task_type] if job.task_type else getattr(transformers, config.architectures[0])


def load(job: argparse.Namespace, auto_class: Any = AutoModelForCausalLM) -> Any:
    """The model, as it is passed to a trainer."""
    quantization = None
    if job.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[job.dtype],
        )
    attention = {"attn_implementation": job.attn_implementation} if job.attn_implementation else {}
    if job.trainer == "trl-reward":
        attention["num_labels"] = 1
    return auto_class.from_pretrained(job.model, dtype=DTYPES[job.dtype], quantization_config=quantization, **attention)


def adapter(job: argparse.Namespace) -> LoraConfig | None:
    """peft's config of the method, None for full fine-tuning."""
    if job.method == "full":
        return None
    modules = job.target_modules if job.target_modules == "all-linear" else job.target_modules.split(",")
    return LoraConfig(r=job.r, target_modules=modules, use_dora=job.use_dora, use_rslora=job.use_rslora, task_type=task_of(job))


def task_of(job: argparse.Namespace) -> str | None:
    """peft's task: that of the job, else the one that the model's class has."""
    config = AutoConfig.from_pretrained(job.model)
    if job.trainer == "trl-reward":
        return "SEQ_CLS"
    if config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return job.task_type or ("CAUSAL_LM" if config.architectures[0].endswith(("ForCausalLM", "LMHeadModel")) else None)


def sharding(job: argparse.Namespace, model: Any) -> dict[str, Any]:
    """TrainingArguments' fields for several GPUs."""
    strategy = job.strategy or "ddp"
    if strategy.startswith("fsdp"):
        layers = {"transformer_layer_cls_to_wrap": list(model._no_split_modules)}
        offload = " offload" if job.offload_params == "cpu" else ""
        return {"fsdp": f"full_shard auto_wrap{offload}", "fsdp_config": {"version": int(strategy[-1]), **layers}}
    if strategy.startswith("zero"):
        return {"deepspeed": deepspeed(job, int(strategy[-1]))}
    return {}


def deepspeed(job: argparse.Namespace, stage: int) -> dict[str, Any]:
    """DeepSpeed's config, with what transformers resolves left to it."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True}
    if stage == 3:
        zero |= dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
    for what, place in (("offload_param", job.offload_params), ("offload_optimizer", job.offload_optimizer)):
        if place != "none":
            zero[what] = {"device": place, "pin_memory": True}
    automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping", "gradient_accumulation_steps")
    return {
        **dict.fromkeys(automatic, "auto"),
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }


def arguments(job: argparse.Namespace, model: Any) -> dict[str, Any]:
    """TrainingArguments' fields that both trainers take."""
    autocast = job.autocast or "bf16"
    reentrant = {} if job.use_reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": job.use_reentrant}}
    return {
        "output_dir": "out",
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "gradient_checkpointing": checkpoints(job),
        **reentrant,
        "optim": job.optim or "adamw_torch_fused",
        "bf16": autocast == "bf16",
        "fp16": autocast == "fp16",
        "max_steps": 20,
        "report_to": "none",
        **(sharding(job, model) if job.strategy or "WORLD_SIZE" in os.environ else {}),
    }


def rows(job: argparse.Namespace, model: Any) -> Any:
    """Rows of as many tokens as the job says, or of one picture."""
    if hasattr(model.config, "image_size"):
        size, channels = model.config.image_size, model.config.num_channels
        return [{"pixel_values": torch.zeros(channels, size, size), "labels": 0}] * ROWS
    tokens = [(7 * place) % model.config.get_text_config().vocab_size for place in range(job.seq_len)]
    labels = 0 if type(model).__name__.endswith(PER_SAMPLE) else tokens
    return Dataset.from_dict({"input_ids": [tokens] * ROWS, "labels": [labels] * ROWS})


def with_trl(job: argparse.Namespace) -> None:
    """SFTTrainer, which makes the adapter itself."""
    from trl import SFTConfig, SFTTrainer

    model = load(job)
    config = SFTConfig(max_length=job.seq_len, **arguments(job, model))
    SFTTrainer(
        model=model, args=config, train_dataset=rows(job, model).remove_columns("labels"), peft_config=adapter(job)
    ).train()


def with_preferences(job: argparse.Namespace) -> None:
    """TRL's trainers of pairs, of single completions with a label, and of completions that the model writes itself."""
    import trl
    from trl.experimental import cpo, gkd, orpo

    homes = {"orpo": orpo, "cpo": cpo, "gkd": gkd}
    name = job.trainer.removeprefix("trl-")
    home, called = homes.get(name, trl), "Reward" if name == "reward" else name.upper()
    stated = {
        "beta": job.beta,
        "loss_type": job.loss_type,
        "precompute_ref_log_probs": job.precompute_ref_log_probs or None,
        "num_generations": job.num_generations,
        "steps_per_generation": job.steps_per_generation,
        "max_completion_length": job.max_completion_length if name in ("grpo", "rloo") else None,
        "max_length": None if name in ("grpo", "rloo") else job.seq_len,
    }
    model = load(job, AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM)
    fields = {key: value for key, value in stated.items() if value is not None}
    config = getattr(home, f"{called}Config")(**fields, **arguments(job, model))
    rewards = (
        {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]} if name in ("grpo", "rloo") else {}
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    getattr(home, f"{called}Trainer")(
        model=model,
        args=config,
        train_dataset=texts(job, name, tokenizer),
        processing_class=tokenizer,
        peft_config=adapter(job),
        **rewards,
    ).train()


def texts(job: argparse.Namespace, name: str, tokenizer: Any) -> Dataset:
    """Rows of text, of which the tokenizer makes as many tokens as the job says, the one at the end included.

    With padding the completions of a batch differ in length.
    """

    def text(word: str, tokens: int) -> str:
        every = len(word * ROWS) // len(tokenizer(word * ROWS, add_special_tokens=False)["input_ids"])
        return (word * tokens)[: every * tokens]

    completion = job.max_completion_length or job.seq_len - 1
    prompt = text("ask ", job.seq_len - completion)
    others = completion // 2 if job.padding else completion
    if name in ("grpo", "rloo"):
        return Dataset.from_dict({"prompt": [prompt] * ROWS})
    if name == "kto":
        answers = [text("good", completion - 1), text("poor", others - 1)] * (ROWS // 2)
        return Dataset.from_dict({"prompt": [prompt] * ROWS, "completion": answers, "label": [True, False] * (ROWS // 2)})
    pair = {"chosen": [text("good", completion - 1)] * ROWS, "rejected": [text("poor", others - 1)] * ROWS}
    return Dataset.from_dict({"prompt": [prompt] * ROWS, **pair})


def with_trainer(job: argparse.Namespace) -> None:
    """transformers' Trainer. Its arguments come first: under ZeRO-3 they decide how the model is loaded."""
    config = AutoConfig.from_pretrained(job.model)
    wanted = class_of(job, config)
    with torch.device("meta"):
        shape = wanted.from_config(config) if job.task_type else wanted(config)
    training = TrainingArguments(**arguments(job, shape))
    model = load(job, wanted)
    if job.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpoints(job))
    if (peft := adapter(job)) is not None:
        model = get_peft_model(model, peft)
        if checkpoints(job):
            model.enable_input_require_grads()
    Trainer(model=model, args=training, train_dataset=rows(job, shape)).train()


def with_loop(job: argparse.Namespace) -> None:
    """A loop by hand: the model is on its device before the adapter is made."""
    model = load(job)
    if job.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpoints(job))
    else:
        model = model.cuda()
    if (peft := adapter(job)) is not None:
        model = get_peft_model(model, peft)
    if checkpoints(job):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    shape = (job.batch_size, job.seq_len)
    for _ in range(20):
        for _ in range(job.gradient_accumulation_steps):
            batch = {name: torch.ones(shape, dtype=torch.int64).cuda() for name in ("input_ids", "labels")}
            outputs = model(**batch)
            outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    settings = options()
    programs = {"trl": with_trl, "transformers": with_trainer, "plain": with_loop}
    programs.get(settings.trainer, with_preferences)(settings)

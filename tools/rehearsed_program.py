"""One job as a program of the libraries that it names: nothing of peftplan runs in it.

    python tools/rehearsed_program.py MODEL [OPTIONS of `peftplan estimate`]

It says what a user would write for those options, with Trainer, SFTTrainer or a loop, on a rank's own share of several GPUs too.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
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
AUTOMATIC_SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""What transformers and accelerate compute of the model's hidden size."""
PER_SAMPLE = ("ForSequenceClassification", "ForImageClassification")
"""Ends of names of classes that want one label per sample."""
OTHER_TRAINERS = (
    "trl-dpo",
    "trl-kto",
    "trl-reward",
    "trl-orpo",
    "trl-cpo",
    "trl-tpo",
    "trl-grpo",
    "trl-rloo",
    "trl-gkd",
    "trl-gold",
    "trl-distillation",
)
LLAMA_FACTORY = ("llamafactory-dpo", "llamafactory-kto")
SWIFT = ("swift-dpo", "swift-orpo", "swift-grpo")
OF_TEMPLATE = 148
"""Tokens of Qwen's chat template around a prompt, a token for each byte."""
AXOLOTL = ("axolotl-dpo", "axolotl-kto", "axolotl-orpo", "axolotl-cpo", "axolotl-reward")
V1 = "llamafactory-v1"
TRAINERS = ("transformers", "trl", "plain", *OTHER_TRAINERS, *AXOLOTL, *LLAMA_FACTORY, *SWIFT, V1)


def options() -> argparse.Namespace:
    """The options that a job may have, under the names of `peftplan estimate`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--method", default="lora", choices=("full", "lora", "qlora"))
    parser.add_argument("--task-type", choices=tuple(CLASSIFIERS))
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--target-modules", default="all-linear")
    parser.add_argument("--quant", choices=("int8",))
    parser.add_argument("--use-dora", action=FLAGS, default=False)
    parser.add_argument("--use-rslora", action=FLAGS, default=False)
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--device-map", choices=("none", "auto", "cuda"))
    parser.add_argument("--autocast", choices=("none", "bf16", "fp16"))
    parser.add_argument("--trainer", default="transformers", choices=TRAINERS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action=FLAGS)
    parser.add_argument("--use-reentrant", action=FLAGS)
    parser.add_argument("--optim")
    parser.add_argument("--attn-implementation")
    parser.add_argument("--loss", choices=("full", "per-token", "eaft", "cut-cross-entropy"), default="full")
    parser.add_argument("--kernels", choices=("axolotl",))
    parser.add_argument("--max-completion-length", type=int)
    parser.add_argument("--teacher-model")
    parser.add_argument("--precompute-ref-log-probs", action=FLAGS, default=False)
    parser.add_argument("--beta", type=float)
    parser.add_argument("--loss-type")
    parser.add_argument("--num-generations", type=int)
    parser.add_argument("--steps-per-generation", type=int)
    parser.add_argument("--use-vllm", action=FLAGS, default=False)
    parser.add_argument("--vllm-mode", choices=("server", "colocate"))
    parser.add_argument("--padding", action=FLAGS, default=False)
    parser.add_argument("--strategy", choices=("ddp", "fsdp1", "fsdp2", "zero0", "zero1", "zero2", "zero3"))
    parser.add_argument("--overlap-comm", action=FLAGS, default=True)
    for name in AUTOMATIC_SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", choices=("auto",))
    parser.add_argument("--zero3-init", action=FLAGS)
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
    if job.quant == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    attention = {"attn_implementation": job.attn_implementation} if job.attn_implementation else {}
    if job.trainer.endswith("-reward"):
        attention["num_labels"] = 1
    device_map = job.device_map or ("auto" if job.trainer in AXOLOTL else "none")
    if device_map != "none":
        attention["device_map"] = device_map
    return auto_class.from_pretrained(job.model, dtype=DTYPES[job.dtype], quantization_config=quantization, **attention)


def adapter(job: argparse.Namespace) -> LoraConfig | None:
    """peft's config of the method, None for full fine-tuning."""
    if job.method == "full":
        return None
    modules = job.target_modules if job.target_modules == "all-linear" else job.target_modules.split(",")
    others = {"lora_dropout": job.lora_dropout, "use_dora": job.use_dora, "use_rslora": job.use_rslora}
    return LoraConfig(r=job.r, target_modules=modules, task_type=task_of(job), **others)


def task_of(job: argparse.Namespace) -> str | None:
    """peft's task: that of the job, else the one that the model's class has."""
    config = AutoConfig.from_pretrained(job.model)
    if job.trainer.endswith("-reward"):
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
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": job.overlap_comm}
    if stage == 3:
        zero |= dict.fromkeys(AUTOMATIC_SIZES, "auto")
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
    """SFTTrainer, which makes the adapter itself. Its arguments come first: under ZeRO-3 they decide how the model is loaded."""
    from trl import SFTConfig, SFTTrainer

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))
    config = SFTConfig(max_length=job.seq_len, **arguments(job, shape))
    model = load(job)
    SFTTrainer(
        model=model, args=config, train_dataset=rows(job, model).remove_columns("labels"), peft_config=adapter(job)
    ).train()


def with_preferences(job: argparse.Namespace) -> None:
    """TRL's trainers of pairs, of single completions with a label, and of completions that the model writes itself.

    Their arguments come first: under ZeRO-3 they decide how the model is loaded.
    """
    name = job.trainer.partition("-")[2]
    config_class, trainer_class = classes(job, name)
    settings = {
        "beta": job.beta,
        "loss_type": job.loss_type,
        "precompute_ref_log_probs": job.precompute_ref_log_probs or None,
        "num_generations": job.num_generations,
        "steps_per_generation": job.steps_per_generation,
        "max_completion_length": job.max_completion_length if name in ("grpo", "rloo") else None,
        "max_length": None if name in ("grpo", "rloo") else job.seq_len,
    }
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))
    fields = {key: value for key, value in settings.items() if value is not None}
    config = config_class(**fields, **arguments(job, shape))
    model = load(job, AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM)
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
    trainer_class(
        model=model,
        args=config,
        train_dataset=texts(job, name, tokenizer),
        processing_class=tokenizer,
        **({} if peft is None else {"peft_config": peft}),
        **rewards,
    ).train()


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
    settings = {"max_length": job.seq_len, "lmbda": 0.0, **arguments(job, model)}
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


def classes(job: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """The class of the arguments and that of the trainer."""
    called = "Reward" if name == "reward" else name.upper()
    if job.trainer in AXOLOTL:
        return of_axolotl(called)
    import trl
    from trl.experimental import cpo, orpo, tpo

    home = {"orpo": orpo, "cpo": cpo, "tpo": tpo}.get(name, trl)
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


def with_llama_factory(job: argparse.Namespace) -> None:
    """LLaMA-Factory's trainers of pairs and of single completions, with rows of one length."""
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.kto.trainer import CustomKTOTrainer
    from transformers import Seq2SeqTrainingArguments

    model = load(job)
    if (peft := adapter(job)) is not None:
        model = get_peft_model(model, peft)
        if checkpoints(job):
            model.enable_input_require_grads()
    pairs = job.trainer == "llamafactory-dpo"

    def batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = (2 if pairs else 1) * len(examples)
        tokens = torch.tensor([examples[0]["input_ids"]] * rows)
        labels = tokens.masked_fill(
            torch.arange(job.seq_len) < job.seq_len - (job.max_completion_length or job.seq_len - 1), -100
        )
        parts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        if pairs:
            return parts
        return {**parts, **{f"kl_{name}": part.clone() for name, part in parts.items()}, "kto_tags": torch.ones(rows).bool()}

    (CustomDPOTrainer if pairs else CustomKTOTrainer)(
        model=model,
        ref_model=None,
        args=Seq2SeqTrainingArguments(**arguments(job, model), remove_unused_columns=False),
        finetuning_args=FinetuningArguments(stage=job.trainer.partition("-")[2], pref_loss=job.loss_type or "sigmoid"),
        processor=None,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        data_collator=batch,
        train_dataset=rows(job, model),
    ).train()


def with_llama_factory_v1(job: argparse.Namespace) -> None:
    """LLaMA-Factory v1's own loop under FSDP2 or DeepSpeed, as its launcher starts it."""
    from llamafactory.v1.trainers.sft_trainer import run_sft

    turns = (("user", "ask"), ("assistant", "good" * job.seq_len))
    messages = [{"role": role, "content": [{"type": "text", "value": text}]} for role, text in turns]
    Path("rows.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * ROWS, encoding="utf-8")
    Path("data.yaml").write_text("rows: {path: rows.jsonl, source: local}\n", encoding="utf-8")
    step = job.gpus * job.batch_size * job.gradient_accumulation_steps
    settings: dict[str, Any] = {}
    sharded = {"name": "fsdp2"}
    if job.strategy != "fsdp2":
        Path("deepspeed.json").write_text(json.dumps(deepspeed(job, int(job.strategy[-1]))), encoding="utf-8")
        sharded = {"name": "deepspeed", "config_file": "deepspeed.json"}
    if job.method != "full":
        targets = "all" if job.target_modules == "all-linear" else job.target_modules.split(",")
        fields = {"r": job.r, "lora_dropout": job.lora_dropout, "target_modules": targets}
        settings["peft_config"] = {"name": "lora", **fields}
    if job.method == "qlora":
        settings["quant_config"] = {"name": "bnb", "quantization_bit": 4}
    run_sft(
        {
            **settings,
            "model": job.model,
            "train_dataset": "data.yaml",
            "output_dir": "out",
            "micro_batch_size": job.batch_size,
            "global_batch_size": step,
            "cutoff_len": job.seq_len,
            "max_steps": 20,
            "batching_workers": 0,
            "enable_activation_checkpointing": checkpoints(job),
            "kernel_config": {"name": "auto"},
            "dist_config": sharded,
        }
    )


def with_swift(job: argparse.Namespace) -> None:
    """ms-swift's trainers of preferences, by its own command line, and GRPO on completions that were written elsewhere."""
    from swift import rlhf_main

    completion = job.max_completion_length or job.seq_len - OF_TEMPLATE - 1
    name = job.trainer.partition("-")[2]
    prompt = {"role": "user", "content": "a" * (job.seq_len - completion - OF_TEMPLATE)}
    answer = {"role": "assistant", "content": "g" * job.seq_len}  # cut where the row is full
    row = {"messages": [prompt]} if name == "grpo" else {"messages": [prompt, answer], "rejected_response": "p" * job.seq_len}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * ROWS, encoding="utf-8")
    settings: dict[str, Any] = {
        "rlhf_type": name,
        "model": job.model,
        "use_hf": True,
        "tuner_type": "full" if job.method == "full" else "lora",
        "lora_rank": job.r,
        "dataset": "rows.jsonl",
        "split_dataset_ratio": 0,
        "torch_dtype": "bfloat16",
        **{key: value for key, value in arguments(job, None).items() if key not in ("bf16", "fp16", "fsdp", "deepspeed")},
    }
    if job.method == "qlora":
        settings |= {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    if (job.strategy or "").startswith("zero"):
        settings["deepspeed"] = json.dumps(deepspeed(job, int(job.strategy[-1])))
    if name == "grpo":
        written_elsewhere(completion)
        settings |= {"reward_funcs": "format", "num_generations": job.num_generations, "max_completion_length": completion}
    else:
        settings |= {"max_length": job.seq_len, "truncation_strategy": "right"}
    rlhf_main([word for key, value in settings.items() for word in (f"--{key}", str(value))])


def written_elsewhere(tokens: int) -> None:
    """Completions as a server of vLLM answers them, which does not run here."""
    from swift.infer_engine.protocol import (
        ChatCompletionResponse,
        ChatCompletionResponseChoice,
        ChatMessage,
        RolloutOutput,
        UsageInfo,
    )
    from swift.rlhf_trainers.rollout_mixin import RolloutTrainerMixin

    def answers(trainer: Any, samples: list[Any], *_: object) -> list[Any]:
        message = ChatMessage(role="assistant", content="good")
        choice = ChatCompletionResponseChoice(index=0, message=message, finish_reason="length", token_ids=[5] * tokens)
        response = ChatCompletionResponse(model="", choices=[choice], usage=UsageInfo(1, tokens, tokens + 1))
        return [RolloutOutput(response=response) for _ in samples]

    RolloutTrainerMixin._rollout = answers


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
    prompt = text("ask ", job.seq_len - (job.max_completion_length or job.seq_len - 1))
    others = completion // 2 if job.padding else completion
    if name in ("grpo", "rloo"):
        return Dataset.from_dict({"prompt": [prompt] * ROWS})
    if name == "kto":
        answers = [text("good", completion - 1), text("poor", others - 1)] * (ROWS // 2)
        labels = [True, job.trainer in AXOLOTL] * (ROWS // 2)  # axolotl's memory depends on the kinds: of one, it is largest
        return Dataset.from_dict({"prompt": [prompt] * ROWS, "completion": answers, "label": labels})
    pair = {"chosen": [text("good", completion - 1)] * ROWS, "rejected": [text("poor", others - 1)] * ROWS}
    third = {"reference": [text("fine", completion - 1)] * ROWS} if name == "tpo" else {}
    return Dataset.from_dict({"prompt": [prompt] * ROWS, **pair, **third})


def patch_attention(name: str, model: Any = None) -> None:
    """axolotl's kernels of LoRA: in the attention's code before a model is loaded, then in the layers of one."""
    from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, patch_self_attn_lora
    from axolotl.utils.dict import DictDefault

    config = DictDefault(base_model=name, lora_mlp_kernel=True, lora_qkv_kernel=True, lora_o_kernel=True)
    patch_self_attn_lora(config) if model is None else apply_lora_kernel_patches(model, config)


def with_trainer(job: argparse.Namespace) -> None:
    """transformers' Trainer. Its arguments come first: under ZeRO-3 they decide how the model is loaded."""
    config = AutoConfig.from_pretrained(job.model)
    wanted = class_of(job, config)
    with torch.device("meta"):
        shape = wanted.from_config(config) if job.task_type else wanted(config)
    training = TrainingArguments(**arguments(job, shape))
    if job.loss == "cut-cross-entropy":  # before loading, as axolotl's plugin does
        from cut_cross_entropy.transformers import cce_patch

        cce_patch(config.model_type)
    if job.kernels:
        patch_attention(job.model)
    model = load(job, wanted)
    if job.method == "qlora" and not job.kernels:  # axolotl leaves it out
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpoints(job))
    if (peft := adapter(job)) is not None:
        model = get_peft_model(model, peft)
        if checkpoints(job):
            model.enable_input_require_grads()
    if job.kernels:
        patch_attention(job.model, model)
    own_loss = {}
    if job.loss == "per-token":
        os.environ["DISABLE_VERSION_CHECK"] = "1"  # of the transformers that LLaMA-Factory asks for
        from llamafactory.train.trainer_utils import dft_loss_func

        own_loss["compute_loss_func"] = dft_loss_func
    if job.loss == "eaft":
        from axolotl.monkeypatch.loss.eaft import eaft_loss

        own_loss["compute_loss_func"] = eaft_loss
    Trainer(model=model, args=training, train_dataset=rows(job, shape), **own_loss).train()


def with_loop(job: argparse.Namespace) -> None:
    """A loop by hand: the model is on its device before the adapter is made."""
    model = load(job)
    if job.method == "qlora" or job.quant is not None:
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
    programs |= {V1: with_llama_factory_v1, "trl-gkd": with_teacher, "trl-gold": with_teacher, "trl-distillation": with_teacher}
    programs |= dict.fromkeys(LLAMA_FACTORY, with_llama_factory) | dict.fromkeys(SWIFT, with_swift)
    programs.get(settings.trainer, with_preferences)(settings)

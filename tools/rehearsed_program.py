"""One job as a program of the libraries that it names: nothing of peftplan runs in it.

    python tools/rehearsed_program.py MODEL [OPTIONS of `peftplan estimate`]

It says what a user would write for those options, with Trainer, SFTTrainer or a loop, on a rank's own share of several GPUs too.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from programs.job import (
    LLAMA_FACTORY,
    OPTIMIZERS,
    SWIFT,
    V1,
    adapter,
    arguments,
    checkpoints,
    class_of,
    evaluated,
    load,
    options,
    rows,
)
from programs.llama_factory import with_llama_factory, with_llama_factory_v1
from programs.ms_swift import with_swift
from programs.preferences import with_preferences, with_teacher
from programs.scored import with_rewards, with_values
from programs.without_peft import WITHOUT_PEFT
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments

DOCUMENTS = 4
"""Documents of a packed row."""


def with_trl(job: argparse.Namespace) -> None:
    """SFTTrainer, which makes the adapter itself. Its arguments come first: under ZeRO-3 they decide how the model is loaded."""
    from trl import SFTConfig, SFTTrainer

    config = AutoConfig.from_pretrained(job.model)
    wanted = class_of(job, config)
    with torch.device("meta"):
        shape = wanted(config)
    packed = {"packing": True} if job.trainer == "trl-packed" else {}
    offloads = {"activation_offloading": True} if "trl-offload" in (job.kernels or "") else {}
    training = SFTConfig(max_length=job.seq_len, **packed, **offloads, **arguments(job, shape))
    model = load(job, wanted)
    if job.method in WITHOUT_PEFT:
        WITHOUT_PEFT[job.method](job, model)
    dataset = rows(job, model).remove_columns("labels")
    if packed:
        dataset = dataset.map(lambda row: {"input_ids": row["input_ids"][: job.seq_len // DOCUMENTS]})
    texts = {"processing_class": AutoTokenizer.from_pretrained(job.model)} if hasattr(config, "vision_config") else {}
    evaluation = evaluated(job, dataset)
    SFTTrainer(model=model, args=training, train_dataset=dataset, peft_config=adapter(job), **texts, **evaluation).train()


def patch_attention(name: str, model: Any = None) -> None:
    """axolotl's kernels of LoRA: in the attention's code before a model is loaded, then in the layers of one."""
    from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, patch_self_attn_lora
    from axolotl.utils.dict import DictDefault

    config = DictDefault(base_model=name, lora_mlp_kernel=True, lora_qkv_kernel=True, lora_o_kernel=True)
    patch_self_attn_lora(config) if model is None else apply_lora_kernel_patches(model, config)


class WithOptimizer(Trainer):
    """Trainer with the optimizer that the method brings along: under FSDP it takes none as an argument."""

    def create_optimizer(self, model: Any = None) -> Any:
        """Make it of the model as it is now."""
        self.optimizer = OPTIMIZERS[settings.method](settings, model or self.model)
        return self.optimizer


def with_trainer(job: argparse.Namespace) -> None:
    """transformers' Trainer. Its arguments come first: under ZeRO-3 they decide how the model is loaded."""
    config = AutoConfig.from_pretrained(job.model)
    wanted = class_of(job, config)
    with torch.device("meta"):
        shape = wanted.from_config(config) if job.task_type else wanted(config)
    whole = load(job, wanted) if job.zero3_init is False else None  # before DeepSpeed knows of the model
    training = TrainingArguments(**arguments(job, shape))
    if job.loss == "cut-cross-entropy":  # before loading, as axolotl's plugin does
        from cut_cross_entropy.transformers import cce_patch

        cce_patch(config.model_type)
    if job.kernels:
        patch_attention(job.model)
    model = whole or load(job, wanted)
    if (job.quant or job.method in ("qlora", "qdora")) and job.kbit_prepare and not job.kernels:  # axolotl leaves it out
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpoints(job))
    if job.method in WITHOUT_PEFT:
        WITHOUT_PEFT[job.method](job, model)
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
    kind = WithOptimizer if job.method in OPTIMIZERS else Trainer
    dataset = rows(job, shape)
    kind(model=model, args=training, train_dataset=dataset, **own_loss, **evaluated(job, dataset)).train()


def with_loop(job: argparse.Namespace) -> None:
    """A loop by hand: the model is on its device before the adapter is made."""
    model = load(job)
    if job.method in ("qlora", "qdora") or job.quant is not None:
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


def time_no_kernels() -> None:
    """Let Triton take the first way to run a kernel: the emulated card has no times to compare."""
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **settings: Any) -> Any:
        return self.fn.run(*args, **settings, **self.configs[0].all_kwargs())

    Autotuner.run = run


if __name__ == "__main__":
    settings = options()
    if settings.kernels in ("mamba-ssm", "fla"):  # transformers finds them where they are installed
        time_no_kernels()
        settings.kernels = None
    programs = {"trl": with_trl, "trl-packed": with_trl, "transformers": with_trainer, "plain": with_loop}
    programs |= {V1: with_llama_factory_v1, "trl-gkd": with_teacher, "trl-gold": with_teacher, "trl-distillation": with_teacher}
    programs |= dict.fromkeys(("trl-online-dpo", "trl-xpo", "trl-nash-md"), with_rewards) | {"trl-ppo": with_values}
    programs |= dict.fromkeys(LLAMA_FACTORY, with_llama_factory) | dict.fromkeys(SWIFT, with_swift)
    programs.get(settings.trainer, with_preferences)(settings)

"""transformers' Trainer on a small model over several GPUs: one job of the witness grid, said in JSON as the first argument."""

import json
import sys

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, TrainingArguments
from transformers.initialization import no_init_weights

job = json.loads(sys.argv[1])
half = torch.float16 if job.get("autocast") == "fp16" else torch.bfloat16


class Tokens(Dataset):
    """Sequences of one length."""

    def __len__(self):
        return 4096

    def __getitem__(self, index):
        row = torch.zeros(job.get("seq_len", 512), dtype=torch.int64)
        masked = {"attention_mask": torch.ones_like(row)} if "cp_size" in job.get("parallel", {}) else {}
        placed = {"position_ids": torch.arange(len(row))} if "sp_size" in job.get("parallel", {}) else {}
        return {"input_ids": row, "labels": row.clone(), **masked, **placed}


def cut(name, layers):
    """A built-in model's config with its first layers alone."""
    config = AutoConfig.from_pretrained(name)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return config


if job["method"] == "qlora":
    from transformers import BitsAndBytesConfig

    stored = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
        bnb_4bit_quant_storage=getattr(torch, job.get("quant_storage", "bfloat16")),
    )
    name = job.get("model", "meta-llama/Llama-3.2-1B")
    config = cut(name, job.get("layers", 3))
    where = {"device_map": job["device_map"]} if "device_map" in job else {}
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=half, quantization_config=stored, **where)
elif "device_map" in job:
    config = cut(job["model"], job["layers"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], config=config, dtype=half, device_map=job["device_map"])
elif "tp" in job:
    from transformers.distributed import DistributedConfig

    config = cut(job["model"], job["layers"])
    divided = DistributedConfig(tp_size=job["tp"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], config=config, dtype=half, distributed_config=divided)
else:
    with no_init_weights():
        config = cut(job["model"], job["layers"]) if "model" in job else AutoConfig.for_model(**job["config"])
        sees = hasattr(config, "vision_config")
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config, dtype=half)
    model.tie_weights()
if "kbit" in job:
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model)
if job["method"] != "full":
    from peft import LoraConfig, get_peft_model

    targets = job.get("target_modules", "all-linear")
    model = get_peft_model(model, LoraConfig(r=job.get("r", 16), target_modules=targets, task_type="CAUSAL_LM"))
if "deepspeed" in job.get("arguments", {}):  # ranks that are not there cannot be asked whether they agree
    from importlib import import_module

    for name in ("utils", "stage3", "partition_parameters", "partitioned_param_coordinator"):
        import_module(f"deepspeed.runtime.zero.{name}").assert_ints_same_as_other_ranks = lambda *ints: None
if "cp_size" in job.get("parallel", {}):  # the emulated card does not hold the ones of a share of a mask
    import transformers.masking_utils

    transformers.masking_utils.fast_all = lambda mask: True
if "parallel" in job:
    from accelerate.parallelism_config import ParallelismConfig

    handler = {}
    if "sp_size" in job["parallel"]:
        from accelerate.utils import DeepSpeedSequenceParallelConfig

        handler = {"sp_handler": DeepSpeedSequenceParallelConfig(sp_attn_implementation=model.config._attn_implementation)}
    job["arguments"]["parallelism_config"] = ParallelismConfig(**job["parallel"], **handler)
arguments = TrainingArguments(
    output_dir="out",
    per_device_train_batch_size=job.get("batch_size", 1),
    gradient_accumulation_steps=job.get("accumulation", 1),
    gradient_checkpointing=job.get("checkpointing", True),
    gradient_checkpointing_kwargs={"use_reentrant": True} if "use_reentrant" in job else None,
    optim=job.get("optim", "adamw_torch_fused"),
    max_steps=4,
    bf16=job.get("autocast", "bf16") == "bf16",
    fp16=job.get("autocast", "bf16") == "fp16",
    report_to="none",
    save_strategy="no",
    logging_steps=100,
    use_liger_kernel="loss" in job or "kernels" in job,
    liger_kernel_config={
        "fused_linear_cross_entropy": "loss" in job,
        **dict.fromkeys(("rope", "rms_norm", "swiglu"), "kernels" in job),
    },
    **job.get("arguments", {}),
)
trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
for name, value in job.get("ddp", {}).items():
    setattr(trainer.accelerator.ddp_handler, name, value)
if "policy" in job:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtypes = {name: getattr(torch, dtype) for name, dtype in job["policy"].items()}
    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(**dtypes)
trainer.train()

"""Which steps over several GPUs have a formula: those that were rehearsed, strategy by strategy (docs/how-to/several-gpus.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peftplan.versions as versions
from peftplan.distributed.layout import ACCELERATE, AUTOMODEL
from peftplan.distributed.pipeline import INTERLEAVED
from peftplan.distributed.tensor_parallel import BY_AUTOMODEL, PLANS, ranks_of
from peftplan.job.automodel import builds, knows_tower
from peftplan.job.loss_sizes import CUT, SHARED, SHARED_CHUNKS
from peftplan.memory.models import FORWARDS, OF_TEXT_PARTS
from peftplan.memory.sharded import tied
from peftplan.memory.zero3_modules import LEAVES
from peftplan.optim import OF_AUTOMODEL, OF_AXOLOTL
from peftplan.optim.community import by_muon

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job

SHOWN_METHODS = ("full", "lora", "qlora")
"""Methods whose steps were rehearsed under FSDP and ZeRO (docs/how-to/several-gpus.md)."""
SHOWN_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")
TRACED_METHODS = ("dora", "loha", "lokr", "ia3", "oft", "ln-tuning")
"""Those that were traced under FSDP2 and ZeRO 1 to 3, without a quantized base (tests/distributed/traced_methods.jsonl)."""
TRACED_OPTIMIZERS = ("sgd", "rmsprop")
"""The same."""
IN_8_BITS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
OVER_PARTITIONS = {
    "zero2": IN_8_BITS,
    "zero3": (*IN_8_BITS, "paged_adamw_32bit", "lion_32bit", "lion_8bit", "ademamix", "adamw_torch_8bit"),
}
"""Strategy → the optimizers of other packages that were rehearsed over DeepSpeed's partitions
(tests/rehearse/optimizers.jsonl)."""
FLAT = ("zero1", "zero2")
"""Strategies whose ranks hold all weights in 16 bits, and flat groups of what trains."""
ZERO = ("zero0", *FLAT, "zero3")
FSDP = ("fsdp1", "fsdp2")
SHARDING = (*FSDP, *ZERO)
UNDER_DEVICE_MAP = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose steps were rehearsed; Mistral runs Llama's operations."""
UNDER_DEEPSPEED = (
    *(*UNDER_DEVICE_MAP, "smollm3", "granite", "olmo", "olmo2", "phi3", "glm4", "starcoder2", "gemma2", "gemma3_text"),
    *(
        "cohere",
        "cohere2",
        "stablelm",
        "phi",
        "gptj",
        "gpt_neox",
        "gpt2",
        "opt",
        "bloom",
        "falcon",
        "mixtral",
        "qwen3_moe",
        "qwen2_moe",
    ),
    *("seed_oss", "exaone4", "arcee", "ernie4_5", "hunyuan_v1_dense", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"),
)
"""The same under DeepSpeed."""
DIVIDED_BY_AUTOMODEL = (
    *(("llama", "lora"), ("llama", "full"), ("qwen2", "full"), ("qwen3", "full"), ("phi3", "full"), ("phi3", "lora")),
)
"""Model type and method of NeMo Automodel's jobs that were rehearsed with tensor parallelism beside FSDP2, not over all ranks."""
APART = f"experts as before {versions.EXPERTS_FUSED.named}"
REENTRANT = "reentrant checkpoints"
"""Whether the user or the trainer asks for them: TRL does so whatever `use_reentrant` says."""
CLASSIFIERS_UNDER_DEEPSPEED = ("distilbert", "bert", "roberta", "deberta-v2")
"""Encoders that were rehearsed there as classifiers of sequences."""


def without_formula(job: Job) -> str | None:
    """Why a job over several GPUs has no peak formula, as a suffix for a message; None if it has one."""
    distributed = job.distributed
    assert distributed is not None
    by = job.setup.by
    rehearsed = {"ddp": by.under_ddp, "zero2": by.under_zero2, "zero3": by.under_zero3, "fsdp2": by.under_fsdp2}.get(
        distributed.strategy, ()
    )
    if by.of_preferences and job.reference not in rehearsed:
        return f" and {by.called}"
    if distributed.strategy == "ddp":
        views = bool(distributed.gradient_as_bucket_view or distributed.static_graph or distributed.find_unused_parameters)
        return " and gradient_as_bucket_view, static_graph or find_unused_parameters" if views else None
    if distributed.strategy == "tp":
        return _listed(_unknown_to_tp(job, distributed))
    if distributed.strategy == "device-map":
        return _listed(_unknown_to_device_map(job))
    unknown = (_unknown_to_zero(job, distributed) if distributed.strategy in ZERO else _unknown_to_fsdp(job, distributed)) | {
        REENTRANT: job.setup.use_reentrant and bool(job.setup.gradient_checkpointing) and not _rehearsed_reentrant(job),
        **_unrehearsed(job),
    }
    return _listed(unknown)


def _listed(unknown: dict[str, bool]) -> str | None:
    names = [name for name, is_unknown in unknown.items() if is_unknown]
    return f" and {', '.join(names)}" if names else None


def _unknown_to_tp(job: Job, distributed: Distributed) -> dict[str, bool]:
    """Parameters under transformers' tensor parallelism whose values were not rehearsed, and whether the job sets them so."""
    architecture = job.architecture
    tables = (architecture.input_embedding, architecture.output_embedding)
    return {
        "tp_size": ranks_of(distributed) * (distributed.pp_size or 1) != distributed.world_size,
        "ep_size": distributed.ep_size not in (None, 1),
        "pp_size": distributed.pp_size not in (None, 1),
        APART: _has_experts_apart(job),
        f"a vocabulary of {architecture.vocab_size:,}": bool((architecture.vocab_size or 0) % ranks_of(distributed)),
        "target_modules": any(module.name in tables for module in job.adaptation.matched),
        "modules_to_save": bool(getattr(job.config, "modules_to_save", None)),
        **_unknown_to_dense(job, tuple(PLANS), SHOWN_OPTIMIZERS),
    }


def _unknown_to_device_map(job: Job) -> dict[str, bool]:
    """The same over several GPUs of one process."""
    return {"trainer": not job.setup.by.prepares_model, **_unknown_to_dense(job, UNDER_DEVICE_MAP, ("adamw_torch_fused",))}


def _unknown_to_dense(job: Job, model_types: tuple[str, ...], optimizers: tuple[str, ...]) -> dict[str, bool]:
    """The same where a dense model was rehearsed, fully trained or with LoRA, with the loss of all logits."""
    setup, method = job.setup, job.method.name if job.method else "this adapter config"
    return {
        f"model type {job.architecture.model_type}": job.architecture.model_type not in model_types,
        f"task {job.architecture.task_type}": job.architecture.task_type != "CAUSAL_LM",
        f"method {method}": method not in ("full", "lora") or bool(getattr(job.config, "use_dora", False)),
        f"quant {job.quant and job.quant.name}": job.quant is not None,
        "loss": setup.loss != "full",
        REENTRANT: bool(setup.use_reentrant and setup.gradient_checkpointing),
        "keep_gradients": bool(setup.keep_gradients),
        f"optim {setup.optim}": setup.optim not in optimizers,
    }


def _unknown_to_fsdp(job: Job, distributed: Distributed) -> dict[str, bool]:
    """Parameters whose values were not rehearsed, and whether the job sets them so."""
    autocast = job.setup.autocast
    classes = distributed.transformer_cls_names_to_wrap
    flat = distributed.strategy == "fsdp1"
    liger = ("liger",) if (job.method_name == "full" or flat) and not job.setup.by.own_fsdp2 else ()
    of_fsdp2 = {
        "reshard_after_forward": distributed.reshard_after_forward is False,
        "sync_each_batch": bool(distributed.sync_each_batch),
        "reduce_dtype": distributed.reduce_dtype not in (None, autocast),
    }
    return {
        "reshard_after_forward": type(distributed.reshard_after_forward) is int,
        "param_dtype": distributed.param_dtype not in (None, autocast, job.setup.by.layout.param_dtype),
        "wrap_policy": distributed.wrap_policy not in (None, "transformer"),
        "transformer_cls_names_to_wrap": classes is not None and classes != _layer_classes(job),
        "tp_size": ranks_of(distributed) > 1 and not _knows_division(job, distributed),
        "cp_size": distributed.cp_size not in (None, 1),
        "bias": flat and getattr(job.config, "bias", "none") != "none",
        "pp_size": distributed.pp_size not in (None, 1) and not _knows_pipeline(job, distributed),
        "accelerate": versions.FSDP2_TAIL_APART.after(distributed.accelerate) and not flat,
        "loss": (job.setup.loss not in ("full", *liger, *(() if flat else (CUT,))) and job.setup.by.layout is ACCELERATE)
        or job.setup.loss == "torchtune-chunked",
        "custom_sharded_layers": bool(distributed.custom_sharded_layers) and not _knows_ends(job, distributed),
        **{f"{name} under FSDP1": flat and is_set for name, is_set in of_fsdp2.items()},
    }


def _knows_division(job: Job, distributed: Distributed) -> bool:
    """Whether matrices were rehearsed that ranks share beside FSDP2: by NeMo Automodel, of a model of its own or of one
    for which it has a plan of its own."""
    architecture, config = job.architecture, job.config
    tables = (architecture.input_embedding, architecture.output_embedding)
    return (
        (builds(job) or (job.setup.by.layout is AUTOMODEL and architecture.model_type in BY_AUTOMODEL))
        and (architecture.model_type, job.method_name) in DIVIDED_BY_AUTOMODEL
        and distributed.world_size > ranks_of(distributed)
        and not architecture.ties
        and not (architecture.vocab_size or 0) % ranks_of(distributed)
        and not getattr(config, "lora_dropout", 0)
        and not any(module.name in tables for module in job.adaptation.matched)
        and job.setup.loss == "full"
    )


def _knows_pipeline(job: Job, distributed: Distributed) -> bool:
    """Whether stages were rehearsed: by NeMo Automodel, of a model of its own in bf16 without windows, over two ranks or more,
    with gradients that wait for the last micro batch. Torch reduces the gradients of one rank without buffers."""
    whole = distributed.tp_size in (None, 1) and distributed.dp_shard_size is None and distributed.shards > 1
    return (
        builds(job)
        and whole
        and job.setup.dtype == "bf16"
        and distributed.offload_params in (None, "none")
        and not any(a.window for block in job.architecture.blocks for a in block.attentions)
        and not distributed.sync_each_batch
        and distributed.reshard_after_forward is None
        and job.setup.loss == "full"
        and (job.method_name == "full" or distributed.pp_schedule == INTERLEAVED)  # 1f1b of LoRA: reserved 3.7 % too low
    )


def _knows_ends(job: Job, distributed: Distributed) -> bool:
    """Whether a recipe of torchtune was rehearsed that shards these layers apart: of a model with a head of its own."""
    from peftplan.memory.sharded import BY_TORCHTUNE, tied

    return (
        job.setup.by.own_modules
        and not tied(job.architecture)
        and job.setup.loss == "torchtune-linear"
        and set(distributed.custom_sharded_layers or ()) == BY_TORCHTUNE.keys()
    )


def _unknown_to_zero(job: Job, distributed: Distributed) -> dict[str, bool]:
    """The same under DeepSpeed."""
    unknown = {
        "contiguous_gradients": distributed.contiguous_gradients is False,
        "deepspeed_optimizer": bool(distributed.deepspeed_optimizer),
        "offload_optimizer": distributed.offload_optimizer == "nvme",
        "autocast": job.setup.autocast != "bf16" and not _in_fp16(job, distributed) and not _in_fp32(job, distributed),
        "loss": job.setup.loss
        not in ("full", "trl-chunked", "liger", *((CUT,) if distributed.strategy in FLAT else (SHARED, SHARED_CHUNKS))),
    }
    if distributed.strategy == "zero0":
        return unknown | {"a quantized base": job.quant is not None}
    if distributed.strategy != "zero3":
        return unknown
    tables = (job.architecture.input_embedding, job.architecture.output_embedding)
    leaf = LEAVES.get(job.architecture.model_type)
    return unknown | {
        "loss": unknown["loss"] or (job.quant is not None and job.setup.loss == "liger"),
        "reduce_scatter": distributed.reduce_scatter is False,
        APART: _has_experts_apart(job),
        "offload_params": distributed.offload_params == "nvme",
        "modules_to_save": bool(getattr(job.config, "modules_to_save", None)),
        "bias": getattr(job.config, "bias", "none") != "none",
        "target_modules": any(module.name in tables for module in job.adaptation.matched)
        or any(leaf is not None and tensor.name.startswith(leaf) for tensor in job.adaptation.added),
    }


def _has_experts_apart(job: Job) -> bool:
    return any(block.mlp.apart for block in job.architecture.blocks)


def _in_fp16(job: Job, distributed: Distributed) -> bool:
    """Whether the job is in fp16 as it was rehearsed, on the GPU."""
    return job.setup.autocast == "fp16" and distributed.offload_optimizer in (None, "none")


def _in_fp32(job: Job, distributed: Distributed) -> bool:
    """Whether the job is in fp32 as it was rehearsed: of another model DeepSpeed's engine refuses the dtype."""
    return distributed.strategy == "zero0" and job.setup.autocast == "none" and job.setup.dtype == "fp32"


def _unrehearsed(job: Job) -> dict[str, bool]:
    """What of a job was rehearsed under no sharding strategy, and whether it is so."""
    assert job.distributed is not None
    setup, method = job.setup, job.method.name if job.method else "this adapter config"
    writes, translates = setup.by.generates and job.distributed.strategy == "zero3", _translates(job)
    return {
        "use_vllm": writes and bool(setup.use_vllm) and not setup.by.sends_at_once,
        f"optim {setup.optim}": setup.optim not in _optimizers(job),
        "trainer": not _rehearsed_trainer(job),
        "keep_gradients": bool(setup.keep_gradients),
        "gradient_checkpointing": translates and bool(setup.gradient_checkpointing),
        "an untied head": translates and all(name.rpartition(".")[0] != "lm_head" for name, _ in job.architecture.ties),
        f"method {method}": method not in _methods(job) or (getattr(job.config, "use_dora", False) and not _as_traced(job)),
        f"quant {setup.quant}": job.quant is not None and job.quant.name not in ("nf4", "fp4"),
        f"task {job.architecture.task_type}": job.architecture.task_type not in ("CAUSAL_LM", setup.by.task)
        and not (_classifies(job) or translates),
        f"model type {job.architecture.model_type}": not (_is_decoder(job) or _classifies(job) or translates),
    }


def _methods(job: Job) -> tuple[str, ...]:
    """The methods that were rehearsed with this trainer."""
    assert job.distributed is not None
    by, strategy = job.setup.by, job.distributed.strategy
    if by.weighs_tokens:
        return ("full", "partial") if strategy == "fsdp2" and tied(job.architecture) else ("full",)
    if by.own_fsdp2 and strategy == "fsdp2":
        return ("full",)
    if by.generates and strategy == "zero3":
        return ("full", "lora")
    with_tower = (job.method.name,) if job.method and by.own_lora and knows_tower(job) else ()
    return (*SHOWN_METHODS, *with_tower, *(TRACED_METHODS if _as_traced(job) else ()))


def _optimizers(job: Job) -> tuple[str, ...]:
    """The optimizers whose steps were rehearsed or traced with such a job."""
    assert job.distributed is not None
    known: tuple[str, ...] = (*SHOWN_OPTIMIZERS, *OF_AUTOMODEL, *(OF_AXOLOTL if _knows_muon(job) else ()))
    if not _as_traced(job):
        return known
    return (*known, *TRACED_OPTIMIZERS, *OVER_PARTITIONS.get(job.distributed.strategy, ()))


def _as_traced(job: Job) -> bool:
    """Whether a job is as those were traced that have other methods and optimizers: a dense model in bf16 that Trainer or
    SFTTrainer trains on the card."""
    setup, distributed = job.setup, job.distributed
    assert distributed is not None
    offloads = (distributed.offload_params, distributed.offload_optimizer)
    by_trainer = setup.by.traced_on_ranks and not setup.by.of_preferences
    dense = all(block.mlp.variant != "moe" for block in job.architecture.blocks)
    plain = job.quant is None and not setup.kernels and setup.autocast == "bf16" and dense
    return (
        by_trainer and plain and distributed.strategy in ("fsdp2", *FLAT, "zero3") and not any(offloads) and setup.dtype == "bf16"
    )


def _knows_muon(job: Job) -> bool:
    """Whether axolotl's Muon was rehearsed: of matrices in bf16, whose rows all ranks of FSDP2 share; it asserts that all get as
    many."""
    distributed = job.distributed
    if distributed is None or distributed.strategy != "fsdp2" or distributed.shards != distributed.world_size:
        return False
    shapes = [shape for m in job.architecture.modules for name, shape in m.params if by_muon(f"{m.name}.{name}", shape)]
    divided = all(rows % distributed.shards == 0 for rows, _ in shapes)
    return divided and job.setup.by.own_fsdp2 and job.method_name == "full" and job.setup.dtype == "bf16"


def _rehearsed_trainer(job: Job) -> bool:
    """Whether accelerate prepares the model, or the loop was rehearsed with this strategy."""
    assert job.distributed is not None
    by, strategy = job.setup.by, job.distributed.strategy
    apart = strategy == "fsdp2" or (strategy == "zero3" and by.weighs_tokens)
    return by.prepares_model or (by.layout is not ACCELERATE and apart)


def _rehearsed_reentrant(job: Job) -> bool:
    """Whether reentrant checkpoints were rehearsed with this strategy: under FSDP2 those between the hooks of a layer, under
    ZeRO-3 in a step of one forward, of experts that do not train, and of an adapter whose trainer generates."""
    assert job.distributed is not None
    strategy = job.distributed.strategy
    if strategy == "fsdp2":
        return job.script.checkpoints_forward and job.setup.by.layout is ACCELERATE
    if strategy == "zero3":
        trains_experts = job.method_name == "full" and job.architecture.model_type in LEAVES
        writes_with_adapter = job.setup.by.generates and job.method_name == "lora"
        rehearsed = job.setup.by.reentrant or writes_with_adapter or not job.setup.by.of_preferences
        return not trains_experts and rehearsed
    return strategy != "zero0"


def _layer_classes(job: Job) -> tuple[str, ...]:
    """The name of the class of the model's layers."""
    return (f"{job.architecture.model_class.removesuffix('ForCausalLM')}DecoderLayer",)


def _classifies(job: Job) -> bool:
    """Whether the model is an encoder under DeepSpeed that classifies sequences, fully trained or with LoRA.

    Under ZeRO-3 DeepSpeed refuses LoRA beside a head that trains: an adapter in fp32 and a head in 16 bits
    (runtime/zero/utils.py, `defragment`).
    """
    assert job.distributed is not None
    known = job.distributed.strategy in ZERO and job.architecture.model_type in CLASSIFIERS_UNDER_DEEPSPEED
    methods = ("full",) if job.distributed.strategy == "zero3" else ("full", "lora")
    return known and job.architecture.task_type == "SEQ_CLS" and job.method is not None and job.method.name in methods


def _translates(job: Job) -> bool:
    """Whether the model is an encoder-decoder that NeMo Automodel trains in full under FSDP2."""
    fits = job.setup.by.layout is AUTOMODEL and job.distributed is not None and job.distributed.strategy == "fsdp2"
    return fits and job.architecture.model_type == "t5" and job.method_name == "full"


def _is_decoder(job: Job) -> bool:
    """Whether the model is a plain decoder whose steps were rehearsed: embedding, layers, final norm, head."""
    architecture = job.architecture
    forward = (FORWARDS | OF_TEXT_PARTS).get(architecture.model_type)
    decoders = architecture.blocks and all(block.stack == "decoder" and block.attentions for block in architecture.blocks)
    by_deepspeed = job.distributed is not None and job.distributed.strategy in ZERO
    rehearsed = not by_deepspeed or architecture.model_type in UNDER_DEEPSPEED
    return bool(forward and decoders and architecture.input_embedding and rehearsed)

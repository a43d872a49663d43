"""Which jobs have a formula, and what the others lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import peftplan.methods as methods
from peftplan.analytic.families import check_family
from peftplan.analytic.kernel_checks import WRITTEN, kernels_without_formula, reads_8_bits, reads_packed
from peftplan.analytic.mixers import check_delta_rule, check_mixer
from peftplan.analytic.of_tools import unlike_rehearsed
from peftplan.analytic.running import SHOWN_PICTURES
from peftplan.arch.text_part import SCORED, is_in_text_part, layers_of_images
from peftplan.errors import NeedsTraceError, NoEngineError, NoRankFormulaError
from peftplan.job import loss_sizes
from peftplan.job.automodel import builds
from peftplan.job.beside_towers import knows_tower, trains_tower
from peftplan.job.further_tokens import STACK
from peftplan.job.kernels import kernels_of
from peftplan.job.requirements import rows_apart, writes_in_unequal_parts
from peftplan.job.virtual_tokens import check_virtual_tokens
from peftplan.memory.methods import ADAPTERS
from peftplan.memory.models import FORWARDS, OF_TEXT_PARTS
from peftplan.methods.adaptation import NeedsPeftError
from peftplan.optim import parse_optim_args
from peftplan.storage import is_skipped, without_peak
from peftplan.storage.config import FOUR_BIT
from peftplan.versions import LATENT_CACHED

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job

COPYING = ("sgd", "rmsprop", "adagrad")
"""Optimizers of torch that add decayed weights to copies of the gradients (torch, optim/sgd.py:429)."""
TRAINERS_OF_TEXT_PARTS = {
    "trl-dpo": "",
    "trl-grpo": "qwen2_5_vl",
    "swift-text-part": "qwen",
    "swift-dpo": "qwen",
    "swift-dpo-packed": "qwen2_5_vl",
    "swift-kto": "qwen2_5_vl",
    "swift-grpo": "qwen",
    "swift-grpo-reloading": "qwen2_5_vl",
    "llamafactory": "qwen",
    "llamafactory-partial": "qwen",
    "llamafactory-v1": "qwen",
}
"""Trainer → how the model types begin that it may train: of preferences those that were rehearsed (tests/rehearse/
preferences.jsonl, swift.jsonl); of others Qwen's alone where samples without images are changed. ms-swift embeds the tokens of
InternVL itself (template/templates/internvl.py), and LLaMA-Factory appends those of a picture of 64 x 64 to a batch's first row:
few of Qwen's, 256 and more of Gemma 3, InternVL and LLaVA (data/collator.py, `fake_images`)."""
TEXT_ALONE = ("plain", "transformers", "trl", "trl-dpo")
"""Trainers that give a model no image of their own where a sample has none: weights outside the text part get no gradient, but
for AdaLoRA's, whose loss reads each of its matrices."""
WRITING_ALONE = ("llama", "qwen2", "qwen3")
"""Model types whose completions of one prompt each were rehearsed, or that differ from these by norms of heads alone."""
REWARDED = ("gpt_neox", "qwen2")
"""Model types that trl's older online trainers were rehearsed with."""
REWARDED_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")
"""Optimizers that were."""
PACKED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose packed rows were rehearsed, or have the same masks."""
LATENT = "kv_b_proj"
"""What expands the latent keys and values of DeepSeek and GLM."""
PROJECTOR = ".multi_modal_projector"
"""A part of a model that gets no gradient where samples have no images."""


def check(job: Job) -> None:
    """Raise NeedsTraceError or NoEngineError if a part of the job has no formula."""
    if job.distributed is not None:
        from peftplan.analytic import rehearsed

        if (why := rehearsed.without_formula(job)) is not None:
            raise NoRankFormulaError(f"a step with {job.distributed.called}{why}")
    elif job.setup.by.weighs_tokens or job.setup.by.anchors:
        raise NoEngineError(f"a step of {job.setup.by.called} on one GPU (no formula yet)")
    if job.adaptation.rests and job.distributed is not None:
        raise NoRankFormulaError(f"layers that take turns under {job.distributed.called}")
    if (why := loss_sizes.cut_without_formula(job.setup.loss, job.architecture)) is not None:
        raise NoEngineError(why)
    if (why := unlike_rehearsed(job)) is not None:
        raise NoEngineError(f"{why} (no formula yet)")
    known = job.setup.by.scoring in (None, "rows") or job.setup.by.generates or job.setup.by.beside_copy
    shared = job.distributed is not None and job.distributed.strategy == "fsdp2"  # where `under_fsdp2` says so
    if job.reference == "copy" and not known and not shared:
        raise NoEngineError(f"a second model under {job.setup.by.called} (no formula yet)")
    if job.setup.by.leaves_temperature and not _writes_alone(job):
        raise NoEngineError(
            f"a step of {job.setup.by.called} but of Llama, Qwen 2 and 3 in full under sdpa in bf16 (no formula yet)"
        )
    if (job.setup.by.scoring == "rows of completions") and not _scores_as_rehearsed(job):
        raise NoEngineError(
            f"a step of {job.setup.by.called} but of GPT-NeoX and Qwen 2 in full, loaded in fp32, as its script runs it "
            "(no formula yet)"
        )
    if (apart := rows_apart(job.setup)) is not None:
        raise NoEngineError(apart)
    if writes_in_unequal_parts(job.setup):
        raise NoEngineError("completions that PPO writes in unequal parts (no formula yet)")
    if job.setup.by.packs and not _packs_as_rehearsed(job):
        raise NoEngineError(f"a step of {job.setup.by.called} with this model, method, attention or strategy (no formula yet)")
    if job.setup.by.reads_features and (job.method_name != "lora" or job.quant is not None):
        raise NoEngineError(f"a step of {job.setup.by.called} but of LoRA on a base in 16 bits (no formula yet)")
    if job.setup.by.block and not _writes_as_rehearsed(job):
        raise NoEngineError(f"a step of {job.setup.by.called} with these options or this model type (no formula yet)")
    by_kernel = job.setup.by.scoring == "kernel" and not job.setup.of_hidden_pairs
    if job.quant is not None and (by_kernel or job.setup.by.teaches or job.setup.by.rewards):
        raise NoEngineError(f"a quantized base under {job.setup.by.called} (no formula yet)")
    merges = job.setup.merges_for_vllm and bool(job.method and job.method.peft_type)
    beside_tower = job.architecture.has_towers and not (job.setup.by.reloads_weights or _merges_beside_tower(job))
    if merges and ((job.quant is not None and not _merges_into(job)) or beside_tower):
        raise NoEngineError(f"an adapter that {job.setup.by.called} merges for vLLM, of this base (no formula yet)")
    if job.quant is not None and job.quant.name == "gptq" and job.architecture.model_type in WRITTEN:
        raise NoEngineError(f"gptq of {job.architecture.model_type}, which transformers does not load (AttributeError)")
    if job.quant is not None and (why := without_peak(job.quant)) is not None and not (reads_8_bits(job) or reads_packed(job)):
        raise NoEngineError(why)
    if job.setup.noisy_embeddings and any(block.stack != "decoder" for block in job.architecture.blocks):
        raise NoEngineError("noise on the embeddings of an encoder (no formula yet)")
    if job.setup.optim in COPYING and float(parse_optim_args(job.setup.optim_args).get("weight_decay", "0")):
        raise NoEngineError(f"weight_decay of {job.setup.optim}, added to copies of the gradients (no formula yet)")
    if (refused := refused_product(job)) is not None:
        raise NoEngineError(refused)
    if job.quant is not None and job.quant.experts:
        _check_stacks(job)
    if job.setup.by.own_fsdp2:
        _check_parameters(job)
    model_type = job.architecture.model_type
    if model_type not in FORWARDS | OF_TEXT_PARTS and not builds(job) and kernels_of(job.setup.kernels or ()).layers is None:
        raise NeedsTraceError(f"activations of model type {model_type}")
    check_family(job)
    if any(block.state_space is not None for block in job.architecture.blocks):
        check_mixer(job)
    if any(block.delta_rule is not None for block in job.architecture.blocks):
        check_delta_rule(job)
    if any(attention.clipped for block in job.architecture.blocks for attention in block.attentions):
        raise NeedsTraceError(f"activations of model type {model_type} with clip_qkv")
    if job.method is None:
        raise NeedsTraceError(f"activations of {_unread(job.adapter)}")
    if job.adaptation.matched and job.method.peft_type not in (*ADAPTERS, "LN_TUNING"):
        raise NeedsTraceError(f"activations of method {job.method.name}")
    check_virtual_tokens(job)
    if job.setup.by.embeds:
        _check_embedding(job)
    if model_type in OF_TEXT_PARTS or job.architecture.has_towers:
        _check_text_part(job)
    _check_kernels(job)
    if job.method.module == "bottleneck":
        from peftplan.methods.bottleneck import refuse_unplaced

        refuse_unplaced(job.architecture, job.adaptation)


def _writes_alone(job: Job) -> bool:
    """Whether completions of one prompt each are learned as they were rehearsed."""
    setup = job.setup
    plain = setup.attn_implementation == "sdpa" and setup.kernels is None and setup.autocast == "bf16"
    return plain and job.method_name == "full" and job.architecture.model_type in WRITING_ALONE


def _scores_as_rehearsed(job: Job) -> bool:
    """Whether trl's older online trainers run models, of which the reward model is one too, as they were rehearsed."""
    from peftplan.job.teacher import reward_of

    setup, reward = job.setup, reward_of(job)
    assert reward is not None
    values, types = setup.by.values, (job.architecture.model_type, reward.architecture.model_type)
    cast = not values or job.distributed is not None  # PPO's `Accelerator` casts as DeepSpeed's alone
    loaded = setup.dtype == "fp32" and setup.autocast == ("bf16" if cast else "none") and job.script.transformers is None
    plain = bool(setup.gradient_checkpointing) and not setup.use_reentrant and not setup.padding  # else models keep their cache
    plain = setup.use_cache is not False if values else plain
    plain &= setup.attn_implementation == "sdpa" and setup.kernels is None and setup.optim in REWARDED_OPTIMIZERS
    alike = set(types) <= set(REWARDED) and (not values or types[0] == types[1])
    return loaded and plain and alike and job.method_name == "full"


def _packs_as_rehearsed(job: Job) -> bool:
    """Whether packed rows were rehearsed so: of a dense decoder in 16 bits or more, under sdpa without windows."""
    setup, shared = job.setup, job.distributed is not None and job.distributed.strategy != "ddp"
    whole = all(attention.window is None for block in job.architecture.blocks for attention in block.attentions)
    plain = setup.attn_implementation == "sdpa" and not setup.padding and setup.kernels is None and job.quant is None
    return plain and whole and not shared and job.method_name in ("full", "lora") and job.architecture.model_type in PACKED


def refused_product(job: Job) -> str | None:
    """Why bitsandbytes raises in the first forward; None where it runs (backends/cuda/ops.py, `_int8_linear_matmul_impl`)."""
    if job.quant is None or job.quant.name != "int8" or LATENT_CACHED.after(job.script.transformers):
        return None
    skipped = job.quant.skip_modules or ()
    if not any(module.name.endswith(LATENT) and not is_skipped(module.name, skipped) for module in job.architecture.modules):
        return None
    return (
        f"a step with int8 layers: bitsandbytes raises ValueError for {LATENT}, whose input has four dimensions since "
        f"{LATENT_CACHED.named} (add quant_skip_modules kv_b_proj,lm_head)"
    )


def _check_parameters(job: Job) -> None:
    """Raise NoEngineError for LoRA over parameters by axolotl, whose peft makes their whole updates, and holds them beside
    their sums (tuners/lora/layer.py, `_LoraParameterProxy`); later ones make each sum of its factors."""
    from peftplan.analytic.rehearsed import adapts_parameters

    if adapts_parameters(job):
        raise NoEngineError("LoRA on parameters with the peft that axolotl pins (no formula yet)")


def _check_stacks(job: Job) -> None:
    """Raise NoEngineError for stacks of experts in 8 bits whose non-reentrant checkpoints end within them.

    torch stops recomputing at the last tensor that backward needs. Where that is one of the experts', the hook that empties the
    cache of restored weights does not run, and all layers stay (axolotl 0.19.0, monkeypatch/moe_quant.py:77).
    """
    setup, quant = job.setup, job.quant
    if quant is not None and quant.name == "int8" and setup.gradient_checkpointing and not setup.use_reentrant:
        raise NoEngineError(
            "stacks of experts in int8 with non-reentrant checkpoints, which leave them restored (no formula yet)"
        )


def _check_text_part(job: Job) -> None:
    """Raise for what of a vision-language model does not run, or was not compared, where samples have no images."""
    adaptation, architecture = job.adaptation, job.architecture
    names = (*(tensor.name for tensor in adaptation.added), *(param.module for param in adaptation.trained))
    if job.distributed is not None and (layers_of_images(architecture) or not _knows_shared(job, job.distributed)):
        raise NoRankFormulaError(f"a step with {job.distributed.called} and model type {architecture.model_type}")
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    if divided and job.setup.by.shows_picture and architecture.model_type not in SHOWN_PICTURES:
        raise NoRankFormulaError(f"a tower that {job.setup.by.called} shows a picture, of model type {architecture.model_type}")
    if job.setup.by.reloads_weights and job.distributed is not None and job.distributed.strategy != "zero1":
        raise NoRankFormulaError(f"weights that wait on the host, of model type {architecture.model_type}")
    if job.setup.loss in loss_sizes.OF_SHARED_ROWS:
        raise NoEngineError(f"rows that ranks share, of model type {architecture.model_type} (no formula yet)")
    compiled = kernels_of(job.setup.kernels or ()).layers is not None
    recorded = compiled and job.setup.packs_completions  # of this model, or its step has no formula
    known = "" if recorded else TRAINERS_OF_TEXT_PARTS.get(job.setup.by.name, None if job.setup.by.of_preferences else "")
    unlike = bool(layers_of_images(architecture)) and job.setup.by.of_preferences  # rehearsed: 4 % less than a formula says
    if known is None or unlike or not architecture.model_type.startswith(known):
        raise NoEngineError(f"model type {architecture.model_type} and {job.setup.by.called} (no formula yet)")
    if architecture.task_type == "SEQ_CLS" and architecture.model_type in SCORED:
        from peftplan.analytic.shown import scores_text  # which few jobs need

        if not scores_text(job):
            raise NoEngineError(f"a score of model type {architecture.model_type} with {job.setup.by.called} (no formula yet)")
        if not all(is_in_text_part(architecture, name) for name in names):  # a trace builds what transformers has
            raise NoEngineError(f"a score of {architecture.model_type} and weights outside its text part (no formula yet)")
    if not architecture.blocks:
        raise NeedsTraceError(f"activations of the text part of model type {architecture.model_type}")
    if job.script.transformers is not None:
        raise NoEngineError(f"model type {architecture.model_type} with another release of transformers (no formula yet)")
    if getattr(job.config, "num_virtual_tokens", None):
        raise NeedsTraceError(f"virtual tokens in model type {architecture.model_type}")
    if compiled:
        return
    if _knows_idle(job, names) and job.setup.by.name in TEXT_ALONE and job.method_name != "adalora":
        return
    head, by_tool = f"{architecture.output_embedding}.", job.setup.by.own_lora
    if by_tool and job.method_name == "full":  # where `knows_tower` says so
        return
    if by_tool:  # a projector gets no gradient without images, and neither does a tower
        names = tuple(n for n in names if not (PROJECTOR in n or n.startswith(STACK) or trains_tower(job)))
    if not all(is_in_text_part(architecture, name) and (by_tool or not name.startswith(head)) for name in names):
        raise NeedsTraceError(f"weights that train outside the text part of model type {architecture.model_type}")


def _knows_idle(job: Job, names: tuple[str, ...]) -> bool:
    """Whether weights that train outside a text part were rehearsed, on one GPU or on a rank like this one."""
    if job.distributed is None:
        return True
    from peftplan.analytic.idle_towers import knows_idle
    from peftplan.analytic.text_parts import knows_wrapped

    return knows_wrapped(job) or knows_idle(job, job.distributed, names)


def _knows_shared(job: Job, distributed: Distributed) -> bool:
    """Whether a text part was rehearsed on a rank like this one."""
    from peftplan.analytic.idle_towers import knows_base  # which few jobs need
    from peftplan.analytic.text_parts import knows_wrapped

    by_tool = job.setup.by.own_lora and knows_tower(job)
    return by_tool or knows_base(job, distributed.strategy) or knows_wrapped(job)


def _check_kernels(job: Job) -> None:
    """Raise NoEngineError where a step with these kernels, or of these modules, has no formula."""
    why = kernels_without_formula(job)
    if why is None and job.setup.by.own_modules:
        from peftplan.job import built

        why = built.without_formula(job)
    if why is None and job.setup.by.own_lora:
        from peftplan.job import automodel

        why = automodel.without_formula(job)
    if why is not None:
        raise NoEngineError(f"{why} (no formula yet)")


EMBEDDED = ("bert", "xlm-roberta", "roberta", "distilbert", "modernbert", "llama", "qwen3", "gemma3_text")
"""Model types whose steps with embeddings of pairs were rehearsed, and RoBERTa, which runs XLM-RoBERTa's code."""


def _check_embedding(job: Job) -> None:
    """Raise NoEngineError for embeddings of pairs that no rehearsal was compared with."""
    name, model_type = "" if job.method is None else job.method.name, job.architecture.model_type
    if name not in ("full", "lora") or job.quant is not None or model_type not in EMBEDDED:
        base = "" if job.quant is None else f" on a base in {job.quant.name}"
        raise NoEngineError(f"{name}{base} of model type {model_type} with {job.setup.by.called} (no formula yet)")


def _writes_as_rehearsed(job: Job) -> bool:
    """Whether blocks behind anchors are written as was rehearsed (tests/rehearse/axolotl_strided.jsonl): by a Llama in 16 bits
    with checkpoints."""
    setup = job.setup
    alike = bool(setup.gradient_checkpointing) and job.quant is None and job.architecture.model_type == "llama"
    loaded = setup.attn_implementation in ("sdpa", "eager")
    return alike and loaded and job.method_name == ("lora" if setup.by.rows == 1 else "full")


def _merges_beside_tower(job: Job) -> bool:
    """Whether a merge beside a tower was rehearsed (tests/rehearse/swift.jsonl): of LoRA of Qwen2.5-VL and Qwen3.5 under DDP."""
    shared = job.distributed is not None and job.distributed.strategy == "ddp" and job.setup.vllm_mode != "server"
    return shared and job.method_name == "lora" and job.architecture.model_type in ("qwen2_5_vl", "qwen3_5")


def _merges_into(job: Job) -> bool:
    """Whether a merge into such a base was rehearsed (tests/rehearse/swift.jsonl)."""
    of_4_bits = job.quant is not None and job.quant.layout in FOUR_BIT and job.setup.vllm_mode != "server"
    return of_4_bits and job.is_full_or_lora and job.distributed is not None and job.distributed.strategy == "zero2"


def _unread(adapter: Mapping[str, object]) -> str:
    """The part of an adapter config that only peft itself can read."""
    try:
        methods.from_peft_config(adapter)
    except NeedsPeftError as what:
        return str(what)
    return "this adapter config"

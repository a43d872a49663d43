"""Which jobs have a formula, and what the others lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import peftplan.methods as methods
from peftplan.analytic.families import check_family
from peftplan.analytic.kernel_checks import WRITTEN, kernels_without_formula, reads_8_bits, reads_packed
from peftplan.analytic.mixers import check_delta_rule, check_mixer
from peftplan.analytic.of_tools import unlike_rehearsed
from peftplan.analytic.trainer_checks import check_embedding, check_passages, check_trainer
from peftplan.errors import NeedsTraceError, NoEngineError, NoRankFormulaError
from peftplan.job import loss_sizes
from peftplan.job.automodel import builds
from peftplan.job.kernels import kernels_of
from peftplan.job.trainers import OLDER
from peftplan.job.virtual_tokens import check_virtual_tokens
from peftplan.memory.methods import ADAPTERS
from peftplan.memory.models import FORWARDS, OF_TEXT_PARTS
from peftplan.methods.adaptation import NeedsPeftError
from peftplan.optim import parse_optim_args
from peftplan.storage import is_skipped, without_peak
from peftplan.versions import LATENT_CACHED

if TYPE_CHECKING:
    from peftplan.job.job import Job

COPYING = ("sgd", "rmsprop", "adagrad")
"""Optimizers of torch that add decayed weights to copies of the gradients (torch, optim/sgd.py:429)."""
LATENT = "kv_b_proj"
"""What expands the latent keys and values of DeepSeek and GLM."""


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
    check_trainer(job)
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
    if job.setup.by.name in OLDER:
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
        check_embedding(job)
    if job.setup.by.passages is not None:
        check_passages(job)
    if model_type in OF_TEXT_PARTS or job.architecture.has_towers:
        from peftplan.analytic.text_part_checks import check_text_part  # which few jobs need

        check_text_part(job)
    _check_kernels(job)
    if job.method.module == "bottleneck":
        from peftplan.methods.bottleneck import refuse_unplaced

        refuse_unplaced(job.architecture, job.adaptation)


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
    """Raise NoEngineError for LoRA over parameters by axolotl where it was not rehearsed with the newest peft.

    The one that 0.19 pins makes their whole updates, and holds them beside their sums (tuners/lora/layer.py,
    `_LoraParameterProxy`); later ones make each sum of its factors (tests/rehearse/axolotl_routers.jsonl).
    """
    from peftplan.analytic.rehearsed import adapts_parameters

    if not adapts_parameters(job):
        return
    if job.setup.by.transformers:
        raise NoEngineError("LoRA on parameters with the peft that axolotl 0.19 pins (no formula yet)")
    if not job.setup.by.own_fsdp2:
        raise NoEngineError(f"LoRA on parameters by {job.setup.by.called} (no formula yet)")
    if job.quant is not None or job.distributed is not None:
        where = "a quantized base" if job.distributed is None else job.distributed.called
        raise NoEngineError(f"LoRA on parameters by axolotl, with {where} (no formula yet)")


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


def _unread(adapter: Mapping[str, object]) -> str:
    """The part of an adapter config that only peft itself can read."""
    try:
        methods.from_peft_config(adapter)
    except NeedsPeftError as what:
        return str(what)
    return "this adapter config"

"""Which jobs with Mamba 2 have a formula: by mamba-ssm's kernels, or in those operations of torch that were recorded; and which
with a gated delta rule, in torch's operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.analytic.sizes import between_chunks, knows_one_chunk
from peftplan.arch.text_part import keeps_its_cache
from peftplan.errors import NeedsTraceError, NoEngineError
from peftplan.job.automodel import OF_ATTENTION, builds, knows_experts
from peftplan.job.automodel_scans import has_own_code, knows_recorded
from peftplan.job.beside_towers import knows_tower
from peftplan.job.compiled_layers import recorded
from peftplan.job.kernels import kernels_of
from peftplan.job.loss_sizes import CUT
from peftplan.job.trainers import DEFAULT

if TYPE_CHECKING:
    from peftplan.job.job import Job

PLAIN_TRAINERS = ("plain", "transformers", "trl")
"""Trainers whose steps with a recorded mixer were compared."""
WITH_DELTA_RULE = {
    **dict.fromkeys(("transformers", "trl"), ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")),
    "plain": (),
    "swift-text-part": ("ddp", "zero2"),
}
"""Trainer → the strategies under which its steps with a gated delta rule were rehearsed, beside those on one GPU
(tests/rehearse/delta_rules.jsonl, delta_ranks.jsonl)."""


def check_mixer(job: Job) -> None:
    """Raise NeedsTraceError where Mamba 2 runs as torch's operations, NoEngineError where its kernel was not rehearsed.

    Recorded layers have it among their events.
    """
    setup, architecture = job.setup, job.architecture
    if recorded(job) is not None:
        return
    if job.distributed is not None and _scans_under_zero2(job):
        return
    if kernels_of(setup.kernels or ()).scan is None:
        _check_recorded(job)
        return
    if _scans_apart(job):
        return
    by_tool = has_own_code(job) or builds(job)
    unknown = {
        "a mixture of experts": any(block.mlp.variant == "moe" for block in architecture.blocks) and not builds(job),
        f"method {job.method_name or 'of this adapter config'}": not job.is_full_or_lora,
        "a quantized base": job.quant is not None,
        "padding": setup.padding,
        "a cache": bool(setup.use_cache) and not (setup.gradient_checkpointing or setup.by.turns_cache_off or by_tool),
        "eager attention": setup.attn_implementation == "eager",
        f"loss {setup.loss}": setup.loss not in ("full", *(("trl-chunked",) if architecture.model_type == "nemotron_h" else ()))
        and not (by_tool and knows_experts(job)),
        "projections in fp32": setup.dtype == "fp32" and (setup.autocast == "none" or architecture.model_type == "falcon_h1"),
        f"published code under {setup.by.called}": has_own_code(job) and not setup.by.own_lora,
        f"several GPUs under {setup.by.called}": job.distributed is not None and not setup.by.own_lora,
    }
    if (what := next((what for what, is_so in unknown.items() if is_so), None)) is not None:
        raise NoEngineError(f"mamba-ssm's kernel with {what} (no formula yet)")


def _check_recorded(job: Job) -> None:
    """Raise NeedsTraceError or NoEngineError where a mixer was not recorded."""
    setup, model_type = job.setup, job.architecture.model_type
    as_rehearsed = knows_recorded(job) or _scans_as_rehearsed(job)
    chunks = "whole chunks" if knows_one_chunk(job.architecture) else "two or more whole chunks"
    unknown = {
        "kernels": bool(setup.kernels),
        "padding": setup.padding,
        "a cache": bool(setup.use_cache)
        and not (setup.gradient_checkpointing or setup.by.turns_cache_off or knows_recorded(job)),
        "virtual tokens": bool(getattr(job.config, "num_virtual_tokens", None)),
        f"autocast {setup.autocast}": setup.autocast == "fp16",
        "weights in fp16": setup.dtype == "fp16",
        "reentrant checkpoints": bool(setup.gradient_checkpointing and setup.use_reentrant),
        "another release of transformers": job.script.transformers is not None,
        "an adapter": model_type == "falcon_h1" and job.method_name != "full" and not as_rehearsed,
        "checkpoints": model_type == "falcon_h1"
        and bool(setup.gradient_checkpointing)
        and not as_rehearsed,  # full: forward 2.8 % above a trace
        "weights in fp32 that train under autocast": model_type == "granitemoehybrid"  # reserved 4 % below a trace
        and (setup.dtype, setup.autocast, job.method_name) == ("fp32", "bf16", "full")
        and bool(setup.gradient_checkpointing),
        f"method {job.method_name}": job.method_name not in ("full", "lora", "qlora"),
        "groups of heads": model_type == "granitemoehybrid"
        and any(block.state_space is not None and block.state_space.groups > 1 for block in job.architecture.blocks),
        f"{setup.seq_len} tokens, which are not {chunks}": any(between_chunks(setup.seq_len, job.architecture)),
    }
    if (what := next((what for what, is_so in unknown.items() if is_so), None)) is not None:
        raise NeedsTraceError(f"the mixer of model type {model_type} with {what}")
    if as_rehearsed:
        return
    if has_own_code(job) or job.setup.by.name not in PLAIN_TRAINERS or job.distributed is not None:
        where = job.setup.by.called if job.distributed is None else job.distributed.called
        raise NoEngineError(f"model type {model_type} without mamba-ssm, under {where} (no formula yet)")


def _scans_as_rehearsed(job: Job) -> bool:
    """Whether the scan was rehearsed with such a job: QLoRA of Falcon-H1 by axolotl, of one row on one GPU
    (tests/rehearse/axolotl_scan.jsonl)."""
    setup = job.setup
    alone = job.distributed is None and setup.batch_size == 1 and job.architecture.model_type == "falcon_h1"
    of_adapter = job.method_name == "qlora" and job.quant is not None and job.quant.name == "nf4" and bool(setup.kbit_prepare)
    plain = setup.dtype == setup.autocast == "bf16" and setup.loss == "full"
    return setup.by.own_fsdp2 and alone and of_adapter and plain and bool(setup.gradient_checkpointing)


def _scans_under_zero2(job: Job) -> bool:
    from peftplan.analytic.shown import scans_under_zero2  # which few jobs need

    return scans_under_zero2(job)


def _scans_apart(job: Job) -> bool:
    """Whether mamba-ssm's functions beside 4-bit projections were rehearsed with such a job: QLoRA of Nemotron 3's attention by
    axolotl, of one packed row on one GPU, whose experts are stored in 4 bits (tests/rehearse/axolotl_mixers.jsonl)."""
    from peftplan.analytic.shown import is_bare  # which few jobs need

    setup = job.setup
    alone = job.distributed is None and setup.batch_size == 1 and setup.kernels == ("mamba-ssm.scan",)
    of_adapter = job.method_name == "qlora" and job.quant is not None and job.quant.name == "nf4" and bool(setup.quant_experts)
    of_attention = of_adapter and all(module.name.endswith(OF_ATTENTION) for module in job.adaptation.matched)
    plain = setup.dtype == setup.autocast == "bf16" and setup.loss == CUT and setup.attn_implementation == "flash_attention_2"
    checkpoints = bool(setup.gradient_checkpointing) and not setup.use_reentrant
    by_axolotl = setup.by.own_fsdp2 and job.architecture.model_type == "nemotron_h"
    return by_axolotl and alone and of_attention and plain and checkpoints and is_bare(job)


def check_delta_rule(job: Job) -> None:
    """Raise NeedsTraceError or NoEngineError where a step with a gated delta rule was not compared."""
    setup, model_type = job.setup, job.architecture.model_type
    kernels = kernels_of(setup.kernels or ())
    from peftplan.memory.delta_rule import CHUNK, MOST_CHUNKS

    beside_tower = setup.seq_len <= CHUNK * MOST_CHUNKS and knows_tower(job)
    by_tool = setup.by.own_lora and (knows_experts(job) or beside_tower)
    if kernels.layers is not None or by_tool:  # which torch compiles whole, or NeMo Automodel builds
        return
    known = setup.by.name in WITH_DELTA_RULE and (job.distributed is None or _shares_delta_rule(job))
    known = known and (not setup.by.shows_picture or job.method_name == "lora")
    if has_own_code(job) or not (known or _merges_for_vllm(job)):
        where = setup.by.called if job.distributed is None else job.distributed.called
        how = "with flash-linear-attention" if kernels.delta_rule is not None else "in torch's operations"
        raise NoEngineError(f"model type {model_type} {how}, under {where} (no formula yet)")
    checkpoints = bool(setup.gradient_checkpointing)
    caches = bool(setup.use_cache) or keeps_its_cache(job.architecture)
    unknown = {
        "other kernels": any(name != "fla.delta_rule" for name in setup.kernels or ()),
        "padding": setup.padding,
        "a cache": caches and not checkpoints and not setup.by.turns_cache_off and setup.loss != "trl-chunked",
        "eager attention": setup.attn_implementation == "eager",  # backward 0.33 % above a trace
        "fp16": "fp16" in (setup.dtype, setup.autocast),
        "projections in fp32": setup.dtype == "fp32" and setup.autocast == "none",
        "another release of transformers": job.script.transformers is not None,
        f"method {job.method_name}": job.method_name not in ("full", "lora", "qlora") or not job.is_full_or_lora,
        f"a base in {job.quant and job.quant.name}": job.quant is not None and job.quant.name != "nf4",
        f"loss {setup.loss}": setup.loss not in ("full", "trl-chunked"),
        "checkpoints in host memory": bool(setup.offload_checkpoints),
        f"rows of more than {CHUNK * MOST_CHUNKS:,} tokens": setup.seq_len > CHUNK * MOST_CHUNKS,
    }
    if (what := next((what for what, is_so in unknown.items() if is_so), None)) is not None:
        if kernels.delta_rule is not None:
            raise NoEngineError(f"flash-linear-attention's function with {what} (no formula yet)")
        raise NeedsTraceError(f"the delta rule of model type {model_type} with {what}")


def _merges_for_vllm(job: Job) -> bool:
    """Whether ms-swift's GRPO was rehearsed so on each of several GPUs: LoRA of a text part that it merges for vLLM
    (tests/rehearse/swift.jsonl)."""
    setup, by_swift = job.setup, job.setup.by.sends_at_once and job.setup.by.shows_picture
    beside = job.setup.merges_for_vllm and job.setup.vllm_mode != "server" and not setup.kernels and not setup.by.taught
    shared = job.distributed is not None and job.distributed.strategy == "ddp" and not setup.by.reloads_weights
    return by_swift and beside and shared and job.method_name == "lora" and job.architecture.model_type == "qwen3_5"


def _shares_delta_rule(job: Job) -> bool:
    """Whether ranks were rehearsed that share a step with one: in bf16, all on the card, and without experts under ZeRO.

    Under FSDP1 with LoRA beside a tower alone. Under FSDP2 they name the layers' class: by itself accelerate looks for vision
    blocks too, which text models do not have.
    """
    setup, distributed = job.setup, job.distributed
    assert distributed is not None
    on_card = not {distributed.offload_params, distributed.offload_optimizer} - {None, "none"}
    alike = on_card and setup.dtype == setup.autocast == "bf16"
    alike = alike and (job.architecture.model_type != "qwen3_next" or distributed.strategy == "fsdp2")
    known = alike and distributed.strategy in WITH_DELTA_RULE[setup.by.name]
    if kernels_of(setup.kernels or ()).delta_rule is not None:  # which was traced with Trainer alone
        known = known and setup.by.name == DEFAULT and job.quant is None and not job.architecture.has_towers
    if distributed.strategy == "fsdp2":
        return known and (distributed.transformer_cls_names_to_wrap is not None or job.architecture.has_towers)
    if distributed.strategy == "fsdp1":
        return known and job.architecture.model_type == "qwen3_5" and job.method_name == "lora"
    dense = all(block.mlp.variant != "moe" for block in job.architecture.blocks)
    return known and (dense or distributed.strategy == "ddp")

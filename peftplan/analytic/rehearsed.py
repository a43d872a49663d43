"""Which steps over several GPUs have a formula: those that were rehearsed, by strategy (docs/reference/several-gpus.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peftplan.versions as versions
from peftplan.analytic.divided_by_automodel import knows_compiled, knows_division, knows_pipeline, knows_prefetch
from peftplan.analytic.rehearsed_zero import APART, SHARING_ROWS, has_experts_apart, unknown_to_zero
from peftplan.analytic.shown import (
    UNDER_DEVICE_MAP,
    ZERO,
    adapts_mixture,
    classifies,
    is_decoder,
    is_dense,
    is_like_traced,
    is_plain,
    is_shown_reentrant,
    is_shown_trainer,
    knows_methods,
    layer_classes,
    packs_in_fp32,
    scores_text,
    shown_methods,
    shows_base,
    shows_dora,
    translates_text,
)
from peftplan.analytic.shown_optimizers import SHOWN_OPTIMIZERS, shown_optimizers
from peftplan.analytic.text_parts import knows_wrapped
from peftplan.distributed.flat_parameters import wraps_mlps
from peftplan.distributed.layout import ACCELERATE, AUTOMODEL
from peftplan.distributed.tensor_parallel import PLANS, ranks_of
from peftplan.job.automodel import builds, knows_experts, knows_worst_routing
from peftplan.job.kernels import WITH_FORMULA
from peftplan.job.loss_sizes import CUT, CUT_APART
from peftplan.memory.recast import WHOLE
from peftplan.memory.unit_groups import tied
from peftplan.optim import parse_optim, parse_optim_args

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job

LONGEST_RING = 8
RINGS_OF_AUTOMODEL = (2, 16)
"""How many ranks share a row, by NeMo Automodel (tests/rehearse/automodel.jsonl)."""
REENTRANT = "reentrant checkpoints"
"""Whether the user or the trainer asks for them: TRL does so whatever `use_reentrant` says."""


def without_formula(job: Job) -> str | None:
    """Why a job over several GPUs has no peak formula, as a suffix for a message; None if it has one."""
    distributed = job.distributed
    assert distributed is not None
    by = job.setup.by
    under = {"ddp": by.under_ddp, "fsdp2": by.under_fsdp2, "zero0": by.under_zero0, "zero1": by.under_zero1}
    rehearsed = (under | {"zero2": by.under_zero2, "zero3": by.under_zero3}).get(distributed.strategy, ())
    if (by.of_preferences and job.reference not in rehearsed) or (by.anchors and not _knows_anchors(job)):
        return f" and {by.called}"
    if by.taught:
        from peftplan.job.teacher import loads_most

        if not loads_most(job):
            return f" and {by.called}, which may need most while it scores"
    if job.setup.keeps_ends_wide and job.method_name == "full" and distributed.strategy not in ("fsdp1", "fsdp2"):
        return f" and norms and embeddings in fp32, as {by.called} keeps them without FlashAttention"
    prepares = job.quant is not None and bool(job.setup.kbit_prepare)
    if by.narrows:
        return " and tables that are cast back"
    if job.setup.noisy_embeddings and distributed.strategy != "ddp":
        return " and noise on the embeddings"
    if prepares and by.casts_back and distributed.strategy not in WHOLE:  # axolotl 0.19.0, loaders/model.py:1002
        return f" and kbit preparation, which {by.called} leaves out there"
    if distributed.strategy == "ddp":
        return None
    if distributed.strategy == "tp":
        return _listed(_unknown_to_tp(job, distributed))
    if distributed.strategy == "device-map":
        return _listed(_unknown_to_device_map(job))
    unknown = (unknown_to_zero(job, distributed) if distributed.strategy in ZERO else _unknown_to_fsdp(job, distributed)) | {
        REENTRANT: job.setup.use_reentrant and bool(job.setup.gradient_checkpointing) and not is_shown_reentrant(job),
        **_unrehearsed(job),
    }
    return _listed(unknown)


def _knows_anchors(job: Job) -> bool:
    """Whether a job that compares all logits with a second model's was rehearsed (tests/rehearse/llamafactory.jsonl)."""
    assert job.distributed is not None
    return job.distributed.strategy == "zero0" and job.reference == "copy" and job.setup.autocast == "bf16"


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
        APART: has_experts_apart(job),
        f"a vocabulary of {architecture.vocab_size:,}": bool((architecture.vocab_size or 0) % ranks_of(distributed)),
        "target_modules": any(module.name in tables for module in job.adaptation.matched),
        "modules_to_save": bool(getattr(job.config, "modules_to_save", None)),
        **_unknown_to_dense(job, tuple(PLANS), SHOWN_OPTIMIZERS),
    }


def _unknown_to_device_map(job: Job) -> dict[str, bool]:
    """The same over several GPUs of one process."""
    return {"trainer": not job.setup.by.prepares_model, **_unknown_to_dense(job, UNDER_DEVICE_MAP, ("adamw_torch_fused",))}


def _knows_mapped_4_bits(job: Job) -> bool:
    """Whether QLoRA over a `device_map` was rehearsed: over nf4 in bf16, by a trainer that makes no preparation of its own."""
    assert job.distributed is not None
    over_nf4 = job.method_name == "qlora" and job.quant is not None and job.quant.name == "nf4"
    return over_nf4 and job.distributed.strategy == "device-map" and job.setup.dtype == job.setup.autocast == "bf16"


def _unknown_to_dense(job: Job, model_types: tuple[str, ...], optimizers: tuple[str, ...]) -> dict[str, bool]:
    """The same where a dense model was rehearsed, fully trained or with LoRA, with the loss of all logits."""
    setup, method = job.setup, job.method.name if job.method else "this adapter config"
    return {
        f"model type {job.architecture.model_type}": job.architecture.model_type not in model_types,
        f"task {job.architecture.task_type}": job.architecture.task_type != "CAUSAL_LM",
        f"method {method}": (method not in ("full", "lora") and not _knows_mapped_4_bits(job))
        or bool(getattr(job.config, "use_dora", False)),
        f"quant {job.quant and job.quant.name}": job.quant is not None and not _knows_mapped_4_bits(job),
        "loss": setup.loss != "full",
        REENTRANT: bool(setup.use_reentrant and setup.gradient_checkpointing),
        "keep_gradients": bool(setup.keep_gradients),
        f"optim {setup.optim}": setup.optim not in optimizers,
    }


def adapts_parameters(job: Job) -> bool:
    """Whether an adapter stands over a parameter (peft, `ParamWrapper`), by name or by peft's defaults."""
    return bool(getattr(job.config, "target_parameters", None) or dict(job.adaptation.resolved).get("target_parameters"))


def _unknown_to_fsdp(job: Job, distributed: Distributed) -> dict[str, bool]:
    """Parameters whose values were not rehearsed, and whether the job sets them so."""
    autocast = job.setup.autocast
    classes = distributed.transformer_cls_names_to_wrap
    flat = distributed.strategy == "fsdp1"
    liger = ("liger",) if job.method_name == "full" or (flat and not job.setup.by.own_fsdp2) else ()
    losses = ("full", "trl-chunked", *liger, *(() if flat else (CUT,)))
    of_fsdp2 = {
        "reshard_after_forward": distributed.reshard_after_forward is False,
        "sync_each_batch": bool(distributed.sync_each_batch),
        "reduce_dtype": distributed.reduce_dtype not in (None, autocast),
    }
    return {
        "reshard_after_forward": type(distributed.reshard_after_forward) is int,
        "param_dtype": distributed.param_dtype not in (None, autocast, job.setup.by.layout.param_dtype),
        "backward_prefetch": distributed.backward_prefetch == "post",  # a step was 19.5 % above its rehearsal
        "wrap_policy": distributed.wrap_policy not in (None, "transformer"),
        "transformer_cls_names_to_wrap": classes not in (None, layer_classes(job))
        and not (knows_wrapped(job) or _knows_mixtures(job, distributed)),
        "tp_size": ranks_of(distributed) > 1 and not knows_division(job, distributed),
        "forward_prefetch": not flat and bool(distributed.forward_prefetch) and not knows_prefetch(job, distributed),
        "layers that torch compiles": not knows_compiled(job),
        "cp_size": distributed.cp_size not in (None, 1) and not _knows_shared_rows(job, distributed),
        "quant_storage": flat  # transformers computes in it
        and job.quant is not None
        and job.quant.quant_storage != (job.setup.dtype if autocast == "none" else autocast)
        and not packs_in_fp32(job),
        "offload_params of a quantized base": flat
        and job.quant is not None
        and distributed.offload_params == "cpu"
        and job.setup.loss != "full"
        and not (is_dense(job) and job.setup.gradient_checkpointing),
        "ep_size": distributed.ep_size not in (None, 1) and not knows_experts(job),
        "routing": distributed.routing == "worst" and not knows_worst_routing(job),
        "target_parameters": flat and adapts_parameters(job),  # peft reads lora_A and lora_B while FSDP1 holds them as shards
        "bias": flat and getattr(job.config, "bias", "none") != "none" and not _knows_biases(job, distributed),
        "pp_size": distributed.pp_size not in (None, 1) and not knows_pipeline(job, distributed),
        f"a release before {_first_known(distributed).named}": not flat and _has_units_of_layers(job, distributed),
        "loss": (job.setup.loss not in losses and job.setup.by.layout is ACCELERATE) or job.setup.loss == "torchtune-chunked",
        "cpu_ram_efficient_loading of tied embeddings": job.setup.by.own_fsdp2  # made twice: reserved +3.9 % of a rehearsal
        and not flat
        and bool(distributed.cpu_ram_efficient_loading)
        and job.method_name == "full"
        and tied(job.architecture),
        "checkpoints_parts": bool(distributed.checkpoints_parts) and not _knows_parts(job),
        "custom_sharded_layers": bool(distributed.custom_sharded_layers) and not _knows_ends(job, distributed),
        **{f"{name} under FSDP1": flat and is_set for name, is_set in of_fsdp2.items()},
    }


def _has_units_of_layers(job: Job, distributed: Distributed) -> bool:
    """Whether accelerate makes units of layers alone where that was not rehearsed."""
    older = versions.FSDP2_TAIL_APART.after(distributed.accelerate)
    return older and not _knows_units_of_layers(job, distributed.accelerate)


def _first_known(distributed: Distributed) -> versions.Change:
    """The first release that makes another step than a named one which was not rehearsed."""
    too_old = versions.FSDP2_FIRST_REHEARSED.after(distributed.accelerate)
    return versions.FSDP2_FIRST_REHEARSED if too_old else versions.FSDP2_TAIL_APART


def _knows_units_of_layers(job: Job, accelerate: str | None) -> bool:
    """Whether units of layers alone were rehearsed: full fine-tuning and LoRA of dense decoders in bf16."""
    decoder = job.architecture.task_type == "CAUSAL_LM" and not (job.architecture.has_towers or job.architecture.encoder_layers)
    plain = decoder and is_plain(job) and knows_methods(job) and job.quant is None and job.setup.loss == "full"
    known = job.method_name in ("full", "lora") and not getattr(job.config, "use_dora", False)
    known = known and job.setup.optim in ("adamw_torch", "adamw_torch_fused")
    assert job.distributed is not None
    replicas = job.distributed.dp_shard_size is not None and versions.FSDP2_IN_GROUPS.after(accelerate)
    shares_rows = (job.distributed.cp_size or 1) > 1
    return plain and known and not replicas and not shares_rows and not versions.FSDP2_FIRST_REHEARSED.after(accelerate)


def _knows_parts(job: Job) -> bool:
    """Whether checkpoints of modules within those of their layers were rehearsed: by axolotl, of a fully trained model, or beside
    GLM's experts in 4 bits."""
    setup = job.setup
    if adapts_mixture(job):
        return True
    nested = bool(setup.gradient_checkpointing) and not setup.use_reentrant and not setup.offload_checkpoints
    return nested and setup.by.own_fsdp2 and job.method_name == "full" and job.architecture.model_type in WITH_FORMULA


def _knows_biases(job: Job, distributed: Distributed) -> bool:
    """Whether biases were rehearsed that train beside LoRA, in the units of their layers: of dense models in bf16."""
    return is_plain(job) and distributed.use_orig_params is not False and knows_methods(job)


def _knows_mixtures(job: Job, distributed: Distributed) -> bool:
    """Whether mixtures of experts were rehearsed as FSDP1's units: by axolotl, of Mixtral in 4 bits and reentrant checkpoints."""
    setup, flat = job.setup, distributed.strategy == "fsdp1" and distributed.use_orig_params is False
    checkpointed = bool(setup.use_reentrant and setup.gradient_checkpointing) and not job.script.experts_apart
    adapted = job.architecture.model_type == "mixtral" and job.quant is not None and setup.by.own_fsdp2
    return wraps_mlps(distributed) and flat and checkpointed and adapted


def _knows_shared_rows(job: Job, distributed: Distributed) -> bool:
    """Whether rows were rehearsed that ranks share: by Trainer with torch's attention, of a dense model without windows, all of
    whose ranks share its weights, or by NeMo Automodel. Each place in a ring is counted apart."""
    setup, whole = job.setup, distributed.shards == distributed.world_size
    windows = any(a.window for block in job.architecture.blocks for a in block.attentions)
    return (
        (
            _shares_rows_by_automodel(job, distributed)
            or (is_like_traced(job) and not setup.by.sums_tokens and (distributed.cp_size or 1) <= LONGEST_RING)
        )
        and (job.architecture.model_type in SHARING_ROWS or knows_experts(job))
        and not windows
        and whole
        and job.is_full_or_lora
        and setup.attn_implementation == "sdpa"
        and not setup.padding
        and ranks_of(distributed) * (distributed.pp_size or 1) == 1
        and job.script.checkpoints_forward  # older releases of transformers were not rehearsed
    )


def _shares_rows_by_automodel(job: Job, distributed: Distributed) -> bool:
    """Whether NeMo Automodel was rehearsed so: fully trained models of its own, in bf16, over rings of these lengths, and
    transformers' Qwen3 over two ranks, with checkpoints and the loss that reads the head behind the model."""
    setup, ring = job.setup, distributed.cp_size or 1
    shown = builds(job) and ring in RINGS_OF_AUTOMODEL
    if setup.by.layout is AUTOMODEL and job.architecture.model_type == "qwen3" and not setup.by.own_decoders:
        shown = ring == RINGS_OF_AUTOMODEL[0] and setup.loss == CUT_APART and bool(setup.gradient_checkpointing)
    return shown and job.method_name == "full" and setup.dtype == "bf16" and not setup.seq_len % (2 * ring)


def _knows_ends(job: Job, distributed: Distributed) -> bool:
    """Whether a recipe of torchtune was rehearsed that shards these layers apart: of a model with a head of its own."""
    from peftplan.memory.unit_groups import BY_TORCHTUNE

    return (
        job.setup.by.own_modules
        and not tied(job.architecture)
        and job.setup.loss == "torchtune-linear"
        and set(distributed.custom_sharded_layers or ()) == BY_TORCHTUNE.keys()
    )


def _decomposes_on_card(job: Job) -> bool:
    """Whether what the optimizer computes on the GPU is why no engine knows its step, which a later check says."""
    on_card = job.distributed is not None and job.distributed.offload_params in (None, "none")
    return on_card and parse_optim(str(job.setup.optim)).unknown(parse_optim_args(job.setup.optim_args)) is not None


def _unrehearsed(job: Job) -> dict[str, bool]:
    """What of a job was rehearsed under no sharding strategy, and whether it is so."""
    assert job.distributed is not None
    setup, method = job.setup, job.method.name if job.method else "this adapter config"
    writes, translates = setup.by.generates and job.distributed.strategy == "zero3", translates_text(job)
    with_dora = bool(getattr(job.config, "use_dora", False))
    return {
        "use_vllm": writes and bool(setup.use_vllm) and not setup.by.sends_at_once,
        f"optim {setup.optim}": setup.optim not in shown_optimizers(job) and not _decomposes_on_card(job),
        "trainer": not is_shown_trainer(job),
        "keep_gradients": bool(setup.keep_gradients),
        "gradient_checkpointing": translates and bool(setup.gradient_checkpointing),
        "an untied head": translates and all(name.rpartition(".")[0] != "lm_head" for name, _ in job.architecture.ties),
        f"method {method}": method not in shown_methods(job) or (with_dora and not shows_dora(job)),
        f"quant {setup.quant}": job.quant is not None and not shows_base(job),
        "4-bit weights on the host": setup.device_map == "cpu" and (with_dora or method not in ("lora", "qlora")),  # DoRA: -7.7 %
        f"task {job.architecture.task_type}": job.architecture.task_type not in ("CAUSAL_LM", setup.by.task)
        and not (classifies(job) or translates or scores_text(job)),
        f"model type {job.architecture.model_type}": not (is_decoder(job) or classifies(job) or translates),
    }

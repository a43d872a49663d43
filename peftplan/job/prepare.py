"""Check and resolve a request into a job, the same for every engine and for measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import peftplan.methods as methods
from peftplan import versions
from peftplan.errors import InputError, RefusedError
from peftplan.job import sources as architectures
from peftplan.job.adapting import adapted, ignored_fields, method_of
from peftplan.job.job import Job
from peftplan.job.kernels import kernels_of
from peftplan.job.launch import OF_FSDP
from peftplan.job.request import Request, read_request
from peftplan.job.requirements import accepted_batch
from peftplan.job.resolving import check_logits_to_keep, resolved
from peftplan.job.router_loss import router_loss
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.job.separate import (
    dtype_of_weights,
    launched_options,
    parse_distributed,
    quant_of,
    separate_options,
    setup_of_method,
    setup_of_trainer,
    stored_format,
    task_of_adapter,
)
from peftplan.job.setup import Setup, parse_setup
from peftplan.job.tasks import CALLED, check_task, without_vllm
from peftplan.job.trainer import TABLES
from peftplan.job.words import named_as_typed
from peftplan.methods.adaptation import PROMPTED, Adaptation, MethodConfig
from peftplan.methods.endless import refuse_endless
from peftplan.methods.unmatched import unmatched_targets
from peftplan.optim import OF_DEEPSPEED, parse_optim
from peftplan.storage import QuantConfig
from peftplan.storage.config import FOUR_BIT

if TYPE_CHECKING:
    from peftplan.arch.modules import Architecture
    from peftplan.distributed.strategy import Distributed


ROUTER = r"\.gate\."
WIDE_ENDS = ("norm", ROUTER, *TABLES)
"""What of a model axolotl casts to fp32, by parts of names (axolotl 0.21.0, loaders/model.py:1462, loaders/utils.py:316)."""
HEAD = "lm_head"


def wide_ends(model_type: str, other_heads: tuple[str, ...]) -> tuple[str, ...]:
    """What of a model of this type axolotl casts to fp32; `other_heads` as in `Trainer`."""
    return tuple(part for part in WIDE_ENDS if part != HEAD or model_type not in other_heads)


def prepare(
    model: object = None,
    *,
    method: object = None,
    peft_config: object = None,
    quantization_config: object = None,
    training_args: object = None,
    script: object = NO_SCRIPT,
    strict: object = False,
    **options: object,
) -> Job:
    """The checked and resolved job of a request. Arguments and errors are those of `estimate`."""
    if not isinstance(script, Script):
        raise InputError("script", script, "accepted: a peftplan.Script")
    with named_as_typed({"method": method, **options}) as options:
        request = read_request(
            model,
            method=options.pop("method"),
            peft_config=peft_config,
            quantization_config=quantization_config,
            training_args=training_args,
            script=script,
            **options,
        )
        try:
            job = prepared(request)
        except InputError as error:
            if request.training is None or options.get(error.field) is not None:
                raise
            raise request.training.named(error) from None
        if strict and job.warnings:
            raise RefusedError(job.warnings[0])
        return job


def prepared(request: Request) -> Job:
    """The checked and resolved job of a `Request`."""
    model, loaded, as_loaded = request.model, request.loaded, request.as_loaded
    method, peft_config = request.method, request.adapter
    if as_loaded is not None:
        method, peft_config = (None, as_loaded.adapter) if as_loaded.adapter else (as_loaded.method(), None)
    options = request.all_options()
    chosen = frozenset(name for name, value in options.items() if value is not None and name not in OF_FSDP)
    launched, options, launch_notes = launched_options(options, request.script)
    setup_options, method_options = separate_options(options)
    distributed = parse_distributed(launched)
    kind, config, adapter = method_of(method, peft_config, method_options)
    model = architectures.read(model)
    model_config = architectures.load_config(model)
    if kind is not None and kind.name == "llama-pro":
        model, model_config = _with_new_layers(model, model_config, config)
    set_here = {k: v for k, v in setup_options.items() if v is not None}
    stored = stored_format(model_config, set_here)
    all_train = kind is not None and kind.name == "full"
    if stored and all_train:
        raise RefusedError(
            f"model: its repository stores weights as {stored['quant']}, and transformers refuses to train these; "
            "name the repository that stores 16 bits, or use a PEFT method"
        )
    set_here = stored | set_here
    loaded_dtype = dtype_of_weights(model, model_config, set_here, request.script, all_train=all_train)
    set_here |= loaded_dtype
    chosen -= loaded_dtype.keys()
    setup = parse_setup(
        {**task_of_adapter(adapter), **setup_of_method(kind, set_here), **setup_of_trainer(kind, set_here), **set_here}
    )
    try:
        architecture = architectures.load(
            model, task_type=setup.task_type, num_labels=setup.num_labels, trust_remote_code=setup.trust_remote_code
        )
    except InputError as error:
        if error.field == "task_type" and "task_type" not in set_here and setup.by.task is not None:
            raise RefusedError(
                f"trainer: {setup.by.called} trains {CALLED[setup.by.task]}, and this model has none ({error.accepted})"
            ) from None
        raise
    architecture = replace(architecture, notes=(*architecture.notes, *launch_notes)) if launch_notes else architecture
    if loaded is not None:
        architecture = replace(architecture, source=loaded.architecture.source)
    if distributed is not None and distributed.strategy == "fsdp2":
        distributed = setup.by.layout.of_tool(distributed)
    if setup.by.own_modules:
        from peftplan.job.built import as_torchtune_builds

        architecture = as_torchtune_builds(architecture, model_config, adapted=bool(kind and kind.peft_type))
    if setup.by.own_decoders:
        from peftplan.job.automodel_blocks import as_automodel_builds, without_routers
        from peftplan.job.further_tokens import NONE_BUILT, depths_of, with_further_tokens

        architecture = as_automodel_builds(architecture, model_config)
        depths = depths_of(setup, model_config, quantized=quant_of(setup, kind) is not None)
        if depths:
            architecture = with_further_tokens(architecture, model_config, shared=setup.mtp_depths is not None)
        elif setup.mtp_depths:
            architecture = replace(architecture, notes=(*architecture.notes, NONE_BUILT))
        if kernels_of(setup.kernels or ()).gate is not None:
            architecture = without_routers(architecture)
        setup = setup.model_copy(update={"mtp_depths": depths or None})
    if request.script.transformers is not None:
        from peftplan.job.built import as_of_release

        architecture = as_of_release(architecture, model_config, request.script)
    kernels = kernels_of(setup.kernels or ())
    if setup.by_unsloth:
        from peftplan.job.built import as_unsloth_loads

        quant = quant_of(setup, kind)
        in_4_bits = quant is not None and quant.name in FOUR_BIT
        separate = kernels.separate is not None
        architecture = as_unsloth_loads(architecture, model_config, in_4_bits=in_4_bits, separate=separate)
    wide_norms = kernels.decoder is None and kernels.separate is None and not setup.by.embeds
    if kernels.layers is not None and wide_norms:
        from peftplan.job.built import as_torch_compiles

        architecture = as_torch_compiles(architecture, model_config, scheme=kernels.layers.scheme)
    fields = vars(config) if config is not None else adapter
    if kind is not None and kind.module == "virtual_tokens":
        from peftplan.job.virtual_tokens import beside_virtual_tokens

        seq_len = setup.seq_len if "seq_len" in setup.model_fields_set else 0
        architecture = beside_virtual_tokens(architecture, fields.get("num_virtual_tokens"), seq_len)
    quant = quant_of(setup, kind)
    setup = resolved(
        setup,
        quantized=quant is not None,
        supports_sdpa=architecture.supports_sdpa,
        supports_flash_attn=request.script.runs_flash(architecture),
        use_cache=bool(model_config.get("use_cache", True)),
        max_positions=architecture.max_positions,
    )
    if quant is not None and quant.name == "awq" and setup.dtype == "bf16":
        setup = setup.model_copy(update={"dtype": "fp16"})  # transformers, quantizers/quantizer_awq.py, `update_dtype`
    if setup.by.wide_ends and quant is None and (distributed is None or distributed.strategy == "ddp"):
        wide: tuple[str, ...] = (ROUTER,)  # which no cast to 16 bits follows, but that of DeepSpeed
        if kind is not None and kind.name == "full" and setup.keeps_ends_wide and distributed is None:
            tied = (owner for alias, owner in architecture.ties if any(part in alias for part in TABLES))
            wide = (*wide_ends(architecture.model_type, setup.by.other_heads), *tied)
        architecture = replace(architecture, keep_in_fp32_strict=(*architecture.keep_in_fp32_strict, *wide))
    setup = setup.model_copy(update={"router_loss": router_loss(setup, architecture)})
    if "batch_size" not in setup.model_fields_set:
        replicas = 1 if distributed is None else distributed.replicas
        setup = setup.model_copy(update={"batch_size": accepted_batch(setup, replicas)})
    check_task(model, architecture, setup)
    if distributed is not None:
        from peftplan.job.shared_bases import loaded_by_rank, unprepared
        from peftplan.job.shared_optimizers import check_in_backward, stepped_by_deepspeed
        from peftplan.job.shared_work import (
            as_trainers_run,
            asked_checkpoints,
            changed_by_trainer,
            check_distributed,
            with_trainers_deepspeed,
        )

        distributed = with_trainers_deepspeed(distributed, setup)
        check_in_backward(distributed, setup)
        setup = loaded_by_rank(setup, distributed, quant, chosen=set_here.get("device_map"))
        setup = stepped_by_deepspeed(setup, distributed)
        if set_here.get("kbit_prepare") is None:
            setup = unprepared(setup, quant, distributed)
        makes_tokens = kind is not None and kind.peft_type in (*PROMPTED, "PREFIX_TUNING")  # in torch's default dtype
        if quant is None and set_here.get("adapter_dtype") is None and not makes_tokens:
            setup = changed_by_trainer(setup, distributed)
        if kind is None or kind.peft_type:
            setup = asked_checkpoints(setup, distributed, request.script)
        adapts = kind is None or kind.peft_type is not None
        distributed = as_trainers_run(distributed, setup, request.script, adapts=adapts, architecture=architecture)
        check_distributed(distributed, setup, architecture, quant, model_config, request.script)
        if distributed.sp_size not in (None, 1):
            from peftplan.job.ulysses import check_ulysses

            check_ulysses(distributed, setup, architecture)
    elif setup.device_map == "cpu":
        raise InputError(
            "device_map", "cpu", "accepted on one GPU: none, auto, cuda; under FSDP2 cpu leaves 4-bit weights on the host"
        )
    if kind is not None and kind.module == "virtual_tokens":
        from peftplan.job.virtual_tokens import check_prompted_task

        check_prompted_task(architecture, adapter)
    refuse_endless(architecture, {**fields, "quant_skip_modules": setup.quant_skip_modules})
    check_logits_to_keep(setup.logits_to_keep, min((setup.seq_len, *request.script.earlier_seq_lens)))
    adaptation = adapted(architecture, model, kind, config, adapter, setup)
    if setup.by.scores_values:
        from peftplan.job.built import with_value_head

        architecture, adaptation = with_value_head(architecture, adaptation)
    casts = setup.autocast != "none" or (distributed is not None and distributed.param_dtype is not None)
    if adaptation.trained_dtype is not None and not casts and setup.dtype != adaptation.trained_dtype:
        raise RefusedError(
            f"trainable_dtype: without autocast torch multiplies no {setup.dtype} by {adaptation.trained_dtype}; "
            "use --autocast bf16, or leave it out"
        )
    if setup.optim == "badam" and (
        distributed is not None or {family.layers and len(family.layers) for family in adaptation.trained} != {1}
    ):
        raise RefusedError(
            "optim: badam steps copies of one layer, the only one that trains; on several GPUs LLaMA-Factory refuses it without "
            "ZeRO-3, which has no formula; accepted: method partial with trainable_layers -1 (in Python), on one GPU"
        )
    if as_loaded is not None and not as_loaded.adapter and (partial := as_loaded.adaptation()) is not None:
        kind, adaptation = methods.METHODS["partial"], partial
    differing = loaded.differences(adaptation, adapted=as_loaded is not None) if loaded is not None else ()
    warnings = (
        *(request.training.warnings if request.training is not None else ()),
        *differing,
        *unmatched_targets(architecture, config, adapter),
        *(ignored_fields(adapter) if config is None and peft_config else ()),
        *without_vllm(setup),
        *(_wide_experts(setup, architecture, quant) if setup.by.own_fsdp2 else ()),
        *(() if distributed is None else _traps(distributed, setup, architecture, quant, adaptation)),
        *_replaced(set_here.get("optim"), setup),
    )
    chosen |= frozenset(adapter)
    second = None
    if setup.teacher_model is not None or setup.reward_model is not None:
        from peftplan.job.teacher import second_config

        second = second_config(setup)
    return Job(
        request._replace(model=model),
        kind,
        config,
        adapter,
        setup,
        quant,
        architectures.kept(architecture, model_config) if loaded is None else architecture,
        adaptation,
        warnings,
        chosen,
        distributed,
        second_config=second,
    )


def _with_new_layers(
    model: object, model_config: Mapping[str, object], config: MethodConfig | None
) -> tuple[architectures.Source, dict[str, object]]:
    """The model with the layers that LLaMA Pro adds, and its config."""
    from peftplan.methods.partial import LlamaProConfig, with_new_layers

    assert isinstance(config, LlamaProConfig)
    grown = with_new_layers(model_config, config)
    before = architectures.load(model)
    return architectures.Source(grown, before.name, before.source), grown


def _replaced(chosen: object, setup: Setup) -> Iterator[str]:
    """A warning where DeepSpeed's own optimizer steps in place of the one that was asked for."""
    if chosen is not None and setup.optim in OF_DEEPSPEED and not str(chosen).startswith("adamw_torch"):
        yield f"optim: {parse_optim(str(setup.optim)).cls} steps, not {chosen}: DeepSpeed's config or accelerate makes it"


def _wide_experts(setup: Setup, architecture: Architecture, quant: QuantConfig | None) -> tuple[str, ...]:
    from peftplan.job.traps import wide_experts

    return tuple(wide_experts(setup, architecture, quant))


def _traps(
    distributed: Distributed, setup: Setup, architecture: Architecture, quant: QuantConfig | None, adaptation: Adaptation
) -> tuple[str, ...]:
    from peftplan.job.shared_adapters import check_adapter
    from peftplan.job.shared_bases import check_base
    from peftplan.job.shared_optimizers import check_optimizer
    from peftplan.job.traps import traps

    check_optimizer(distributed, setup, adaptation)
    check_adapter(distributed, setup, architecture, adaptation)
    check_base(distributed, setup, architecture, quant, adaptation)
    return tuple(traps(distributed, setup, architecture, quant, adaptation))


def check_rank_allocator(job: Job) -> None:
    """Raises RefusedError for an AdaLoRA whose rank allocator is called and fails when it first masks ranks.

    It takes the k-th smallest score, k = (init_r - target_r) · layers, by `kthvalue`, which needs k ≥ 1 (peft,
    tuners/adalora/layer.py).
    """
    if job.method_name != "adalora" or not job.script.updates_ranks(job.setup):
        return
    fields = job.config.model_dump() if job.config is not None else job.adapter
    init_r, target_r = fields.get("init_r", 12), fields.get("target_r", 8)
    if isinstance(init_r, int) and isinstance(target_r, int) and init_r <= target_r:
        raise RefusedError(
            f"init_r: {init_r} leaves AdaLoRA nothing to mask down to target_r {target_r}, and {versions.named('peft')} "
            "then fails with a RuntimeError (kthvalue); accepted: an init_r above target_r"
        )

"""Check and resolve a request into a job, the same for every engine and for measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import peftplan.methods as methods
from peftplan import versions
from peftplan.distributed.names import OPTIONS
from peftplan.dtypes import AS_LOADED, OF_CHECKPOINT
from peftplan.errors import InputError, RefusedError
from peftplan.job import sources as architectures
from peftplan.job.adapting import adapted, ignored_fields, method_of
from peftplan.job.job import Job
from peftplan.job.kernels import kernels_of
from peftplan.job.launch import FILES, OF_FSDP, launch_options
from peftplan.job.repositories import PACKED
from peftplan.job.request import Request, read_request
from peftplan.job.requirements import accepted_batch
from peftplan.job.router_loss import router_loss
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.job.setup import Setup, check_logits_to_keep, parse_setup, resolved
from peftplan.job.tasks import CALLED, check_task, without_vllm
from peftplan.job.trainers import DEFAULT, TRAINERS
from peftplan.job.words import named_as_typed
from peftplan.methods.adaptation import Adaptation, MethodConfig
from peftplan.methods.endless import refuse_endless
from peftplan.methods.saved import SAVED_HEADS
from peftplan.methods.unmatched import unmatched_targets
from peftplan.storage import QuantConfig, check_trainable, parse_quant
from peftplan.storage.config import FOUR_BIT

if TYPE_CHECKING:
    from peftplan.arch.modules import Architecture
    from peftplan.distributed.strategy import Distributed

NOT_ON_4_BIT = ("loha", "lokr")
"""Methods whose forward adds an update to the packed weight itself (`LycorisLayer`, peft) and raises a RuntimeError."""


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
        job = prepared(request)
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
    launched, options, launch_notes = _launched(options, request.script)
    setup_options, method_options = _separate(options)
    distributed = _distributed(launched)
    kind, config, adapter = method_of(method, peft_config, method_options)
    model = architectures.read(model)
    model_config = architectures.load_config(model)
    if kind is not None and kind.name == "llama-pro":
        model, model_config = _with_new_layers(model, model_config, config)
    set_here = {k: v for k, v in setup_options.items() if v is not None}
    stored = _stored(model_config, set_here)
    if stored and kind is not None and kind.name == "full":
        raise RefusedError(
            f"model: its repository stores weights as {stored['quant']}, and transformers refuses to train these; "
            "name the repository that stores 16 bits, or use a PEFT method"
        )
    set_here = stored | set_here
    loaded_dtype = _loaded_dtype(model, model_config, set_here, request.script)
    set_here |= loaded_dtype
    chosen -= loaded_dtype.keys()
    setup = parse_setup({**_task_of(adapter), **_method_setup(kind, set_here), **_trainer_setup(kind, set_here), **set_here})
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
    if request.script.transformers is not None:
        from peftplan.job.built import as_of_release

        architecture = as_of_release(architecture, model_config, request.script)
    kernels = kernels_of(setup.kernels or ())
    if setup.by_unsloth:
        from peftplan.job.built import as_unsloth_loads

        quant = _quant(setup, kind)
        in_4_bits = quant is not None and quant.name in FOUR_BIT
        architecture = as_unsloth_loads(architecture, model_config, in_4_bits=in_4_bits)
    if kernels.layers is not None and not setup.by.embeds:  # there norms stay in 16 bits
        from peftplan.job.built import as_torch_compiles

        architecture = as_torch_compiles(architecture, model_config, scheme=kernels.layers.scheme)
    fields = vars(config) if config is not None else adapter
    if kind is not None and kind.module == "virtual_tokens":
        from peftplan.job.virtual_tokens import beside_virtual_tokens

        seq_len = setup.seq_len if "seq_len" in setup.model_fields_set else 0
        architecture = beside_virtual_tokens(architecture, fields.get("num_virtual_tokens"), seq_len)
    quant = _quant(setup, kind)
    setup = resolved(
        setup,
        quantized=quant is not None,
        supports_sdpa=architecture.supports_sdpa,
        supports_flash_attn=architecture.supports_flash_attn,
        use_cache=bool(model_config.get("use_cache", True)),
        max_positions=architecture.max_positions,
    )
    setup = setup.model_copy(update={"router_loss": router_loss(setup, architecture)})
    if "batch_size" not in setup.model_fields_set:
        replicas = 1 if distributed is None else distributed.replicas
        setup = setup.model_copy(update={"batch_size": accepted_batch(setup, replicas)})
    check_task(model, architecture, setup)
    if distributed is not None:
        from peftplan.job.shared_work import asked_checkpoints, changed_by_trainer, check_distributed, loaded_by_rank

        setup = loaded_by_rank(setup, chosen=set_here.get("device_map"))
        if quant is None and set_here.get("adapter_dtype") is None:
            setup = changed_by_trainer(setup, distributed)
        if kind is None or kind.peft_type:
            setup = asked_checkpoints(setup, distributed, request.script)
        check_distributed(distributed, setup, architecture, quant, model_config)
    if kind is not None and kind.module == "virtual_tokens":
        from peftplan.job.virtual_tokens import check_prompted_task

        check_prompted_task(architecture, adapter)
    refuse_endless(architecture, {**fields, "quant_skip_modules": setup.quant_skip_modules})
    check_logits_to_keep(setup.logits_to_keep, min((setup.seq_len, *request.script.earlier_seq_lens)))
    adaptation = adapted(architecture, model, kind, config, adapter, setup)
    casts = setup.autocast != "none" or (distributed is not None and distributed.param_dtype is not None)
    if adaptation.trained_dtype is not None and not casts and setup.dtype != adaptation.trained_dtype:
        raise RefusedError(
            f"trainable_dtype: without autocast torch multiplies no {setup.dtype} by {adaptation.trained_dtype}; "
            "use --autocast bf16, or leave it out"
        )
    if as_loaded is not None and not as_loaded.adapter and (partial := as_loaded.adaptation()) is not None:
        kind, adaptation = methods.METHODS["partial"], partial
    differing = loaded.differences(adaptation, adapted=as_loaded is not None) if loaded is not None else ()
    warnings = (
        *differing,
        *unmatched_targets(architecture, config, adapter),
        *(ignored_fields(adapter) if config is None and peft_config else ()),
        *without_vllm(setup),
        *(() if distributed is None else _traps(distributed, setup, architecture, quant, adaptation)),
    )
    chosen |= frozenset(adapter)
    return Job(
        request._replace(model=model),
        kind,
        config,
        adapter,
        setup,
        quant,
        architecture,
        adaptation,
        warnings,
        chosen,
        distributed,
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


def _loaded_dtype(
    model: object, model_config: Mapping[str, object], set_here: Mapping[str, object], script: Script
) -> dict[str, str]:
    """The dtype in which `from_pretrained` loads a model for which none is named; bf16 where its checkpoint's is not known."""
    dtype = set_here.get("dtype")
    if dtype == AS_LOADED and versions.DTYPE_OF_CHECKPOINT.after(script.transformers):
        return {"dtype": "fp32"}
    if dtype not in (OF_CHECKPOINT, AS_LOADED):
        return {}
    return {"dtype": architectures.checkpoint_dtype(model, model_config) or "bf16"}


def _traps(
    distributed: Distributed, setup: Setup, architecture: Architecture, quant: QuantConfig | None, adaptation: Adaptation
) -> tuple[str, ...]:
    from peftplan.job.shared_work import check_adapter, traps

    check_adapter(distributed, setup, architecture, adaptation)
    return tuple(traps(distributed, setup, quant, adaptation))


def _launched(options: Mapping[str, object], script: Script) -> tuple[dict[str, object], dict[str, object], tuple[str, ...]]:
    """(options of the strategy, all others), both with what launch files say, and notes on what these ask in vain."""
    from_files, _ = launch_options(options)
    options = {name: value for name, value in options.items() if name not in FILES}
    options |= {name: value for name, value in from_files.items() if options.get(name) is None}
    launched = {k: v for k, v in options.items() if k in OPTIONS}
    notes: tuple[str, ...] = ()
    if any(name in options for name in OF_FSDP):
        from peftplan.job.launch.accelerate import of_release

        stated = {name: options.pop(name) for name in OF_FSDP if name in options}
        launched, notes = of_release(launched, stated, script.transformers)
    return launched, {k: v for k, v in options.items() if k not in OPTIONS}, notes


def _distributed(launched: Mapping[str, object]) -> Distributed | None:
    """The strategy of these options; None for one GPU, most jobs, which do not pay for its schema."""
    if all(value is None for value in launched.values()):
        return None
    from peftplan.distributed.strategy import parse_distributed

    return parse_distributed(launched)


def _separate(options: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """(options of the setup, fields of the method)."""
    known = Setup.model_fields
    return {k: v for k, v in options.items() if k in known}, {k: v for k, v in options.items() if k not in known}


def _stored(model_config: Mapping[str, object], set_here: Mapping[str, object]) -> dict[str, object]:
    """The format of the checkpoint, if its config states one. transformers loads it in no other, so none may be asked for."""
    stored = model_config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return {}
    method = getattr(stored.get("quant_method"), "value", stored.get("quant_method"))
    if method in PACKED:
        of_gptq = {"quant_bits": stored.get("bits", 4)} if method == "gptq" else {}
        as_stored = {"quant": method, "quant_group_size": stored.get("group_size", 128), **of_gptq}
    elif stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        from peftplan.job import ecosystem

        as_stored = {name: value for name, value in ecosystem.quant_options(stored).items() if value is not None}
    else:
        return {}
    if set_here.get("quant", as_stored["quant"]) != as_stored["quant"]:
        raise RefusedError(
            f"quant: {set_here['quant']} is not how this repository stores its weights ({as_stored['quant']}), and transformers "
            "loads them as they are stored; leave it out, or name the repository that stores 16 bits"
        )
    return as_stored


def _task_of(adapter: Mapping[str, object]) -> dict[str, str]:
    """The task of an adapter with a head, which the model's config seldom names: the user loads the class for the adapter.

    Other tasks come from the config, since people also write CAUSAL_LM for vision-language models.
    """
    task = adapter.get("task_type")
    task = getattr(task, "value", task)
    return {"task_type": str(task)} if task in SAVED_HEADS else {}


def _method_setup(method: methods.Method | None, setup_options: Mapping[str, object]) -> dict[str, object]:
    """What a method implies for options that are not set.

    QLoRA is NF4 with double quantization and bf16 compute. Prefix tuning runs without checkpointing, since peft refuses both.
    """
    if method is not None and method.peft_type == "PREFIX_TUNING":
        return {"gradient_checkpointing": False}
    if method is None or method.quant is None:
        return {}
    quant = setup_options.get("quant") or method.quant
    if quant == "none":
        raise InputError(
            "quant", "none", f"{method.name} trains adapters on a quantized base; accepted: a format, or another method"
        )
    four_bit = {"double_quant": True, "compute_dtype": "bf16"} if quant in ("nf4", "fp4") else {}
    return {"quant": quant, **four_bit}


def _trainer_setup(method: methods.Method | None, setup_options: Mapping[str, object]) -> dict[str, object]:
    """The task and the scores of a trainer's head, where it has one of its own, and the dtype that it trains a whole model in."""
    name = setup_options.get("trainer", DEFAULT)
    if not isinstance(name, str) or name not in TRAINERS:
        return {}
    trainer = TRAINERS[name]
    if trainer.num_labels is not None:
        return {"task_type": trainer.task, "num_labels": trainer.num_labels}
    if trainer.embeds:
        return {"task_type": trainer.task}
    whole = method is not None and method.name == "full"
    return {"dtype": "fp32"} if whole and trainer.full_in_fp32 else {}


def _quant(setup: Setup, method: methods.Method | None) -> QuantConfig | None:
    quant = parse_quant(
        setup.quant or "none",
        double_quant=setup.double_quant,
        bits=setup.quant_bits,
        group_size=setup.quant_group_size,
        blocksize=setup.quant_blocksize,
        compute_dtype=setup.compute_dtype or (setup.dtype if setup.quant in ("nf4", "fp4") else None),
        quant_storage=setup.quant_storage,
        skip_modules=setup.quant_skip_modules,
        experts=bool(setup.quant_experts),
    )
    if quant is not None and quant.name == "nf4" and setup.by.own_modules:
        quant = quant._replace(by_torchao=True, double_quant=True)
    check_trainable(quant)
    if quant is not None and method is not None and method.name == "full":
        raise RefusedError(f"quant: a base stored as {quant.name} cannot be trained in full; use a PEFT method or --quant none")
    if quant is not None and method is not None and method.name == "partial" and setup.by.drops_outputs:
        raise RefusedError(f"quant: Trainer refuses a base stored as {quant.name} without an adapter; accepted: none")
    if quant is not None and method is not None and method.name in NOT_ON_4_BIT and quant.name in ("nf4", "fp4"):
        raise RefusedError(f"quant: peft's {method.name} fails on the packed weights of a 4-bit base; accepted: int8 or none")
    return quant


def check_rank_allocator(job: Job) -> None:
    """Raises RefusedError for an AdaLoRA whose rank allocator fails when it first masks ranks.

    It takes the k-th smallest score, k = (init_r - target_r) · layers, by `kthvalue`, which needs k ≥ 1 (peft,
    tuners/adalora/layer.py).
    """
    fields = job.config.model_dump() if job.config is not None else job.adapter
    if (job.method is None or job.method.peft_type != "ADALORA") and fields.get("peft_type") != "ADALORA":
        return
    init_r, target_r = fields.get("init_r", 12), fields.get("target_r", 8)
    if isinstance(init_r, int) and isinstance(target_r, int) and init_r <= target_r:
        raise RefusedError(
            f"init_r: {init_r} leaves AdaLoRA nothing to mask down to target_r {target_r}, and {versions.named('peft')} "
            "then fails with a RuntimeError (kthvalue); accepted: an init_r above target_r"
        )

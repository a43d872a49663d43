"""Build the model of a traced run on meta as a user's script would: load, quantize, prepare, adapt, checkpoint.

Everything that changes a module or a dtype happens here, before the tensors become fake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import MODEL_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer

from peftplan.errors import RefusedError
from peftplan.job.setup import Setup
from peftplan.ledger import Category
from peftplan.libraries.count import COPIES, LORAFA_LR, PREFIXES, _config_object, freeze_adapter, wrapped_task
from peftplan.libraries.meta import build_config, build_model, model_class, quiet_transformers
from peftplan.libraries.quantized import QUANT_TENSORS, TORCH_DTYPES
from peftplan.libraries.quantizing import quantize
from peftplan.libraries.stand_ins import stand_ins
from peftplan.libraries.walk import kind_of, ties_of
from peftplan.methods.adaptation import Adaptation
from peftplan.storage import QuantConfig, quantized_modules
from peftplan.trace.checkpointing import checkpoint_layers, leave_frozen_layers
from peftplan.trace.peft_steps import LORAFA
from peftplan.trace.reasons import reason
from peftplan.trace.reference import apply_reference

FLASH_ATTENTION = "flash_attention_2"


@dataclass
class Built:
    """A model on meta, ready to train. `dense` are the shapes that quantized weights had, by parameter name."""

    model: Any
    base: Any
    hf_config: Any
    num_trainable: int
    num_total: int
    names: dict[int, str] = field(default_factory=dict)
    """id of a module → its name in the base model."""
    owners: dict[str, Category] = field(default_factory=dict)
    """Full name of a parameter → `weights` or `adapter_weights`."""
    upcast: frozenset[str] = frozenset()
    """Full names of the parameters that kbit preparation cast to fp32."""


def build(
    config: Mapping[str, Any],
    *,
    task_type: str | None,
    peft_config: Any,
    quant: QuantConfig | None,
    setup: Setup,
    wide: tuple[str, ...],
    divide: Callable[[Any], None],
) -> Built:
    """Build the model that `setup` describes. `peft_config` None trains them all; an `Adaptation` is one that peft lacks.

    `wide`: patterns of names that the trainer keeps in fp32, beside the class. `divide` is given the base model, not adapted yet.
    """
    with quiet_transformers():
        hf_config = build_config(config, name="model")
        cls = model_class(config, hf_config, name="model", task_type=task_type)
        known = "sdpa" if cls._supports_sdpa else "eager"
        hf_config._attn_implementation = known if setup.attn_implementation == FLASH_ATTENTION else setup.attn_implementation
        _leave_to_towers(hf_config)
        base = build_model(config, hf_config, cls, name="model")
        _load_dtype(base, setup.dtype, wide)
        if quant is not None:
            quantize(base, quantized_names(base, quant), quant, dtype=setup.dtype)
            _mark_quantized(base)
        if setup.attn_implementation == FLASH_ATTENTION:
            for part in (base.config, *_sub_configs(base.config)):
                part._attn_implementation_internal = FLASH_ATTENTION
        divide(base)
        original = {id(p) for p in base.parameters()}
        upcast = _kbit_prepare(base, setup.by.casts_back) if quant is not None and setup.kbit_prepare else set()
        checkpoint_layers(base, setup)
        model = _adapted(base, peft_config, task_type, quant, setup)
        if setup.every_n_layers is not None:
            _count_layers(base, setup.every_n_layers)
        if setup.gradient_checkpointing and not setup.by.checkpoints_frozen:
            leave_frozen_layers(base)
    model.train()
    return _described(model, base, original, upcast, prefixed=not (peft_config is None or isinstance(peft_config, Adaptation)))


def _adapted(base: Any, peft_config: Any, task_type: str | None, quant: QuantConfig | None, setup: Setup) -> Any:
    """The base alone, or with an adapter: peft's, or one of `reference`."""
    if peft_config is None:
        return base
    if isinstance(peft_config, Adaptation):
        with torch.device("meta"):
            return apply_reference(base, peft_config, dtype=TORCH_DTYPES[str(setup.adapter_dtype)])
    return _adapt(base, peft_config, task_type, quant, setup)


def _count_layers(base: Any, every: int) -> None:
    """Let every n-th layer be checkpointed, those that peft replicated counted too, as where a trainer asks for it after peft.

    Source: transformers, modeling_utils.py (`_set_gradient_checkpointing`).
    """
    layers = (module for module in base.modules() if isinstance(module, GradientCheckpointingLayer))
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0


def _load_dtype(model: Any, dtype: str, wide: tuple[str, ...]) -> None:
    """Cast as `from_pretrained(dtype=...)` loads: the dtype, and fp32 for what the class keeps so (`_get_dtype_plan`, 5.24).

    It makes each parameter anew, so that what the class freezes trains too (`set_param_for_module`, core_model_loading.py).
    """
    keeps_fp32 = (
        *((model._keep_in_fp32_modules or ()) if dtype == "fp16" else ()),
        *((*(model._keep_in_fp32_modules_strict or ()), *wide) if dtype != "fp32" else ()),
    )
    aliases: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    for parameter, names in aliases.items():
        in_fp32 = any(re.search(pattern, name) for pattern in keeps_fp32 for name in names)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if in_fp32 else TORCH_DTYPES[dtype])
            parameter.requires_grad_(True)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype == torch.bfloat16:
                module._buffers[name] = buffer.to(TORCH_DTYPES[dtype])
    for part in (model.config, *_sub_configs(model.config)):
        part.dtype = TORCH_DTYPES[dtype]


def _leave_to_towers(config: Any) -> None:
    """Eager attention in each tower without sdpa, as where none is named (transformers, `get_correct_attn_implementation`)."""
    for part in _sub_configs(config):
        cls: Any = MODEL_MAPPING.get(type(part), None)
        if part._attn_implementation == "sdpa" and cls is not None and not cls._supports_sdpa:
            part._attn_implementation = "eager"


def _sub_configs(config: Any) -> Iterable[Any]:
    return [sub for key in config.sub_configs if (sub := getattr(config, key)) is not None]


def quantized_names(model: Any, quant: QuantConfig) -> set[str]:
    """Names of the modules that transformers quantizes in this model."""
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return quantized_modules(
        quant,
        modules=[(name, kind_of(module)) for name, module in model.named_modules() if "weight" in module._parameters],
        ties=dict(ties_of(model)),
        output_embedding=None if head is None else names[id(head)],
        last_parameter=[name for name, _ in model.named_parameters(remove_duplicate=False)][-1],  # the loader ties weights later
        keep_in_fp32=tuple(model._keep_in_fp32_modules or ()),
        model_type=model.config.model_type,
    )


def _mark_quantized(model: Any) -> None:
    """As transformers marks configs (`_assign_is_quantized`): some models then call layers whose weight they else multiply by."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._is_quantized = True


def _kbit_prepare(model: Any, casts_back: tuple[str, ...]) -> set[int]:
    """`prepare_model_for_kbit_training`, whose own checkpointing is left to `build`; ids of the parameters that it cast.

    `casts_back`: parts of names of modules that the trainer casts back. Packed weights stay as they are stored (peft skips
    `Params4bit`, which stand-ins are not).
    """
    import peft

    before = {id(p): p.dtype for p in model.parameters()}
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    for name, module in model.named_modules():
        if QUANT_TENSORS in module.__dict__:
            module.weight.data = module.weight.data.to(before[id(module.weight)])
        elif any(part in name for part in casts_back):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(before[id(p)])
    return {id(p) for p in model.parameters() if p.dtype != before[id(p)]}


def _adapt(base: Any, peft_config: Any, task_type: str | None, quant: QuantConfig | None, setup: Setup) -> Any:
    """`get_peft_model`, then the trainer's casts of the adapter.

    peft makes adapters in fp32 (`autocast_adapter_dtype`); TRL ≥ 1 casts every trainable parameter of a quantized model to bf16.
    """
    import peft
    import peft.optimizers

    method = _config_object(peft_config, wrapped_task(base, task_type))
    autocast = setup.adapter_dtype == "fp32" or bool(setup.by.casts)  # TRL casts what trains afterwards, and no buffer
    before = {id(p) for p in base.parameters()}
    if setup.by.hooks_adapted:
        base.enable_input_require_grads()
    try:
        with stand_ins(method.peft_type.value), torch.device("meta"):
            model = peft.get_peft_model(base, method, autocast_adapter_dtype=autocast)
        if isinstance(peft_config, Mapping) and peft_config.get("freeze_a"):
            peft.optimizers.create_lorafa_optimizer(model, r=method.r, lora_alpha=method.lora_alpha, lr=LORAFA_LR)
            model.__dict__[LORAFA] = True
        freeze_adapter(model, peft_config)
    except Exception as error:  # peft raises whatever its code meets
        raise RefusedError(f"peft {peft.__version__} refuses it: {reason(error)}") from None
    if autocast:
        _train_numbers_of_ranks(model)
    target = TORCH_DTYPES[str(setup.adapter_dtype)]
    if setup.by.casts and quant is not None:
        cast_by_trl(model, target)
        return model
    for name, parameter in model.named_parameters():
        is_copy = any(part in name for part in COPIES)
        if id(parameter) not in before and not is_copy and parameter.dtype != target and parameter.is_floating_point():
            parameter.data = parameter.data.to(target)
    return model


def _train_numbers_of_ranks(model: Any) -> None:
    """What peft does to AdaLoRA's `ranknum` on a 16-bit base: it makes it anew in fp32 (`cast_adapter_dtype`)."""
    for module in model.modules():
        if hasattr(module, "ranknum") and module.get_base_layer().weight.dtype in (torch.bfloat16, torch.float16):
            module.ranknum.requires_grad_(True)


def freeze_numbers_of_ranks(model: Any) -> None:
    """AdaLoRA's `ranknum` as older releases of peft leave it."""
    for module in model.modules():
        if hasattr(module, "ranknum"):
            module.ranknum.requires_grad_(False)


def cast_by_trl(model: Any, dtype: torch.dtype) -> None:
    """SFTTrainer's cast of what trains on a quantized base, DoRA's magnitudes excepted (trl `SFTTrainer.__init__`)."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(dtype)


def _described(model: Any, base: Any, original: set[int], upcast: set[int], *, prefixed: bool) -> Built:
    """Counts as `get_nb_trainable_parameters` gives them, and the names of modules and parameters."""
    prompt = prefixed and bool(getattr(model, "active_peft_config", None)) and model.active_peft_config.is_prompt_learning
    prefix = PREFIXES[prompt] if prefixed else ""
    dense = {
        f"{name}.weight": module.in_features * module.out_features
        for name, module in model.named_modules()
        if QUANT_TENSORS in module.__dict__
    }
    trainable = total = 0
    owners: dict[str, Category] = {}
    for name, parameter in model.named_parameters():
        numel = dense.get(name, parameter.numel())
        total += numel
        trainable += numel if parameter.requires_grad and ".ranknum." not in name else 0  # trained by accident
        owners[name] = "weights" if id(parameter) in original else "adapter_weights"
    names = {id(module): name.removeprefix(prefix).removesuffix(".base_layer") for name, module in model.named_modules()}
    cast = frozenset(name for name, parameter in model.named_parameters() if id(parameter) in upcast)
    return Built(model, base, base.config, trainable, total, names, owners, cast)

"""LoRA (Hu et al. 2021, arXiv 2106.09685, §4.1) and its variants: DoRA, rsLoRA, LoRA-FA, LoRA+, adapted experts.

ΔW = B·A per adapted weight of shape (out, in): A is (r, in) and B is (out, r), so r·(in + out) parameters.
Source of names and shapes: peft, `tuners/lora/layer.py` (`Linear`, `Embedding`, `ParamWrapper`) and `lora/dora.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from peftplan.arch.modules import LINEAR_KINDS, Architecture, Module, Shape
from peftplan.errors import InputError, RefusedError, UnknownNameError
from peftplan.methods.adaptation import Adaptation, AddedTensor, NeedsPeftError
from peftplan.methods.experts import ResolvedTargets, fused_expert_targets
from peftplan.methods.parameters import parameter_tensors
from peftplan.methods.saved import (
    refuse_both,
    refuse_targeted,
    refuse_targeted_rows,
    saved_copies,
    saved_modules,
    tied_copies,
    token_deltas,
    token_originals,
)
from peftplan.methods.targets import (
    ALL_LINEAR,
    PEFT_DEFAULT,
    LayeredConfig,
    Names,
    Pattern,
    by_rank,
    excluded,
    has_default,
    match,
    resolve_targets,
)
from peftplan.methods.tuner import refuse_mamba, trained_biases

Rank = Annotated[int, Field(ge=1, le=2**20)]

EVA = "init_lora_weights 'eva': counted as get_peft_model creates it; EVA moves ranks between layers once it sees data"
FROZEN_A = (
    "A stays frozen until adapters are switched: set_adapter(), or leaving model.disable_adapter(), makes it require "
    "gradients again, and its inputs are then saved"
)
"""peft, tuners/tuners_utils.py, `BaseTunerLayer.set_adapter`; a published run shows it (docs/trace-drift.md)."""
INITIALISATIONS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga")
"""Strings that `init_lora_weights` accepts in peft, besides `pissa_niter_[number]`."""


def _initialisation(value: bool | str) -> bool | str:
    if isinstance(value, str) and value not in INITIALISATIONS and not re.fullmatch(r"pissa_niter_\d+", value):
        raise UnknownNameError("init_lora_weights", value, INITIALISATIONS)
    return value


Initialisation = Annotated[bool | str, AfterValidator(_initialisation)]


NOT_PEFTS = frozenset({"freeze_a", "freeze_adapter"})
"""Fields that peft's class does not have: what a program does to the adapter once it is there."""


class LoraConfig(LayeredConfig):
    """peft's `LoraConfig`, less the fields that change no tensor. `lora_alpha` scales the update and changes no count."""

    r: Rank = 8
    lora_alpha: float | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[Pattern, Rank] = Field(default_factory=dict)
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    ensure_weight_tying: bool = False
    """Whether a head that is tied to an embedding reads the embedding's trainable copy."""
    target_parameters: Names = None
    init_lora_weights: Initialisation = True
    """Initialisation; it changes no size, but `mica` (arXiv 2604.01694) freezes every B."""
    freeze_a: bool = False
    """LoRA-FA (arXiv 2308.03303): `create_lorafa_optimizer` freezes every `lora_A`, but not an embedding's."""
    freeze_adapter: bool = False
    """The program freezes the adapter too, so that nothing trains; a backward reaches the inputs of checkpointed layers."""

    refuses_layers: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")
    no_effect: ClassVar[frozenset[str]] = frozenset(
        {"alpha_pattern", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config",
         "qalora_group_size", "runtime_config", "lora_ga_config"}
    )  # fmt: skip


def lora(arch: Architecture, config: LoraConfig, *, by_peft: bool = True) -> Adaptation:
    """The tensors that `get_peft_model` adds for a LoraConfig; `target_modules` None means all linear layers. `by_peft`: False
    for a library that adapts modules that peft refuses, or leaves names of experts beside `target_parameters` as they are."""
    _refuse(arch, config)
    requested = ALL_LINEAR if config.target_modules is None else config.target_modules
    if requested == PEFT_DEFAULT and config.target_parameters and not has_default(arch, peft_type="LORA"):
        requested = ()  # peft then adapts the parameters alone
    if by_peft or not config.target_parameters:
        resolved = fused_expert_targets(arch, config, requested, left_out=excluded(arch, config))
    else:
        resolved = ResolvedTargets(requested, config.target_parameters)
    if not resolved.target_modules and not resolved.target_parameters:
        raise InputError("target_modules", list(config.target_modules or ()), "peft refuses it; name modules or parameters")
    targets = resolve_targets(arch, resolved.target_modules, peft_type="LORA") if resolved.target_modules else ()
    matched = match(arch, config, targets, may_be_none=bool(resolved.target_parameters)) if targets else ()
    if by_peft:
        refuse_mamba(arch, matched)
    rank_pattern = {**config.rank_pattern, **resolved.rank_pattern}

    added: list[AddedTensor] = []
    for module in matched:
        for family, r in by_rank(module, r=config.r, rank_pattern=rank_pattern):
            added += _module_tensors(family, r, config)
    added += parameter_tensors(arch, config, resolved.target_parameters, rank_pattern, matched)
    if not added:
        raise InputError("target_parameters", list(resolved.target_parameters), f"no parameter of {arch.model_type} matches")
    copies = saved_copies(arch, saved_modules(arch, config))
    if config.ensure_weight_tying:
        copies = tied_copies(arch, copies)
    refuse_targeted(matched, copies)
    deltas = token_deltas(arch, config.trainable_token_indices)
    refuse_targeted_rows(matched, deltas)
    tensors, frozen = (*added, *copies, *deltas), config.freeze_adapter
    return Adaptation(
        added=tuple(tensor._replace(trainable=False) for tensor in tensors) if frozen else tensors,
        buffers=token_originals(deltas),
        trained=() if frozen else trained_biases(arch, matched, copies, bias=config.bias),
        matched=matched,
        resolved=(("target_modules", targets), ("target_parameters", resolved.target_parameters)),
        notes=(*((EVA,) if config.init_lora_weights == "eva" else ()), *((FROZEN_A,) if config.freeze_a else ())),
    )


def in_groups(adaptation: Adaptation) -> Adaptation:
    """The same in the groups of LoRA+: A with what else trains, embeddings, B, and biases of B (peft, optimizers/loraplus.py)."""
    return adaptation._replace(added=tuple(tensor._replace(group=_group(tensor)) for tensor in adaptation.added))


def _group(tensor: AddedTensor) -> int:
    if ".lora_embedding_" in tensor.name:
        return 1
    of_b = ".lora_B." in tensor.name or len(tensor.shape) == 1
    return (3 if "bias" in tensor.name else 2) if of_b else 0


def _refuse(arch: Architecture, config: LoraConfig) -> None:
    """Raise RefusedError for combinations that peft refuses, NeedsPeftError for those that only peft can count."""
    if config.lora_bias and config.use_dora:
        raise RefusedError("lora_bias: peft does not support it with use_dora")
    if config.lora_bias and not isinstance(config.init_lora_weights, bool):
        raise RefusedError("lora_bias: peft supports it only with init_lora_weights True or False")
    if config.init_lora_weights == "mica" and config.use_dora:
        raise NeedsPeftError("LORA with init_lora_weights 'mica' and use_dora")
    refuse_both(arch, saved_modules(arch, config), config.trainable_token_indices)


def _module_tensors(module: Module, r: int, config: LoraConfig) -> list[AddedTensor]:
    """A and B; with `lora_bias` B's bias; with `use_dora` the magnitude vector (arXiv 2402.09353, eq. 5: one norm per output)."""
    n_in, n_out = _features(module)

    def tensor(part: str, shape: Shape, *, trainable: bool = True) -> AddedTensor:
        return AddedTensor(f"{module.name}.{part}", shape, module.layers, trainable)

    if module.kind == "Embedding" and config.lora_bias:
        raise RefusedError(f"lora_bias: peft does not support it for embedding layers ({module.name})")
    a, b = ("lora_embedding_A", "lora_embedding_B") if module.kind == "Embedding" else ("lora_A.weight", "lora_B.weight")
    tensors = [
        tensor(a, (r, n_in), trainable=module.kind == "Embedding" or not config.freeze_a),
        tensor(b, (n_out, r), trainable=config.init_lora_weights != "mica"),
    ]
    if config.lora_bias:
        tensors.append(tensor("lora_B.bias", (n_out,)))
    if config.use_dora:
        tensors.append(tensor("lora_magnitude_vector.weight", (n_out,)))
    return tensors


def _features(module: Module) -> tuple[int, int]:
    if module.kind in LINEAR_KINDS or module.kind == "Embedding":
        return module.in_features, module.out_features
    if module.kind.startswith("Conv"):
        raise NeedsPeftError(f"LoRA on {module.name} of class {module.kind}")
    raise RefusedError(
        f"target_modules: {module.name} is of class {module.kind}, which peft does not support "
        "(torch.nn.Linear, Embedding, Conv1d, Conv2d, Conv3d, Conv1D and MultiheadAttention are)"
    )

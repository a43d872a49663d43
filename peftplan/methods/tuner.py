"""What peft's targeted methods share: resolve the targets, match them, build each family's tensors, save modules, train biases.

Source: peft, `tuners/tuners_utils.py` (`BaseTuner.inject_adapter`, `_mark_only_adapters_as_trainable`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from peftplan.arch.modules import Architecture, Module
from peftplan.errors import RefusedError
from peftplan.methods.adaptation import Adaptation, AddedBuffer, AddedTensor, NeedsPeftError, TrainedParam, trained_params
from peftplan.methods.saved import is_saved, refuse_targeted, saved_copies, saved_modules
from peftplan.methods.targets import TargetedConfig, match, resolve_targets

LINEAR = ("Linear", "LinearSubclass")
"""Kinds for which `isinstance(module, nn.Linear)` holds."""
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")


def tune(
    arch: Architecture,
    config: TargetedConfig,
    tensors: Callable[[Module], Iterable[AddedTensor]],
    *,
    peft_type: str,
    bias: str = "none",
    buffers: Callable[[Module], Iterable[AddedBuffer]] = lambda _: (),
) -> Adaptation:
    """The adaptation of a method that adds `tensors(family)` and `buffers(family)` to every targeted family.

    `bias` is peft's field: `all` trains every bias of the base, `…_only` those of the targeted modules.
    """
    targets = resolve_targets(arch, config.target_modules, peft_type=peft_type)
    matched = match(arch, config, targets)
    copies = saved_copies(arch, saved_modules(arch, config))
    refuse_targeted(matched, copies)
    return Adaptation(
        added=(*(t for module in matched for t in tensors(module)), *copies),
        trained=trained_biases(arch, matched, copies, bias=bias),
        matched=matched,
        resolved=(("target_modules", targets),),
        buffers=tuple(b for module in matched for b in buffers(module)),
    )


def trained_biases(
    arch: Architecture, matched: tuple[Module, ...], copies: tuple[AddedTensor, ...], *, bias: str
) -> tuple[TrainedParam, ...]:
    """The base's biases that peft's `bias` field trains. Those of a saved module stay frozen, since its copy trains."""
    if bias == "none":
        return ()
    biases = trained_params(arch, arch.modules if bias == "all" else matched, only="bias")
    frozen = is_saved(copies)
    return tuple(p for p in biases if f"{p.module}.{p.param}" not in frozen)


MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_KEPT = ("out_proj", "conv1d")
"""Modules that peft's LoRA and AdaLoRA refuse in those model types (`_check_lora_target_modules_mamba`)."""


def refuse_mamba(arch: Architecture, matched: Iterable[Module]) -> None:
    """Raise RefusedError if LoRA or AdaLoRA would adapt a module whose weight Mamba's kernels read without its forward."""
    module = next((m for m in matched if m.leaf in MAMBA_KEPT), None)
    if arch.model_type in MAMBA_TYPES and module is not None:
        remedy = f"leave it out: exclude_modules={module.leaf}"
        raise RefusedError(f"target_modules: peft refuses {module.leaf} in {arch.model_type}; {remedy}")


def require_kind(module: Module, supported: tuple[str, ...], *, method: str, by_peft: tuple[str, ...] = ()) -> None:
    """Raise RefusedError for a kind of module that the method does not support, NeedsPeftError for one that only peft counts."""
    if module.kind in by_peft:
        raise NeedsPeftError(f"{method} on {module.name} of class {module.kind}")
    if module.kind not in supported:
        kinds = ", ".join(k for k in (*supported, *by_peft) if k != "LinearSubclass")
        raise RefusedError(f"target_modules: {module.name} is of class {module.kind}; peft's {method} supports {kinds}")

"""Memory of `merge_and_unload` on one device: base, adapter, and the temporaries of the module that needs most.

peft merges module by module and drops each module's adapter tensors afterwards. This counts the largest module beside
the whole adapter, so the true peak is lower by the adapter tensors of the modules merged before it.
Source: peft, `tuners/tuners_utils.py` (`_unload_and_optionally_merge`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from peftplan.arch.modules import Architecture, Module
from peftplan.deployment import deltas, requantize
from peftplan.deployment.adapter_file import PROMPT_TYPES, SHARED_PROJECTIONS
from peftplan.deployment.scratch import Array, Device, Scratch
from peftplan.errors import RefusedError
from peftplan.methods.adaptation import Adaptation
from peftplan.parameters import Parameter, Parameters
from peftplan.storage import QuantConfig


class Need(NamedTuple):
    """What merging one module takes besides weights and adapter; `host_bytes` wait on the CPU meanwhile."""

    module: str
    shape: tuple[int, ...]
    num_bytes: int
    host_bytes: int = 0


NON_LINEAR = ("houlsby", "pfeiffer")
TRAINS_BASE = ("full", "bitfit", "partial", "llama-pro")
NOTHING = Need("", (), 0)


class Merging(NamedTuple):
    """The kind of merge: the base was loaded in `dtype` and is stored as `quant` (None: not quantized)."""

    peft_type: str
    dtype: str
    adapter_dtype: str
    device: Device
    quant: QuantConfig | None = None


def refuse_unmergeable(peft_type: str | None, *, name: str, quant: QuantConfig | None) -> None:
    """Raise RefusedError for a method that has no merge in peft, or one that is not modelled."""
    if peft_type in PROMPT_TYPES:
        raise RefusedError(f"merge: {name} trains virtual tokens, not weights, so there is nothing to merge into the base")
    if name in NON_LINEAR:
        raise RefusedError(f"merge: {name} adds layers with a non-linearity, which cannot be folded into a weight of the base")
    if name in TRAINS_BASE:
        raise RefusedError(f"merge: {name} trains the base itself, so there is nothing to merge: its checkpoint is the model")
    if peft_type not in deltas.MERGES:
        raise RefusedError(f"merge: how peft merges {name} is not modelled")
    if quant is not None and (peft_type != "LORA" or quant.name not in requantize.SUPPORTED):
        raise RefusedError(
            f"merge: merging {name} into weights stored as {quant.name} is not modelled; into a 16-bit base it is, "
            f"and so is LoRA into {', '.join(requantize.SUPPORTED)}"
        )


def largest_need(arch: Architecture, adaptation: Adaptation, loaded: Parameters, merging: Merging) -> Need:
    """The module whose merge needs most; `loaded` are base and adapter as they are loaded for it.

    A quantized base is merged on the GPU alone.
    """
    of_base = {p.name: p for p in loaded.all if p.owner == "base"}
    shared = {b.name: Array(merging.adapter_dtype, b.shape) for b in adaptation.buffers if b.name in SHARED_PROJECTIONS}
    needs = [NOTHING, *_token_needs(arch, loaded, of_base, merging.device)]
    for name, parts in _adapted(arch, loaded):
        base = _owner(arch, of_base, name)
        s, host = Scratch(merging.device), 0
        if base.quantized and merging.quant is not None:
            host = requantize.merge(s, Array(merging.dtype, base.shape), parts, merging.quant)
        else:
            _merge_of(merging.peft_type, name, base.shape, parts)(s, Array(base.dtype, base.shape), {**parts, **shared})
        needs.append(Need(name, base.shape, s.peak, host))
    return max(needs, key=lambda need: need.num_bytes)


def _merge_of(peft_type: str, name: str, shape: tuple[int, ...], parts: deltas.Parts) -> deltas.Merge:
    """The merge of one weight. Raises RefusedError for convolutions and rotated embeddings."""
    if len(shape) not in (2, 3) or "oft_embedding_R" in parts:
        raise RefusedError(f"merge: how peft merges {peft_type} into {name} is not modelled")
    if "lora_magnitude_vector" in parts:
        return deltas.dora
    return deltas.experts if len(shape) == 3 else deltas.MERGES[peft_type]


def _owner(arch: Architecture, of_base: Mapping[str, Parameter], name: str) -> Parameter:
    """The base parameter of a name: of a tied one its owner, which may be one layer of a family."""
    owner = dict(arch.ties).get(name, name)
    return of_base[owner if owner in of_base else re.sub(r"\.\d+\.", ".{}.", owner, count=1)]


def _adapted(arch: Architecture, parameters: Parameters) -> Iterator[tuple[str, dict[str, Array]]]:
    """(weight, adapter tensors by part) for each family and set of layers."""
    modules = {module.name: module for module in arch.modules}
    copies = (".modules_to_save.", ".ln_tuning_layers.", ".token_adapter.")
    groups: dict[tuple[str, frozenset[int] | None], dict[str, Array]] = {}
    for p in parameters.all:
        if p.owner == "adapter" and not any(copy in p.name for copy in copies) and not p.name.endswith(".bias"):
            holder, _, part = p.name.removesuffix(".weight").rpartition(".")  # model.layers.{}.mlp.up_proj and lora_A
            groups.setdefault((holder, p.layers), {})[part] = Array(p.dtype, p.shape)
    for (holder, _), parts in groups.items():
        module = modules[holder.replace(".base_layer", "")]
        yield f"{module.name}.{_parameter_of(module, parts)}", parts


def _parameter_of(module: Module, parts: Mapping[str, Array]) -> str:
    """`weight`, or the parameter of fused experts whose widths the factors have.

    The parameters tell, not the class: `Glm4MoeNaiveMoe` became `Glm4MoeExperts`.
    """
    if any(name == "weight" for name, _ in module.params):
        return "weight"
    a, b = parts["lora_A"].dims, parts["lora_B"].dims
    fitting = [p for p, shape in module.params if {a[1], b[0]} == set(shape[-2:])]
    return fitting[0] if fitting else module.params[0][0]


def _token_needs(arch: Architecture, parameters: Parameters, of_base: Mapping[str, Parameter], device: Device) -> Iterator[Need]:
    """Trained rows of an embedding: the whole matrix is copied with the rows put in (`TrainableTokensLayer.merge`)."""
    for p in parameters.all:
        if p.owner == "adapter" and p.name.endswith(".token_adapter.trainable_tokens_delta"):
            name = f"{p.name.partition('.token_adapter.')[0]}.weight"
            base = _owner(arch, of_base, name)
            s = Scratch(device)
            s.new(base.dtype, *base.shape)
            if p.dtype != base.dtype:
                s.new(base.dtype, *p.shape)
            s.new("int64", p.shape[0])
            yield Need(name, base.shape, s.peak)

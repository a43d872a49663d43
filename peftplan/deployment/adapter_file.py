"""The tensors of `adapter_model.safetensors`, by the names that peft's `save_pretrained` gives them.

Source: peft, `utils/save_and_load.py` (`get_peft_model_state_dict`, with `save_embedding_layers="auto"`) and each tuner's
`_get_adapter_state_dict`. Assumed: the vocabulary was not resized, which would save the embeddings as well; and AdaLoRA's rank
allocator has not cut any rank, whose rows peft leaves out of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from peftplan.arch.modules import LINEAR_KINDS, Architecture, Module
from peftplan.deployment.safetensors import StoredTensor
from peftplan.methods.adaptation import Adaptation
from peftplan.parameters import Parameter, Parameters

PROMPT_TYPES = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
"""Virtual tokens: peft saves what the prompt encoder computes, not the encoder, under one key."""
PROMPT_KEY = "prompt_embeddings"
SHARED_PROJECTIONS = ("vera_A", "vera_B")
"""VeRA's frozen matrices, which `save_projection` (peft's default) writes once per adapter."""
NOT_SAVED = (".ranknum",)
"""AdaLoRA's rank, which the config states (`AdaLoraModel._get_adapter_state_dict`)."""
EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")
"""peft's constant of that name (`utils/constants.py`): where one of them is targeted, "auto" saves the base's weights too."""


@dataclass(frozen=True)
class Saving:
    """The fields of a peft config that decide which tensors are saved: its type, its `bias`, VeRA's `save_projection`."""

    peft_type: str
    bias: str = "none"
    save_projection: bool = True
    token_indices: bool = False
    """Whether `trainable_token_indices` is set, with which "auto" saves no embedding."""


def adapter_tensors(
    arch: Architecture, adaptation: Adaptation, parameters: Parameters, saving: Saving, *, adapter_dtype: str
) -> tuple[StoredTensor, ...]:
    """Every tensor that `save_pretrained` writes for one adapter; the dtypes are those in which the tensors are held.

    `adapter_dtype` is that of buffers. Peft's own types of `methods.METHODS` only.
    """
    own = [p for p in parameters.all if p.owner == "adapter"]
    if saving.peft_type in PROMPT_TYPES:
        return (_prompt_embeddings(own), *_expanded(own, "base_model.", only=".modules_to_save."))
    tensors = [*_expanded(own, "base_model.model.")]
    if saving.save_projection:
        tensors += [
            StoredTensor(f"base_model.{b.name}", adapter_dtype, b.shape)
            for b in adaptation.buffers
            if b.name in SHARED_PROJECTIONS
        ]
    dtypes = {p.name: p.dtype for p in parameters.all if p.owner == "base"}
    tensors += _biases(arch, adaptation, saving.bias, dtypes, own)
    if not saving.token_indices:
        tensors += _embeddings(arch, adaptation, dtypes)
    return tuple({tensor.name: tensor for tensor in tensors}.values())


def _expanded(own: Iterable[Parameter], prefix: str, *, only: str = "") -> Iterator[StoredTensor]:
    """Each tensor under its key: a copy of a saved module by the module's own name, DoRA's magnitude without `.weight`."""
    for p in own:
        if only not in p.name or p.name.endswith(NOT_SAVED):
            continue
        key = p.name.replace(".modules_to_save.", ".")
        if key.endswith(".lora_magnitude_vector.weight"):
            key = key.removesuffix(".weight")
        for layer in sorted(p.layers) if p.layers is not None else (None,):
            name = key if layer is None else key.replace("{}", str(layer))
            yield StoredTensor(prefix + name, p.dtype, p.shape)


def _prompt_embeddings(own: Iterable[Parameter]) -> StoredTensor:
    """The encoder's output for all virtual tokens: as wide as its last layer."""
    shapes = {p.name: p for p in own}
    embedding = shapes["prompt_encoder.embedding.weight"]
    projected = shapes.get("prompt_encoder.transform.2.bias")
    width = embedding.shape[1] if projected is None else projected.shape[0]
    return StoredTensor(PROMPT_KEY, embedding.dtype, (embedding.shape[0], width))


def _biases(
    arch: Architecture, adaptation: Adaptation, bias: str, dtypes: Mapping[str, str], own: Iterable[Parameter]
) -> Iterator[StoredTensor]:
    """The base's biases under `bias`: of targeted layers (`lora_only`), or every key that ends with `.bias` (`all`).

    In a targeted layer the key has `base_layer` before it; of a module in `modules_to_save` both the original and the copy match.
    """
    if bias == "none":
        return
    targeted = {name for module in adaptation.matched for name in module.names()}
    for module in arch.modules if bias == "all" else adaptation.matched:
        shape = dict(module.params).get("bias")
        if shape is None:
            continue
        dtype = _dtype_of(arch, f"{module.name}.bias", dtypes)
        for name in module.names():
            yield StoredTensor(f"base_model.model.{_inside(name, targeted)}.bias", dtype, shape)
    if bias == "all":
        copies = [p for p in own if ".modules_to_save." in p.name and p.name.endswith(".bias")]
        for p in copies:
            root, _, inner = p.name.partition(".modules_to_save.")
            for layer in sorted(p.layers) if p.layers is not None else (None,):
                for kind in ("modules_to_save", "original_module"):
                    name = f"{root}.{kind}.{inner}"
                    yield StoredTensor(
                        f"base_model.model.{name if layer is None else name.replace('{}', str(layer))}", p.dtype, p.shape
                    )


def _inside(name: str, targeted: set[str]) -> str:
    return f"{name}.base_layer" if name in targeted else name


def _embeddings(arch: Architecture, adaptation: Adaptation, dtypes: Mapping[str, str]) -> Iterator[StoredTensor]:
    """The base's own tensors of a targeted embedding or head, where `target_modules` names `embed_tokens` or `lm_head`."""
    if not _names_embedding(arch, adaptation.target_modules):
        return
    for module in adaptation.matched:
        if module.name in (arch.input_embedding, arch.output_embedding) and _has_valid_base(module):
            for param, shape in module.params:
                dtype = _dtype_of(arch, f"{module.name}.{param}", dtypes)
                yield StoredTensor(f"base_model.model.{module.name}.base_layer.{param}", dtype, shape)


def _has_valid_base(module: Module) -> bool:
    return module.kind == "Embedding" or module.kind in LINEAR_KINDS


def _names_embedding(arch: Architecture, targets: object) -> bool:
    """A list must contain these exact words; a regular expression must match a module of that last name."""
    if isinstance(targets, str):
        names = (name for module in arch.modules for name in module.names())
        return any(re.fullmatch(targets, name) for name in names if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
    return isinstance(targets, (tuple, list)) and any(name in targets for name in EMBEDDING_LAYER_NAMES)


def _dtype_of(arch: Architecture, name: str, dtypes: Mapping[str, str]) -> str:
    """The dtype of a base parameter; a tied one is its owner's tensor."""
    return dtypes[dict(arch.ties).get(name, name)]

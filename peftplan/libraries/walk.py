"""Convert a real model to an `Architecture`: module families by name template and shape, ties, buffers, embeddings."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from peftplan.arch.modules import Architecture, Buffer, Module, PromptDims
from peftplan.dtypes import parse_dtype

NN_KINDS = ("Embedding", "LayerNorm", "Conv1d", "Conv2d", "Conv3d")
NAMED_KINDS = (
    ("RMSNorm", "RMSNorm"),
    ("T5LayerNorm", "RMSNorm"),
    ("Router", "Router"),
    ("TopK", "Router"),
    ("Experts", "Experts"),
)
"""Part of a class name → kind, for classes of transformers that are no torch module of their own; first match."""

Key = TypeVar("Key")


def walk(model: Any, *, model_type: str, task_type: str) -> Architecture:
    """The architecture of a model built with bf16 as its dtype (see `meta.build_model`)."""
    text_config = model.config.get_text_config()
    ties = ties_of(model)
    return Architecture(
        model_type=model_type,
        model_class=type(model).__name__,
        task_type=task_type,
        modules=modules_of(model, ties),
        ties=ties,
        buffers=buffers_of(model),
        hidden_size=int(getattr(text_config, "hidden_size", None) or 0),
        vocab_size=int(getattr(text_config, "vocab_size", None) or 0),
        input_embedding=_name_of(model, _input_embedding(model)),
        output_embedding=_name_of(model, model.get_output_embeddings()),
        keep_in_fp32=tuple(sorted(model._keep_in_fp32_modules or ())),
        keep_in_fp32_strict=tuple(sorted(model._keep_in_fp32_modules_strict or ())),
        supports_sdpa=model._supports_sdpa,
        supports_flash_attn=model._supports_flash_attn,
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
        prompt=prompt_dims(model.config, seq2seq=task_type == "SEQ_2_SEQ_LM"),
    )


def kind_of(module: nn.Module) -> str:
    """The kind of a module (see `arch.modules.Module`)."""
    name = type(module).__name__
    if name == "Conv1D":
        return "Conv1D"
    if isinstance(module, nn.Linear):
        return "Linear" if type(module) is nn.Linear else "LinearSubclass"
    torch_kind = next((kind for kind in NN_KINDS if isinstance(module, getattr(nn, kind))), None)
    kind = torch_kind or next((kind for part, kind in NAMED_KINDS if part in name), "Module")
    return "ExpertsTransposed" if kind == "Experts" and getattr(module, "is_transposed", False) else kind


def modules_of(model: nn.Module, ties: tuple[tuple[str, str], ...]) -> tuple[Module, ...]:
    """Families of the modules that own parameters, in the order in which `named_modules()` first meets them.

    A module with a frozen parameter, or one tied to another's, is a family of its own, so that both are named in full.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    special = {name.rpartition(".")[0] for name in (*frozen, *(alias for alias, _ in ties))}
    owners = []
    for name, module in model.named_modules():
        params = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False, remove_duplicate=False))
        if params:
            owners.append((name, (kind_of(module), params)))
    return tuple(Module(name, kind, params, layers) for name, layers, (kind, params) in families(owners, apart=special))


def buffers_of(model: nn.Module) -> tuple[Buffer, ...]:
    """Families of the registered buffers; one in bf16, the dtype that the model was built in, has the model's dtype."""
    buffers = [(name, (_buffer_dtype(buffer), tuple(buffer.shape))) for name, buffer in model.named_buffers()]
    return tuple(Buffer(name, dtype, shape, layers) for name, layers, (dtype, shape) in families(buffers))


def _buffer_dtype(buffer: torch.Tensor) -> str:
    return "model" if buffer.dtype == torch.bfloat16 else parse_dtype(buffer.dtype)


def families(pairs: Iterable[tuple[str, Key]], *, apart: Container[str] = ()) -> list[tuple[str, tuple[int, ...] | None, Key]]:
    """Names that differ only in their first numbered part, with equal properties, as one template and its indices.

    Names in `apart` stay as they are.
    """
    layers_of: dict[tuple[str, Key], list[int]] = {}
    for name, key in pairs:
        parts = name.split(".")
        position = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if position is None or name in apart:
            layers_of[name, key] = []
        else:
            index, parts[position] = int(parts[position]), "{}"
            layers_of.setdefault((".".join(parts), key), []).append(index)
    return [(name, tuple(layers) or None, key) for (name, key), layers in layers_of.items()]


def ties_of(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Each further name of a shared parameter, with the name that `named_parameters()` gives it."""
    first: dict[int, str] = {}
    ties = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            ties.append((name, owner))
    return tuple(ties)


def _input_embedding(model: Any) -> nn.Module | None:
    try:
        module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return module if isinstance(module, nn.Embedding) else None


def _name_of(model: nn.Module, embedding: nn.Module | None) -> str | None:
    return None if embedding is None else next((name for name, module in model.named_modules() if module is embedding), None)


def prompt_dims(hf_config: Any, *, seq2seq: bool) -> PromptDims | None:
    """The numbers that peft takes from a config, by its own rules (`_prepare_prompt_learning_config`, peft).

    None if it finds no number of layers or no width, and asks for them in its own config.
    """
    config = hf_config.to_dict()
    config = config.get("text_config", config)
    layers = getattr(hf_config, "num_hidden_layers", None)
    if layers is None:
        layers = _first(config, "num_hidden_layers", "num_layers", "n_layer")
    width = _first(config, "hidden_size", "n_embd", "d_model")
    if layers is None or width is None:
        return None
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    kv, head_dim = _kv_dims(config, width, heads) if "num_key_value_heads" in config else (None, None)
    return PromptDims(layers, width, heads, kv, head_dim, num_transformer_submodules=2 if seq2seq else 1)


def _kv_dims(config: dict[str, Any], width: int, heads: int) -> tuple[int, int | None]:
    """Key/value heads and head_dim of the layers with the widest keys, as peft takes them."""
    kv = config["num_key_value_heads"]
    if config.get("global_head_dim") is not None:
        return config.get("num_global_key_value_heads") or kv, config["global_head_dim"]
    if config.get("per_layer_config") is None:
        return kv, config.get("head_dim")
    base = config.get("head_dim", width // heads)
    wide_kv, wide = kv, base
    for layer in config["per_layer_config"].values():
        if layer.get("head_dim", base) > wide:
            wide_kv, wide = layer.get("num_key_value_heads", kv), layer["head_dim"]
    return wide_kv, wide


def _first(config: dict[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if name in config), None)

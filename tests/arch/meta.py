"""The witness of the architecture tests: transformers' own model, built on the meta device from a config."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn

from peftplan.arch.modules import Architecture
from peftplan.arch.readers import read_config

NN_KINDS = ("Linear", "Embedding", "LayerNorm", "Conv1d", "Conv2d", "Conv3d")


def _unless_meta(initialize: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: tensor if tensor.is_meta else initialize(tensor, *args, **kwargs)


INITIALIZERS = {name: _unless_meta(value) for name, value in vars(torch.nn.init).items() if name[0] != "_" and name[-1] == "_"}


def without_values() -> AbstractContextManager[Any]:
    """Let torch's initializers leave tensors on the meta device as they are, without values. They took a seventh of the time."""
    return patch.multiple(torch.nn.init, **INITIALIZERS)


def build(config: dict[str, Any], model_class: str) -> Any:
    """transformers' `model_class` on the meta device, ties as the config states them."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = transformers.AutoConfig.for_model(config["model_type"], **fields)
    cls = getattr(transformers, model_class)
    with torch.device("meta"), without_values():
        model = cls._from_config(hf_config)
        untied = config.get("tie_word_embeddings") is False or config.get("scale_decoder_outputs") is False
        if config["model_type"] in ("t5", "mt5") and untied and hasattr(model, "lm_head"):
            # The config class forces ties on, but `from_pretrained` undoes this one for a checkpoint whose lm_head differs
            # from its embedding, as every checkpoint that states false ships it (test_t5.py loads one).
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        return model


def kind_of(module: nn.Module) -> str | None:
    """The torch class that matters to peft and bitsandbytes, or None where it is none of those."""
    if type(module).__name__ == "Conv1D":
        return "Conv1D"
    if isinstance(module, nn.Linear):
        return "Linear" if type(module) is nn.Linear else "LinearSubclass"
    return next((kind for kind in NN_KINDS if isinstance(module, getattr(nn, kind))), None)


def assert_same(arch: Architecture, model: Any) -> None:
    """Names, shapes, kinds, order of families, ties, buffers and totals of `arch` equal those of the real model."""
    assert dict(arch.named_parameters()) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert arch.num_parameters == sum(p.numel() for p in model.parameters())

    real = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    ours = {name: module for module in arch.modules for name in module.names()}
    assert set(ours) == set(real)
    for name, module in ours.items():
        expected = kind_of(real[name])
        assert module.kind == expected or (expected is None and module.kind not in (*NN_KINDS, "Conv1D")), name
    order = {name: index for index, name in enumerate(real)}
    firsts = [order[next(module.names())] for module in arch.modules]
    assert firsts == sorted(firsts), "families are in the order in which named_modules() first meets them"

    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    assert {alias for alias, _ in arch.ties} == tied
    assert list(arch.last_module().names())[-1] == list(model.named_parameters())[-1][0].rpartition(".")[0]
    output = model.get_output_embeddings()
    assert arch.output_embedding == next((n for n, m in model.named_modules() if m is output and output is not None), None)
    embedding = model.get_input_embeddings() if arch.input_embedding else None
    assert arch.input_embedding == next((n for n, m in model.named_modules() if m is embedding and m is not None), None)
    assert {
        (b.name if b.layers is None else b.name.replace("{}", str(i)), b.shape) for b in arch.buffers for i in b.layers or (0,)
    } == {(n, tuple(b.shape)) for n, b in model.named_buffers()}
    assert set(arch.keep_in_fp32) == set(model._keep_in_fp32_modules or ())
    assert set(arch.keep_in_fp32_strict) == set(model._keep_in_fp32_modules_strict or ())
    assert arch.supports_sdpa == bool(model._supports_sdpa)
    assert arch.supports_flash_attn == bool(model._supports_flash_attn)
    assert set(arch.frozen) == {n for n, p in model.named_parameters() if not p.requires_grad}


def assert_task(config: dict[str, Any], task_type: str | None = None) -> Architecture:
    """The reader's architecture of a made-up config equals the real model of the same class; returns it."""
    arch = read_config(config, name="made up", task_type=task_type)
    assert_same(arch, build(config, arch.model_class))
    return arch


def assert_prompt(arch: Architecture, config: dict[str, Any]) -> None:
    """`arch.prompt` leads to what peft's prefix tuning works out from the real config object."""
    from peft import PrefixTuningConfig
    from peft.utils.other import _prepare_prompt_learning_config

    fields = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = transformers.AutoConfig.for_model(config["model_type"], **fields)
    real = _prepare_prompt_learning_config(PrefixTuningConfig(num_virtual_tokens=1), hf_config)
    ours = arch.prompt
    assert ours is not None
    assert ours.num_attention_heads is not None
    heads, width = ours.num_attention_heads, ours.token_dim
    if ours.num_key_value_heads is not None:
        heads, width = ours.num_key_value_heads, (ours.head_dim or width // heads) * ours.num_key_value_heads
    assert (ours.num_layers, width, heads) == (real.num_layers, real.token_dim, real.num_attention_heads)

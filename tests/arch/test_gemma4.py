"""Gemma 4's text models against transformers' own: names, shapes, ties, buffers; and which layers lend keys and values."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from peftplan.arch.modules import Architecture
from peftplan.arch.readers import read_config
from peftplan.errors import InputError
from peftplan.job.sources import load_config
from tests.arch.meta import assert_same, build

LEFT_OUT = ("dtype", "expert_intermediate_size")


def text_config(model: str, **own: Any) -> dict[str, Any]:
    """The config of a published model's text part."""
    config: dict[str, Any] = dict(load_config(model))
    text = {key: value for key, value in config["text_config"].items() if key not in LEFT_OUT}
    return {**text, "model_type": f"{config['model_type']}_text", **own}


def read(config: dict[str, Any]) -> Architecture:
    return read_config(config, name="a config", task_type="CAUSAL_LM")


@pytest.mark.parametrize("model", ["gemma-4-31b", "gemma-4-12b-it", "gemma-4-26b-a4b", "gemma-4-e2b-it", "gemma-4-e4b-it"])
def test_tensors_equal_those_of_the_real_model(model: str) -> None:
    config = text_config(model)
    stem = "Gemma4Unified" if "unified" in config["model_type"] else "Gemma4"
    real, ours = build(config, f"{stem}ForCausalLM"), read(config)
    assert_same(ours, real)
    buffers = {b.name.replace("{}", str(at)): b.shape for b in ours.buffers for at in b.layers or (0,)}
    assert buffers == {name: tuple(buffer.shape) for name, buffer in real.named_buffers()}


def test_the_last_layers_with_keys_of_their_own_store_them() -> None:
    """E2B: 35 layers, of which the last 20 borrow; every fifth has full attention."""
    attentions = {layer: block.attentions[0] for block in read(text_config("gemma-4-e2b-it")).blocks for layer in block.layers}
    assert [layer for layer, a in sorted(attentions.items()) if a.stores] == [13, 14]
    assert [layer for layer, a in sorted(attentions.items()) if a.borrows] == [*range(15, 35)]


def test_the_last_layer_has_full_attention() -> None:
    config = text_config("gemma-4-31b", num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    assert [block.attentions[0].window for block in read(config).blocks] == [None, None]


def test_layers_that_borrow_need_one_that_lends() -> None:
    with pytest.raises(InputError, match="num_kv_shared_layers"):
        read(text_config("gemma-4-e2b-it", num_kv_shared_layers=31))

"""The cache that transformers makes without weights: the same bytes as the formulas, and as real tensors where there are none."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import peftplan  # noqa: E402
from peftplan.arch import catalogue  # noqa: E402
from peftplan.deployment.kv_cache import kv_cache  # noqa: E402
from peftplan.errors import RefusedError  # noqa: E402
from peftplan.libraries.cache import traced_cache  # noqa: E402
from tests.methods import matrix  # noqa: E402


def num_bytes(tensors: Any) -> int:
    """All of them."""
    return sum(tensor.num_bytes for tensor in tensors)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gpt_bigcode"])
def test_the_same_as_the_formula(model_type: str) -> None:
    config, arch = matrix.config_of(model_type), matrix.architecture(model_type)
    traced = traced_cache(config, task_type="CAUSAL_LM", batch_size=2, context=24, dtype="bf16")
    assert sorted(t.shape for t in traced) == sorted(
        t.shape for t in kv_cache(arch, batch_size=2, context=24, encoder_context=0, dtype="bf16")
    )


def test_a_release_that_asks_torch_for_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.0, utils/generic.py (`maybe_autocast`); torch raises a RuntimeError for a device without autocast."""

    def maybe_autocast(device_type: str, enabled: bool = True) -> AbstractContextManager[None]:
        assert not torch.is_autocast_enabled(device_type)
        assert not enabled
        return nullcontext()

    entry = catalogue.find("minitron-8b-base")
    assert entry is not None
    config = {**entry.facts()["config"], "num_hidden_layers": 1}
    monkeypatch.setattr("transformers.models.nemotron.modeling_nemotron.maybe_autocast", maybe_autocast)
    assert traced_cache(config, task_type="CAUSAL_LM", batch_size=2, context=24, dtype="bf16")


def test_windows() -> None:
    config = copy.deepcopy(matrix.config_of("mistral")) | {"sliding_window": 6}
    traced = traced_cache(config, task_type="CAUSAL_LM", batch_size=2, context=24, dtype="fp16")
    formula = peftplan.serving(config, context=24, batch_size=2, dtype="fp16").cache
    assert formula is not None
    assert {(t.kind, t.dtype, t.shape[2]) for t in traced} == {("sliding 6", "fp16", 6)}
    assert num_bytes(traced) == formula.num_bytes


@pytest.mark.parametrize("model_type", ["olmo3", "gpt_neo", "mamba"])
def test_a_model_without_a_description(model_type: str) -> None:
    serving = peftplan.serving(matrix.config_of(model_type), method="full", context=20, batch_size=2, dtype="fp32")
    assert serving.cache is not None, serving.refused
    model, ids = matrix.real(model_type, None, "cpu").eval(), torch.zeros((2, 20), dtype=torch.long)
    with torch.no_grad():
        first = model(input_ids=ids[:, 1:], use_cache=True).past_key_values
        cache = model(input_ids=ids[:, :1], past_key_values=first, use_cache=True).past_key_values
    parts = ("keys", "values", "conv_states", "recurrent_states")
    states = [getattr(layer, part, None) for layer in cache.layers for part in parts]
    tensors = [t for serving in states for t in (serving.values() if isinstance(serving, dict) else (serving,)) if t is not None]
    assert serving.cache.num_bytes == sum(-(-t.untyped_storage().nbytes() // 512) * 512 for t in tensors)
    if model_type == "mamba":
        assert {t.kind for t in serving.cache.tensors} == {"state"}
        assert serving.cache.to_dict()["growing"] == 0


def test_what_is_refused() -> None:
    with pytest.raises(RefusedError, match="SEQ_2_SEQ_LM"):
        traced_cache(matrix.config_of("t5"), task_type="SEQ_2_SEQ_LM", batch_size=1, context=8, dtype="bf16")
    with pytest.raises(RefusedError, match="Rwkv"):
        traced_cache(matrix.config_of("rwkv"), task_type="CAUSAL_LM", batch_size=1, context=8, dtype="bf16")

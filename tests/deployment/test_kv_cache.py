"""The KV cache against transformers' own: bytes of its storages after a prompt and one token, for every way to cache."""

from __future__ import annotations

import copy
import warnings
from math import prod
from typing import Any

import pytest

from peftplan.arch.readers import read_config
from peftplan.deployment.kv_cache import CacheTensor, encoder_positions, growing_bytes, kv_cache
from peftplan.dtypes import ITEMSIZE
from peftplan.errors import RefusedError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import peftplan  # noqa: E402
from tests.methods import matrix  # noqa: E402

B, T, S = 2, 24, 10
DECODING = ("llama", "gemma2", "cohere2", "gpt_oss", "deepseek_v2", "deepseek_v3", "gpt2", "gpt_bigcode", "gptj", "opt", "bloom",
            "mpt", "falcon", "t5", "bart", "whisper")  # fmt: skip
"""One type of each way to attend and to cache."""


def caches(outputs: Any) -> list[Any]:
    """The self-attention cache, and the cross-attention cache where there is one."""
    cache = getattr(outputs, "past_key_values", None) or outputs.cache
    return [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "self_attention_cache") else [cache]


def decoded(model: Any, arch: Any) -> list[Any]:
    """The caches after T tokens, the last of which came alone."""
    ids = torch.zeros((B, T), dtype=torch.long)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if arch.task_type == "CAUSAL_LM":
            first = model(input_ids=ids[:, 1:], use_cache=True)
            return caches(model(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True))
        frames = encoder_positions(arch)
        read = {"input_ids": ids[:, :S]} if frames is None else {"input_features": torch.zeros((B, 80, 2 * frames))}
        first = model(**read, decoder_input_ids=ids[:, 1:], use_cache=True)
        encoded = (first.encoder_last_hidden_state,)
        again = model(
            decoder_input_ids=ids[:, :1], past_key_values=first.past_key_values, encoder_outputs=encoded, use_cache=True
        )
        return caches(again)


def stored(kv_caches: list[Any]) -> int:
    """Bytes of all storages."""
    return sum(t.untyped_storage().nbytes() for cache in kv_caches for layer in cache.layers for t in (layer.keys, layer.values))


def plain(tensors: tuple[CacheTensor, ...]) -> int:
    """Our bytes before the allocator rounds them."""
    return sum(t.layers * ITEMSIZE[t.dtype] * prod(t.shape) for t in tensors)


@pytest.mark.parametrize("model_type", DECODING)
def test_every_way_to_cache(model_type: str) -> None:
    arch = matrix.architecture(model_type)
    model = matrix.real(model_type, None, "cpu").eval()
    ours = kv_cache(arch, batch_size=B, context=T, encoder_context=S, dtype="fp32")
    assert plain(ours) == stored(decoded(model, arch))


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "cohere2", "gpt_oss", "qwen3"])
def test_windows_shorter_than_the_context(model_type: str) -> None:
    """With a window of 6 a sliding layer decodes with 6 tokens, full ones keep all."""
    config = copy.deepcopy(matrix.config_of(model_type)) | {
        "sliding_window": 6,
        "use_sliding_window": True,
        "max_window_layers": 1,
    }
    if model_type == "qwen3":
        config["layer_types"] = None
    arch = read_config({k: v for k, v in config.items() if v is not None}, name=model_type)
    from tests.arch import meta

    on_meta = meta.build({k: v for k, v in config.items() if v is not None}, arch.model_class)
    model = on_meta.float().to_empty(device="cpu").eval()
    for p in (*model.parameters(), *model.buffers()):
        p.data.zero_()
    ours = kv_cache(arch, batch_size=B, context=T, encoder_context=S, dtype="fp32")
    assert {t.kind for t in ours} >= {"sliding 6"}
    assert plain(ours) == stored(decoded(model, arch))


VIRTUAL = [("llama", "prefix-tuning"), ("gpt2", "prompt-tuning"), ("bart", "prompt-tuning")]


@pytest.mark.parametrize(("model_type", "method"), VIRTUAL)
def test_virtual_tokens_are_cached_too(model_type: str, method: str) -> None:
    arch, base = matrix.architecture(model_type), copy.deepcopy(matrix.real(model_type, None, "cpu"))
    cls = {"prefix-tuning": peft.PrefixTuningConfig, "prompt-tuning": peft.PromptTuningConfig}[method]
    model = peft.get_peft_model(base, cls(task_type=arch.task_type, num_virtual_tokens=5)).eval()
    ids = torch.zeros((B, S), dtype=torch.long)
    more = {"decoder_input_ids": ids[:, :7], "attention_mask": torch.ones_like(ids)} if arch.task_type == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = stored(caches(model(input_ids=ids, use_cache=True, **more)))
    context = 7 if more else S
    serving = peftplan.serving(matrix.config_of(model_type), method=method, num_virtual_tokens=5, dtype="fp32", batch_size=B,
                             context=context, encoder_context=S)  # fmt: skip
    assert serving.cache is not None
    assert plain(serving.cache.tensors) == theirs


def test_by_hand() -> None:
    # Llama-2-70B: 2 tensors × 80 layers × 8 heads × 128 × 2 B = 327,680 B a token; Llama-2-7B: 2 × 32 × 32 × 128 × 2 = 524,288 B
    for name, each in (("llama-2-70b", 327_680), ("llama-2-7b", 524_288)):
        cache = peftplan.serving(name, batch_size=8, context=4096).cache
        assert cache is not None
        assert cache.num_bytes == 8 * 4096 * each
    # DeepSeek-V3: the latent of 512 and the rotated 64, in 61 layers
    latent = peftplan.serving("deepseek-v3", method="ia3", target_modules=["o_proj"], feedforward_modules=[], context=1000).cache
    assert latent is not None
    assert latent.num_bytes == 61 * (round(1000 * 512 * 2 / 512) * 512 + 250 * 512)


def test_growing_by_a_token() -> None:
    full = [CacheTensor("full", part, "bf16", (1, 2, 256, 4), 7) for part in ("keys", "values")]
    # one copy of a layer's keys, 2 × 256 × 4 × 2 B; a sliding layer makes both before it drops the old ones
    assert growing_bytes(full) == 4096
    assert growing_bytes([t._replace(kind="sliding 256") for t in full]) == 8192
    assert growing_bytes([t._replace(kind="cross") for t in full]) == 0


def test_what_does_not_decode_is_refused() -> None:
    with pytest.raises(RefusedError, match="does not generate"):
        kv_cache(matrix.architecture("bert"), batch_size=1, context=8, encoder_context=8, dtype="bf16")
    assert "BertForMaskedLM" in peftplan.serving(matrix.config_of("bert")).refused["kv_cache"]

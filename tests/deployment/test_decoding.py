"""What a step of decoding holds, against the live tensors of transformers' `generate` on the CPU."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from peftplan.deployment.decoding import step_bytes
from peftplan.deployment.kv_cache import kv_cache
from peftplan.job.sources import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

PROMPT, TOKENS = 1, 4


class Live(TorchDispatchMode):  # type: ignore[misc]
    """Bytes of storages that operations made and that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def generated(config: dict[str, Any], batch_size: int, **how: Any) -> int:
    """The peak while a few tokens are generated."""
    of_class = transformers.LlamaConfig(**{name: value for name, value in config.items() if name != "model_type"})
    model = transformers.LlamaForCausalLM(of_class).to(torch.bfloat16).eval()
    tokens = torch.ones((batch_size, PROMPT), dtype=torch.long)
    with Live() as live, torch.no_grad():
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, pad_token_id=0, **how)
    return live.peak


def stated(config: dict[str, Any], batch_size: int) -> int:
    arch = load(config)
    cache = kv_cache(arch, batch_size=batch_size, context=PROMPT + TOKENS, encoder_context=1, dtype="bf16")
    return step_bytes(arch, cache, batch_size=batch_size, dtype="bf16") + sum(tensor.num_bytes for tensor in cache)


def config(**sizes: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32_768,
        "eos_token_id": None, **sizes,
    }  # fmt: skip


def test_sampling_holds_logits_scores_and_probabilities() -> None:
    """By the difference of two batches, so that what does not depend on the batch falls away; sampling keeps 19 B a logit."""
    measured = generated(config(), 16, do_sample=True) - generated(config(), 8, do_sample=True)
    assert measured == pytest.approx(19 * 8 * 32_768, rel=0.01)
    assert stated(config(), 16) - stated(config(), 8) == pytest.approx(measured, rel=0.01)


def test_greedy_decoding_takes_less() -> None:
    measured = generated(config(), 16, do_sample=False) - generated(config(), 8, do_sample=False)
    assert measured == pytest.approx(10 * 8 * 32_768, rel=0.02)
    assert measured < stated(config(), 16) - stated(config(), 8)


def test_a_layer_where_the_vocabulary_is_small() -> None:
    """Prompts go through the layers too, so one token is the whole prompt here."""
    wide = config(vocab_size=64, hidden_size=256, intermediate_size=8192)
    measured = generated(wide, 16) - generated(wide, 8)
    assert stated(wide, 16) - stated(wide, 8) == pytest.approx(measured, rel=0.05)

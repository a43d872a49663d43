"""The flash-attn package's kernels: what they keep and take, by sums over its C++ source, and the padded path of transformers.

Letters: b batch, s queries, a query heads, g key/value heads, d head size, t = b · s.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

import peftplan
from peftplan.errors import RefusedError
from peftplan.trace.cuda.attention import choose, sdpa
from peftplan.trace.cuda.flash import flash_attn_func, flash_attn_installed, flash_attn_varlen_func, rounded_head
from peftplan.trace.events.peaks import alive_at
from tests.trace.engine_case import ALL_LINEAR, HEADS, HIDDEN, KV, MLP, llama, lora, traced
from tests.trace.storages import Storages

b, s, a, g, d = 2, 100, 8, 4, 64
t = b * s
AMPERE = (8, 0)


def qkv(head: int = d, heads: int = g) -> list[torch.Tensor]:
    """As attention layers hand them over: transposed views of [b, s, heads, d]."""
    shapes = (a, heads, heads)
    return [torch.zeros(b, s, n, head, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2) for n in shapes]


def taken(call: Any, *inputs: torch.Tensor) -> tuple[Counter[int], Counter[int]]:
    """Storages of the forward and of the backward."""
    with Storages() as forward:
        out = call(*inputs)
    grad = torch.zeros_like(out)
    with Storages() as backward:
        torch.autograd.grad(out, inputs, grad)
    return Counter(forward.sizes), Counter(backward.sizes)


def bytes_of(*tensors: torch.Tensor) -> Counter[int]:
    return Counter(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_dense_kernel() -> None:
    q, k, v = (tensor.transpose(1, 2) for tensor in qkv())
    forward, backward = taken(flash_attn_func, q, k, v)
    # out; fp32 logsumexp of [b, a, s]; the random state of 16 bytes is below what is listed
    assert forward == Counter({2 * t * a * d: 1, 4 * t * a: 1})
    # dq, and for every query head dk and dv, then for the key heads; delta and fp32 dq of 128 queries instead of 100
    assert backward == Counter({2 * t * a * d: 1 + 2, 2 * t * g * d: 2, 4 * b * a * 128: 1, 4 * b * 128 * a * d: 1})


def test_heads_that_are_no_multiple_of_eight_are_copied() -> None:
    q, k, v = (tensor.transpose(1, 2) for tensor in qkv(head=60, heads=a))
    forward, backward = taken(flash_attn_func, q, k, v)
    assert forward - bytes_of(q, k, v) == Counter({2 * t * a * 64: 4, 4 * t * a: 1})  # q, k, v and out of 64
    assert backward[2 * t * a * 64] == 1 + 3  # the gradient padded; dq, dk, dv
    assert backward[4 * b * 128 * a * 64] == 1


def test_unpadded_kernel_takes_128_more_rows_per_sequence() -> None:
    q, k, v = (tensor.transpose(1, 2).reshape(t, -1, d) for tensor in qkv())
    lengths = torch.zeros(b + 1, dtype=torch.int32)
    forward, backward = taken(lambda *states: flash_attn_varlen_func(*states, lengths, lengths, s, s), q, k, v)
    assert forward == Counter({2 * t * a * d: 1, 4 * t * a: 1})
    assert backward[4 * a * (t + 128 * b)] == 1
    assert backward[4 * a * d * (t + 128 * b)] == 1


@pytest.mark.parametrize(("head", "rounded"), [(64, 64), (80, 96), (96, 96), (128, 128), (160, 192), (224, 256), (256, 256)])
def test_rounded_head(head: int, rounded: int) -> None:
    """Multiples of 32 up to 128, then of 64 (`head_size_rounded`)."""
    assert rounded_head(head) == rounded


def test_transformers_finds_the_kernels_and_their_arguments() -> None:
    from transformers import modeling_flash_attention_utils as utils

    states = [tensor.transpose(1, 2) for tensor in qkv()]
    with flash_attn_installed():
        out = utils._flash_attention_forward(
            *states, None, query_length=s, is_causal=True, dropout=0.1, sliding_window=32, attn_implementation="flash_attention_2"
        )
    assert out.shape == (b, s, a, d)
    assert out.is_contiguous()


def kept_by_a_layer(**options: Any) -> float:
    """Bytes per token alive when the steady forward ends, of three layers less two, at 2 × 512 tokens."""
    at_depth = []
    for layers in (2, 3):
        trace = traced(
            llama(layers), lora(ALL_LINEAR), trainer="transformers", gradient_checkpointing=False, autocast="none",
            adapter_dtype="bf16", attn_implementation="flash_attention_2", seq_len=512, batch_size=2, **options,
        )  # fmt: skip
        end = next(window.end for window in trace.windows if window.phase == "forward")
        at_depth.append(
            sum(group.bytes for group in alive_at(trace.log, end) if group.category in ("activations", "temporaries"))
        )
    return (at_depth[1] - at_depth[0]) / (2 * 512)


h, i, kv = HIDDEN, MLP, KV
LAYER = 8 * h + 8 + 4 * h + 4 * kv + 4 * HEADS + 6 * i + 4 * h + 2 * i + 7 * 2 * 8
"""The sum of `test_engine_activations.py` for bf16 adapters of rank 8."""
RANDOM_STATE = 512 / (2 * 512)


def test_kept_by_a_layer() -> None:
    assert kept_by_a_layer() == LAYER + RANDOM_STATE


def test_kept_by_a_layer_with_padding() -> None:
    """Flash keeps the rows picked of q, k and v instead of q, k and v, as many; its output of 2 h beside the padded one that
    o_proj keeps; the indices of the tokens, 8 bytes; cumulative lengths, 12 bytes rounded to 512."""
    assert kept_by_a_layer(padding=True) == LAYER + 2 * h + 8 + 2 * RANDOM_STATE


def test_padding_without_a_mask_of_every_pair() -> None:
    """SDPA's padded path keeps s × s per sequence and expands keys and values; flash does not."""
    options: dict[str, Any] = {"trainer": "plain", "seq_len": 1024, "batch_size": 2, "padding": True}
    flash = traced(llama(), lora(ALL_LINEAR), attn_implementation="flash_attention_2", **options)
    masked = traced(llama(), lora(ALL_LINEAR), attn_implementation="sdpa", **options)
    assert flash.peak_by_phase["backward"] < masked.peak_by_phase["backward"]


def test_fp32_states_are_cast_for_the_kernel() -> None:
    """A 4-bit base prepared by peft has fp32 norms, so q, k and v come in fp32: transformers casts them to the model's dtype."""
    pytest.importorskip("bitsandbytes")
    trace = traced(
        llama(1), lora(["down_proj"]), trainer="plain", quant="nf4", compute_dtype="bf16", seq_len=64,
        attn_implementation="flash_attention_2", gradient_checkpointing=False,
    )  # fmt: skip
    casts = [
        m.storage.shape
        for m in trace.log
        if m.kind == "alloc"
        and m.phase == "forward"
        and m.storage.module == "model.layers.0.self_attn"
        and (m.storage.op, m.storage.dtype) == ("aten._to_copy.default", "bf16")
    ]
    steps = 2
    assert casts.count((1, 64, HEADS, HIDDEN // HEADS)) == steps
    assert casts.count((1, 64, HEADS // 2, HIDDEN // HEADS)) == 2 * steps


def test_fp32_models_and_wide_heads_are_refused() -> None:
    flash: dict[str, Any] = {"attn_implementation": "flash_attention_2", "trainer": "plain", "seq_len": 8}
    with pytest.raises(RefusedError, match="takes fp16 and bf16"):
        traced(llama(1), lora(["q_proj"]), dtype="fp32", **flash)
    with pytest.raises(RefusedError, match="heads of up to 256, not 512"):
        traced(llama(1, head_dim=512), lora(["q_proj"]), **flash)


def test_estimate_takes_it() -> None:
    estimate = peftplan.estimate(
        llama(1), method="lora", engine="trace", attn_implementation="flash_attention_2", seq_len=64, trainer="plain"
    )
    assert estimate.to_dict()["memory"]["peak_allocated"] > 0


def test_flash_through_sdpa_keeps_two_tensors_of_random_state() -> None:
    """`_scaled_dot_product_flash_attention` returns `rng_state` (2 × 8 bytes) and `unused` (8), both saved (derivatives.yaml)."""
    q = torch.empty(b, a, s, d, dtype=torch.bfloat16, device="meta")
    _, lse, _, _, _, _, rng_state, unused, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)
    assert (lse.shape, rng_state.shape, unused.shape) == ((b, a, s), (2,), ())
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda nothing: None):
        sdpa(*qkv(heads=a), is_causal=True, capability=AMPERE)
    assert saved[4:] == [lse.shape, rng_state.shape, unused.shape]


def test_output_of_flash_is_laid_out_as_the_query() -> None:
    """So that `attn_output.transpose(1, 2).contiguous()` copies nothing (`empty_like(query)`, torch/_meta_registrations.py)."""
    q, k, v = qkv(heads=a)
    meta = [tensor.to("meta") for tensor in (q, k, v)]
    real = torch.ops.aten._scaled_dot_product_flash_attention(*meta)[0]
    assert sdpa(q, k, v, is_causal=True, capability=AMPERE).stride() == real.stride()


@pytest.mark.parametrize(
    ("capability", "head", "trains", "kernel"),
    [((8, 9), 208, True, "efficient"), ((8, 9), 208, False, "flash"), ((8, 9), 256, True, "flash"), ((9, 0), 208, True, "flash")],
)
def test_cards_without_the_backward_of_wide_heads(capability: tuple[int, int], head: int, trains: bool, kernel: str) -> None:
    q = torch.empty(1, 2, 16, head, dtype=torch.bfloat16, device="meta", requires_grad=trains)
    assert choose(q, q, q, None, enable_gqa=False, capability=capability) == kernel

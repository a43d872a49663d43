"""What is true of every model: limits and sums, over random Llama-like shapes and real models."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import peftplan
from peftplan.dtypes import ITEMSIZE
from peftplan.methods import METHODS

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@st.composite
def llamas(draw: st.DrawFn, *, narrowest: int = 8) -> dict[str, Any]:
    """A config of a Llama, Mistral, Qwen2 or Qwen3 with small numbers; no linear layer is narrower than `narrowest`."""
    groups, heads_per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = narrowest + 2 * draw(st.integers(0, 12))
    return {
        "model_type": draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"])),
        "architectures": ["ForCausalLM"],
        "hidden_size": groups * heads_per_group * head_dim,
        "head_dim": head_dim,
        "num_attention_heads": groups * heads_per_group,
        "num_key_value_heads": groups,
        "intermediate_size": narrowest + draw(st.integers(0, 300)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "vocab_size": draw(st.integers(2, 500)),
        "tie_word_embeddings": draw(st.booleans()),
    }


def features(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer, from the config alone."""
    h, i = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    sizes = ((h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h))
    return dict(zip(LINEAR, sizes, strict=True))


@QUICK
@given(config=llamas(), r=st.integers(1, 64), targets=st.sets(st.sampled_from(LINEAR), min_size=1))
def test_lora_has_r_times_in_plus_out_for_each_target(config: dict[str, Any], r: int, targets: set[str]) -> None:
    expected = r * config["num_hidden_layers"] * sum(sum(features(config)[name]) for name in targets)
    one = peftplan.estimate(config, r=r, target_modules=tuple(targets))
    two = peftplan.estimate(config, r=2 * r, target_modules=tuple(targets))
    assert one.trainable_parameters == expected
    assert two.trainable_parameters == 2 * expected
    assert one.total_parameters == one.model["num_parameters"] + expected


@QUICK
@given(config=llamas(), r=st.integers(1, 63), more=st.integers(1, 64), quant=st.sampled_from(["none", "nf4", "int8"]))
def test_more_rank_is_more_of_everything(config: dict[str, Any], r: int, more: int, quant: str) -> None:
    small, large = (peftplan.estimate(config, r=rank, quant=quant) for rank in (r, r + more))
    assert small.trainable_parameters < large.trainable_parameters
    of_small, of_large = small.static.by_category(), large.static.by_category()
    assert all(of_small[category] <= of_large[category] for category in of_small)
    assert of_small["weights"] == of_large["weights"]


WIDE = llamas(narrowest=256)
"""Weights of at least 256 · 256: below about 45,000 elements the tensors of double quantization cost more than they save, since
each takes a multiple of 512 bytes."""


@QUICK
@given(config=WIDE)
def test_nf4_is_smaller_than_bf16_and_double_quantization_smaller_still(config: dict[str, Any]) -> None:
    def stored(**storage: Any) -> int:
        by_category = peftplan.estimate(config, kbit_prepare=False, **storage).static.by_category()
        return by_category["weights"] + by_category["quant_state"]

    assert stored(quant="nf4", double_quant=True) <= stored(quant="nf4") <= stored(quant="int8") <= stored()


@QUICK
@given(
    config=WIDE,
    r=st.integers(1, 16),
    optim=st.sampled_from(["adamw_torch_fused", "adafactor", "adamw_8bit", "sgd", "lion_32bit"]),
)
def test_lora_trains_less_than_full(config: dict[str, Any], r: int, optim: str) -> None:
    lora = peftplan.estimate(config, r=r, optim=optim).static.by_category()
    full = peftplan.estimate(config, method="full", optim=optim).static.by_category()
    assert lora["gradients"] <= full["gradients"]
    assert lora["optimizer_states"] <= full["optimizer_states"]


@QUICK
@given(
    config=llamas(), dtype=st.sampled_from(["bf16", "fp16", "fp32"]), optim=st.sampled_from(["adamw_torch_fused", "adamw_torch"])
)
def test_totals_are_sums_of_lines(config: dict[str, Any], dtype: str, optim: str) -> None:
    estimate = peftplan.estimate(config, dtype=dtype, optim=optim, seq_len=64)
    memory = estimate.to_dict()["memory"]
    on_device = [line for line in memory["lines"] if line["place"] == "device"]
    assert sum(line["bytes"] for line in on_device) == memory["peak_allocated"] == max(memory["peak_by_phase"].values())
    assert sum(memory["by_category"].values()) == memory["peak_allocated"]
    assert all(line["bytes"] > 0 for line in memory["lines"])
    for category, value in memory["by_category"].items():
        assert value == sum(line["bytes"] for line in on_device if line["category"] == category)
    # No line is smaller than its tensor, and none is 512 bytes larger for each copy of it.
    itemsize = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
    weights = sum(line["bytes"] for line in on_device if line["category"] == "weights")
    tensors = sum(line.copies for line in estimate.ledger if line.category == "weights")
    assert 0 <= weights - itemsize * estimate.model["num_parameters"] < 512 * tensors


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_adds_up_on_a_real_model(method: str) -> None:
    needed = {"num_virtual_tokens": 4} if METHODS[method].module == "virtual_tokens" else {}
    estimate = peftplan.estimate("opt-350m" if method == "bitfit" else "llama-3.2-1b", method=method, **needed)
    assert 0 < estimate.trainable_parameters <= estimate.total_parameters
    assert estimate.total_parameters - estimate.adaptation.num_added == estimate.model["num_parameters"]
    assert sum(estimate.static.by_category().values()) == estimate.persistent_bytes
    # AdamW keeps two moments beside each gradient, in its dtype and a step of one block.
    by_category = estimate.static.by_category()
    stepped = [p for p in estimate.parameters.all if p.trainable or p.rests]
    resting = sum(p.numel * p.copies * ITEMSIZE[p.dtype] for p in stepped if p.rests)
    assert by_category["optimizer_states"] == 2 * (by_category["gradients"] + resting) + 512 * sum(p.copies for p in stepped)


@QUICK
@given(config=llamas(), batch=st.integers(1, 64), seq=st.integers(1, 4096))
def test_what_persists_does_not_depend_on_the_batch(config: dict[str, Any], batch: int, seq: int) -> None:
    assert peftplan.estimate(config, batch_size=batch, seq_len=seq).persistent_bytes == peftplan.estimate(config).persistent_bytes

"""Every method of the installed peft traces on a tiny Llama, with peft's own counts; those that cannot are named with the reason.

And what single methods hold on the device, by sums from their shapes.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import peft
import torch

from peftplan.arch.readers import read_config
from peftplan.errors import RefusedError
from peftplan.job.script import Script
from peftplan.libraries.count import count_with_peft
from peftplan.methods import adapt, configure
from peftplan.methods.adaptation import Adaptation
from peftplan.trace.engine import Traced
from tests.trace.engine_case import HIDDEN, KV, llama, lora, traced

QV = ["q_proj", "v_proj"]
SHORT = {"trainer": "plain", "batch_size": 2, "seq_len": 32, "padding": True}

OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100, "target_modules": QV},
    "ADAMSS": {"r": 8, "num_subspaces": 4, "subspace_rank": 1, "target_modules": QV},
    "ADAPTION_PROMPT": {"adapter_layers": 2, "adapter_len": 4},
    "BOFT": {"boft_block_size": 4, "target_modules": QV},
    "C3A": {"block_size": 32, "target_modules": QV},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "FOURIERFT": {"n_frequency": 10, "target_modules": QV},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {},
    "LOKR": {"r": 4, "target_modules": QV},
    "OFT": {"oft_block_size": 32, "target_modules": QV},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 8, "target_modules": QV},
    "SHADOW": {},
    "SUPERTUNING": {},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
    "UNILORA": {"r": 4, "theta_d_length": 32, "target_modules": QV},
    "VBLORA": {"vector_length": 32, "num_vectors": 16, "target_modules": QV},
    "WAVEFT": {"n_frequency": 10, "target_modules": QV},
}
"""What a type needs to fit a Llama this small; the others adapt q and v with their defaults."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "CPT": ({"cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1]}, "depends on the values"),
    "MULTITASK_PROMPT_TUNING": ({"num_virtual_tokens": 4}, "task_ids cannot be None"),
    "POLY": ({"r": 4, "n_tasks": 2, "target_modules": QV}, "task_ids should not be None"),
    "XLORA": ({}, "use_cache"),
}
"""Types whose loss or batch needs values that a trace does not have, or adapters from files → part of the reason."""


def of(peft_type: str, **options: Any) -> dict[str, Any]:
    return {"peft_type": peft_type, "task_type": "CAUSAL_LM", **options}


def reference(config: dict[str, Any], method: str, **options: Any) -> Adaptation:
    return adapt(read_config(config, name="model"), *configure(method, options))


def bytes_of(trace: Traced, part: str, *, phase: str = "step") -> int:
    return sum(group.bytes for group in trace.peaks[phase].alive if part in group.name)


@pytest.mark.parametrize("peft_type", sorted({t.value for t in peft.PeftType} - REFUSED.keys()))
def test_every_type_traces_with_pefts_counts(peft_type: str) -> None:
    config = of(peft_type, **OPTIONS.get(peft_type, {"target_modules": QV}))
    model = llama(2 if peft_type in ACROSS_LAYERS else 1)
    trace = traced(model, config, **SHORT)
    counted = count_with_peft(model, config, task_type="CAUSAL_LM")
    assert trace.num_trainable == counted.num_trainable
    assert 0 < trace.peak_by_phase["load"] < trace.peak_by_phase["forward"]
    assert trace.by_category("step")["optimizer_states"] >= 2 * 4 * trace.num_trainable * (peft_type not in BASE_DTYPE)


ACROSS_LAYERS = ("ADAPTION_PROMPT", "LILY", "RANDLORA", "SHADOW", "UNILORA", "VBLORA", "VERA", "PVERA")
"""Types whose layers share something, or that count them."""
BASE_DTYPE = ("ADAPTION_PROMPT", "LN_TUNING", "OSF", "SHADOW", "TRAINABLE_TOKENS", "LILY", "VBLORA")
"""Types of which something that trains keeps the base's bf16, or is shared."""


@pytest.mark.parametrize("peft_type", list(REFUSED))
def test_what_cannot_be_traced_says_why(peft_type: str) -> None:
    options, reason = REFUSED[peft_type]
    with pytest.raises(RefusedError, match=reason):
        traced(llama(), of(peft_type, **options), **SHORT)


def test_adalora_keeps_three_sensitivities_per_parameter() -> None:
    """ipt and its two moving averages, beside Adam's two: five fp32 tensors like each of A, B and E."""
    trace = traced(llama(1), of("ADALORA", init_r=8, target_r=4, total_step=100, target_modules=["q_proj"]), **SHORT)
    # A: 8 x 256 and B: 256 x 8, each 8,192 B; E: 8 x 1, one block of 512 B
    ranknum = 2 * 512  # Adam's alone: peft trains it by accident
    assert (
        trace.by_category("step")["optimizer_states"] == 5 * (8_192 + 8_192 + 512) + ranknum + 8_192
    )  # a new ipt beside the old


def test_lora_fa_has_two_states_per_b_and_none_per_a() -> None:
    trace = traced(llama(1), lora(["q_proj"], r=8, freeze_a=True), **SHORT)
    assert trace.num_trainable == 256 * 8
    assert trace.by_category("step")["optimizer_states"] == 2 * 8_192  # B: 256 x 8 in fp32


def test_a_frozen_adapter_has_neither_states_nor_gradients() -> None:
    """Backward reaches the inputs of checkpointed layers, as Trainer's `enable_input_require_grads` lets it."""
    setup = {**SHORT, "trainer": "transformers", "gradient_checkpointing": True}
    trace = traced(llama(1), lora(["q_proj"], r=8, freeze_adapter=True), **setup)
    assert trace.num_trainable == 0
    assert trace.by_category("step").get("optimizer_states", 0) == 0
    assert trace.by_category("backward").get("gradients", 0) == 0


def test_shira_keeps_its_places_on_the_device() -> None:
    """int32 places (2, r·(in + out)) that last, and int64 ones that backward needs."""
    trace = traced(llama(1), of("SHIRA", r=4, target_modules=["q_proj"]), **SHORT)
    entries = 4 * (HIDDEN + HIDDEN)
    assert bytes_of(trace, "shira_indices") == 2 * entries * 4
    assert (
        sum(a.bytes for a in trace.peaks["backward"].alive if a.shape == (2, entries) and a.dtype == "int64") == 2 * entries * 8
    )


def test_boft_copies_its_permutation_from_the_host_in_a_plain_loop() -> None:
    """A plain loop has its model on the device before peft makes the permutation, 256 x 256 in fp32; Trainer moves it there."""
    config = of("BOFT", boft_block_size=4, target_modules=["q_proj"])
    assert bytes_of(traced(llama(1), config, **SHORT), "boft_P") == 0
    assert bytes_of(traced(llama(1), config, **{**SHORT, "trainer": "transformers"}), "boft_P") == HIDDEN * HIDDEN * 4


def test_frod_offloads_the_weights_that_it_replaces() -> None:
    config = of("FROD", target_modules=QV)
    kept, offloaded = (
        traced(llama(1), {**config, "runtime_offload_base_weight": offloads}, **SHORT) for offloads in (False, True)
    )
    # q (256 x 256) and v (128 x 256) in bf16
    moved = 2 * HIDDEN * (HIDDEN + KV)
    assert kept.by_category("step")["weights"] - offloaded.by_category("step")["weights"] == moved


def test_lycoris_adapts_with_padding_too() -> None:
    """peft draws whether a layer is adapted; both loops see the adapter's gradients."""
    for padding in (False, True):
        trace = traced(llama(1), of("LOKR", r=4, target_modules=QV), **{**SHORT, "padding": padding})
        assert trace.by_category("step")["gradients"] > 0


def test_adaption_prompts_stay_in_the_dtype_of_the_base() -> None:
    trace = traced(llama(1), of("ADAPTION_PROMPT", adapter_layers=1, adapter_len=4), **SHORT)
    assert bytes_of(trace, "adaption_prompt", phase="load") == 4 * HIDDEN * 2


def test_an_earlier_step_of_another_length_is_in_the_log_only() -> None:
    """The counted step does not change; outputs of a shorter one before it take less of its forward."""
    alone, after_short = (
        traced(llama(1), lora(QV), script=Script(outputs_outlive_step=True, earlier_seq_lens=lengths), keep_outputs=True, **SHORT)
        for lengths in ((), (8,))
    )
    assert after_short.peak_by_phase["backward"] == alone.peak_by_phase["backward"]
    # per token of two samples, in bf16: logits over 1,000 entries, and one layer's keys and values in the cache
    per_token = 2 * 2 * (1000 + 2 * KV)
    less = alone.peak_by_phase["forward"] - after_short.peak_by_phase["forward"]
    assert less == pytest.approx((32 - 8) * per_token, abs=1024)


@pytest.mark.parametrize(
    ("method", "options", "layers"),
    [("houlsby", {}, 2), ("pfeiffer", {"bottleneck_size": 24}, 8)],  # 8: made from two shallow traces
)
def test_bottleneck_adapters_in_the_real_model(method: str, options: dict[str, Any], layers: int) -> None:
    config = llama(layers)
    adaptation = reference(config, method, **options)
    trace = traced(config, adaptation, **SHORT)
    assert trace.num_trainable == adaptation.num_trainable
    # Adam's two fp32 states, each a multiple of 512 B here
    places, b = (2, 16) if method == "houlsby" else (1, 24)
    one = 2 * HIDDEN * b * 4 + HIDDEN * 4 + 512  # down, up, bias of up, bias of down
    assert trace.by_category("step")["optimizer_states"] == 2 * layers * places * one


def test_adapters_are_refused_where_a_norm_lies_inside() -> None:
    from peftplan.trace.reference import apply_reference

    layer = torch.nn.Module()
    layer.add_module("attention", torch.nn.Module())
    layer.attention.add_module("output", torch.nn.Linear(4, 4))
    model = torch.nn.ModuleDict({"layer": torch.nn.ModuleList([layer])})
    added = reference(llama(1), "houlsby", bottleneck_size=2).added
    renamed = Adaptation(added=tuple(t._replace(name=t.name.replace("model.layers", "layer")) for t in added))
    with pytest.raises(RefusedError, match="without a norm of its own"):
        apply_reference(model, renamed, dtype=torch.float32)


def test_bitfit_trains_the_biases() -> None:
    config = {**llama(2), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    trace = traced(config, reference(config, "bitfit"), **SHORT)
    assert trace.num_trainable == 2 * (HIDDEN + 2 * KV)  # q, k and v of two layers

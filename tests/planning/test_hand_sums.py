"""What lasts of a tiny model, summed by hand line by line, and what each choice of precision changes in it."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError
from tests.planning.tiny import CONFIG

# CUDA's allocator gives multiples of 512 bytes. Two layers, h = 64, MLP 96, 4 heads of 16, 2 of keys and values (32), 100 tokens.
WEIGHTS = {
    # bf16: 2 bytes
    "model.embed_tokens.weight": 12_800,  # 100·64·2 = 12,800 = 25·512
    "model.layers.*.self_attn.q_proj.weight": 16_384,  # 2 × 64·64·2
    "model.layers.*.self_attn.k_proj.weight": 8_192,  # 2 × 32·64·2
    "model.layers.*.self_attn.v_proj.weight": 8_192,
    "model.layers.*.self_attn.o_proj.weight": 16_384,
    "model.layers.*.mlp.gate_proj.weight": 24_576,  # 2 × 96·64·2
    "model.layers.*.mlp.up_proj.weight": 24_576,
    "model.layers.*.mlp.down_proj.weight": 24_576,
    "model.layers.*.input_layernorm.weight": 1_024,  # 2 × 64·2 = 128 → 512
    "model.layers.*.post_attention_layernorm.weight": 1_024,
    "model.norm.weight": 512,
    "lm_head.weight": 12_800,
}
ADAPTER = {
    # r = 4, fp32: 4 bytes
    "model.layers.*.self_attn.q_proj.lora_A.weight": 2_048,  # 2 × 4·64·4
    "model.layers.*.self_attn.q_proj.lora_B.weight": 2_048,  # 2 × 64·4·4
    "model.layers.*.self_attn.v_proj.lora_A.weight": 2_048,
    "model.layers.*.self_attn.v_proj.lora_B.weight": 1_024,  # 2 × 32·4·4
}
GRADIENTS = {f"{name}.grad": num_bytes for name, num_bytes in ADAPTER.items()}
STATES = {
    # AdamW, fused: two moments in the parameter's dtype, and a step of 4 bytes on the device for each of 2 × 4 tensors
    **{f"{name}.exp_avg": num_bytes for name, num_bytes in ADAPTER.items()},
    **{f"{name}.exp_avg_sq": num_bytes for name, num_bytes in ADAPTER.items()},
    **{f"{name}.step": 1_024 for name in ADAPTER},
}
BUFFERS = {"model.rotary_emb.inv_freq": 512, "model.rotary_emb.original_inv_freq": 512}  # 8·4 = 32 → 512


def lines(category: str | None = None, **options: Any) -> dict[str, int]:
    """name → bytes of the lines of one category, or of all."""
    static = peftplan.estimate(CONFIG, **{"r": 4, "target_modules": "q_proj,v_proj", **options}).static
    return {line.name.replace("{}", "*"): line.bytes() for line in static if category in (None, line.category)}


def total(*categories: str, **options: Any) -> int:
    return sum(num_bytes for category in categories for num_bytes in lines(category, **options).values())


def test_every_line() -> None:
    result = peftplan.estimate(CONFIG, r=4, target_modules="q_proj,v_proj")
    assert lines() == WEIGHTS | ADAPTER | GRADIENTS | STATES | BUFFERS
    assert result.static.by_category() == {
        "weights": 151_040,  # 2·12,800 + 49,152 + 73,728 + 2,560
        "adapter_weights": 7_168,
        "quant_state": 0,
        "gradients": 7_168,
        "optimizer_states": 18_432,  # 2·7,168 + 4·1,024
        "buffers": 1_024,
        "activations": 0,
        "logits": 0,
        "temporaries": 0,
        "workspaces": 0,
    }
    assert result.persistent_bytes == 184_832
    # 12,800 in embedding and head, 24,576 in attention, 36,864 in the MLP, 320 in the norms
    assert result.model["num_parameters"] == 12_800 + 24_576 + 36_864 + 320
    # 4·(64 + 64) for q and 4·(64 + 32) for v
    assert result.trainable_parameters == 2 * (512 + 384)
    assert result.total_parameters == 74_560 + 1_792


def test_foreach_keeps_its_steps_on_the_cpu() -> None:
    # `adamw_torch` is neither fused nor capturable: its steps are CPU tensors, and take nothing of the device.
    estimate = peftplan.estimate(CONFIG, r=4, target_modules="q_proj,v_proj", optim="adamw_torch")
    assert estimate.static.by_category()["optimizer_states"] == 2 * 7_168
    assert {line.place for line in estimate.static if line.name.endswith(".step")} == {"host"}


def test_sgd_without_momentum_has_no_states() -> None:
    assert lines("optimizer_states", optim="sgd") == {}


def test_full_fine_tuning() -> None:
    # Every weight trains in bf16: gradients and both moments are as large as the weights; each of 2·9 + 3 tensors has a step.
    estimate = peftplan.estimate(CONFIG, method="full")
    assert estimate.trainable_parameters == estimate.total_parameters == 74_560
    by_category = estimate.static.by_category()
    assert by_category["gradients"] == by_category["weights"] == 151_040
    assert by_category["adapter_weights"] == 0
    assert by_category["optimizer_states"] == 2 * 151_040 + 512 * (2 * 9 + 3)


def test_kbit_preparation_casts_what_is_not_quantized_to_fp32() -> None:
    prepared, raw = lines("weights", quant="nf4"), lines("weights", quant="nf4", kbit_prepare=False)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (raw[name], prepared[name]) == (12_800, 25_600)
    assert raw["model.norm.weight"] == prepared["model.norm.weight"] == 512  # 128 and 256 bytes
    # two of 64·64, two of 32·64, three of 96·64 elements per layer, half a byte each, in multiples of 512
    linear = 2 * (2 * 2_048 + 2 * 1_024 + 3 * 3_072)
    assert sum(raw.values()) == 2 * 12_800 + linear + 5 * 512
    assert sum(prepared.values()) == 2 * 25_600 + linear + 5 * 512


def test_without_a_quantized_base_there_is_nothing_to_prepare() -> None:
    assert lines() == lines(kbit_prepare=False)
    with pytest.raises(InputError, match="nothing is quantized"):
        lines(kbit_prepare=True)


def test_dtype_of_the_adapter() -> None:
    assert total("adapter_weights") == 7_168
    assert total("adapter_weights", trainer="trl") == 7_168  # TRL casts on a quantized base only
    # bf16 halves 1,024 to 512; v's B has 256, and takes 512 too
    assert total("adapter_weights", trainer="trl", quant="nf4") == 2 * 4 * 512
    assert total("gradients", trainer="trl", quant="nf4") == 2 * 4 * 512
    assert total("adapter_weights", trainer="trl", quant="nf4", adapter_dtype="fp32") == 7_168
    assert total("adapter_weights", quant="nf4") == 7_168
    assert total("adapter_weights", adapter_dtype="fp16") == 2 * 4 * 512


def test_fp16_keeps_in_fp32_what_the_model_class_says() -> None:
    # T5 keeps every `wo` in fp32 under fp16 (`_keep_in_fp32_modules`), not under bf16. t5-small: 2048·512 elements, 6 + 6 layers.
    def wo(dtype: str) -> int:
        all_lines = peftplan.estimate("t5-small", dtype=dtype, target_modules="q,v").lines()
        return sum(line["bytes"] for line in all_lines if line["category"] == "weights" and line["name"].endswith("wo.weight"))

    assert wo("bf16") == 12 * 2048 * 512 * 2
    assert wo("fp16") == wo("fp32") == 12 * 2048 * 512 * 4


def test_paged_states_live_in_managed_memory() -> None:
    # bitsandbytes pages states of at least 100,000 elements (`get_paged`): 32·4096 = 131,072 are, 16·4096 = 65,536 are not.
    def placed(r: int) -> tuple[int, int]:
        estimate = peftplan.estimate("llama-2-7b", r=r, target_modules="q_proj", optim="paged_adamw_32bit")
        return estimate.managed_bytes, estimate.static.by_category()["optimizer_states"]

    # 32 layers × A and B × 2 states × 4 bytes
    assert placed(32) == (32 * 2 * 2 * 4 * 131_072, 0)
    assert placed(16) == (0, 32 * 2 * 2 * 4 * 65_536)


def test_managed_memory_is_no_part_of_the_sum() -> None:
    paged = peftplan.estimate("llama-2-7b", r=32, target_modules="q_proj", optim="paged_adamw_32bit")
    plain = peftplan.estimate("llama-2-7b", r=32, target_modules="q_proj", optim="sgd")
    assert paged.persistent_bytes == plain.persistent_bytes

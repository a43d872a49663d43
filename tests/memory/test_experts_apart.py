"""Mixtures before transformers 5: each expert was three linear layers, and all ran one after the other."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError
from peftplan.job.prepare import prepare
from peftplan.job.script import Script

THEN = Script.on(transformers="4.57")


def small(name: str, **fields: int) -> dict[str, Any]:
    """A built-in model's config with fewer layers and experts."""
    from peftplan.arch import catalogue

    entry = catalogue.find(name)
    assert entry is not None
    return {**entry.facts()["config"], **fields}


def test_linear_layers_of_experts() -> None:
    """transformers 4.57.6, models/qwen2_moe/modeling_qwen2_moe.py: `gate`, then `experts` of three linear layers each;
    the names and shapes of all parameters of the five model types were compared with that release's classes."""
    config = small("qwen1.5-moe-a2.7b", num_hidden_layers=1, num_experts=2, num_experts_per_tok=2)
    arch = prepare(config, method="full", script=THEN).architecture
    block = [module.name for module in arch.modules if ".mlp." in module.name]
    experts = [f"experts.{k}.{projection}" for k in (0, 1) for projection in ("gate_proj", "up_proj", "down_proj")]
    shared = [f"shared_expert.{projection}" for projection in ("gate_proj", "up_proj", "down_proj")]
    assert block == [f"model.layers.{{}}.mlp.{name}" for name in ("gate", *experts, *shared, "shared_expert_gate")]
    assert {module.kind for module in arch.modules if ".mlp." in module.name} == {"Linear"}


def test_a_quantized_base_takes_its_experts_along() -> None:
    """Qwen3-30B-A3B: 48 layers of 128 experts, each 3 · 2048 · 768 weights, half a byte each in 4 bits, two bytes today."""
    options: dict[str, Any] = {"method": "qlora", "target_modules": "q_proj,v_proj", "kbit_prepare": False}
    then, today = (peftplan.estimate("qwen3-30b-a3b", **options, script=script) for script in (THEN, Script()))
    experts, routers = 48 * 128 * 3 * 2048 * 768, 48 * 128 * 2048
    weights = [each.ledger.by_category()["weights"] for each in (today, then)]
    assert weights[0] - weights[1] == 3 * experts // 2 + 3 * routers // 2
    assert "--transformers 4.57" in today.assumptions["notes"][0]
    assert "notes" not in then.assumptions


@pytest.mark.parametrize(("name", "release"), [("mixtral-8x7b-v0.1", "4.35"), ("qwen3-30b-a3b", "4.50"), ("llama-3.1-8b", "3.0")])
def test_a_release_without_the_model(name: str, release: str) -> None:
    """PyPI: the wheels of transformers 4.36 and 4.51 are the first with models/mixtral and models/qwen3_moe."""
    with pytest.raises(InputError, match=rf"transformers: '{release}' is not valid; .*accepted"):
        peftplan.estimate(name, script=Script.on(transformers=release))


def test_deepseek_s_experts_have_counts_and_no_peak() -> None:
    estimate = peftplan.estimate("deepseek-v2-lite", method="qlora", script=THEN)
    assert estimate.peaks is None
    assert estimate.not_modelled[0] == "the experts of DeepSeek as before transformers 5.0"


SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN2 = {**SMALL, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 2048, "norm_topk_prob": False}
QWEN3 = {**SMALL, "model_type": "qwen3_moe", "head_dim": 64, "norm_topk_prob": True}
MASK = 2 * 1024 * 1024
"""The program's batch has no attention mask: that release of transformers then made one of a byte for each pair of positions of
its two rows, in Qwen3-MoE, as for packed sequences. The collator that the formula assumes brings one of ones."""


def test_another_mixture_whose_experts_were_linear_layers_is_refused() -> None:
    """transformers 4.57.6, models/olmoe/modeling_olmoe.py:583: `nn.ModuleList([OlmoeMLP(config) …])`, which bitsandbytes
    quantizes; as fused parameters, in fp32 after kbit preparation, they would be the most of the bytes."""
    with pytest.raises(InputError, match=r"experts of olmoe were linear layers then, .* accepted: transformers 5\.0 or newer"):
        peftplan.estimate("olmoe-1b-7b", method="qlora", script=THEN)


REHEARSED = (
    (QWEN3, "lora", "q_proj,v_proj", (301_453_824, 1_053_396_480, 1_179_020_288, 369_583_616), 1_633_681_408, MASK),
    (QWEN2, "lora", None, (347_725_824, 1_119_007_744, 1_240_376_832, 441_543_680), 1_774_190_592, 0),
    (QWEN2, "qlora", None, (193_997_824, 965_279_744, 1_086_648_832, 287_815_680), 1_593_835_520, 0),
    (QWEN3, "qlora", None, (183_236_608, 954_141_184, 1_076_003_328, 274_088_448), 1_572_864_000, MASK),
)
"""transformers 4.57.6, peft 0.21.2, bitsandbytes 0.50.2, torch 2.13: tests/distributed/programs/trainer.py on the emulated card,
tokens spread evenly over the experts, non-reentrant checkpoints, `quant_storage` uint8: bytes by phase, reserved."""


@pytest.mark.parametrize(("config", "method", "targets", "phases", "reserved", "mask"), REHEARSED)
def test_a_rehearsed_mixture(
    config: dict[str, Any], method: str, targets: str | None, phases: tuple[int, ...], reserved: int, mask: int
) -> None:
    """Allocated within 0.11 %, reserved within 0.8 %: what blocks hold beyond a mask depends on where it lies."""
    options: dict[str, Any] = {
        "method": method,
        "r": 8,
        "target_modules": targets,
        "kbit_prepare": False if targets is None else None,
    }
    model = {**config, "architectures": [f"{config['model_type'].title().replace('_', '')}ForCausalLM"]}
    peaks = peftplan.estimate(model, **options, batch_size=2, seq_len=1024, device_map="none", script=THEN, gpu="h200").peaks
    assert peaks is not None
    with_mask = [
        peaks.by_phase[phase] + mask * (phase in ("forward", "backward")) for phase in ("load", "forward", "backward", "step")
    ]
    assert with_mask == pytest.approx(phases, rel=1.1e-3)
    assert peaks.reserved == pytest.approx(reserved, rel=8.1e-3)

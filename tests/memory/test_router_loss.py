"""The load-balancing loss of a mixture: against the trace of the real function, and against programs that were rehearsed.

The rows held these bytes on the emulated card (`tools.rehearsed_jobs`, transformers 5.24, trl 1.16): allocated, reserved.
"""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import RefusedError, estimate
from peftplan.job.configs.read import read_values
from peftplan.job.prepare import prepare
from peftplan.job.script import Script
from peftplan.job.trainers import TRAINERS
from tests.memory.engines import PLAIN, TRAINER, phases
from tests.memory.test_mixtures import GPT_OSS, GRANITE, MIXTRAL, QWEN2, QWEN3, V3

TRL = {"trainer": "trl"}
OFF = {**TRAINER, "gradient_checkpointing": False}
TOLERANCE = 0.001


@pytest.mark.parametrize(
    ("config", "method", "options"),
    [
        (MIXTRAL, "full", PLAIN),
        (MIXTRAL, "full", {**PLAIN, "padding": True}),
        (QWEN2, "lora", {**TRAINER, "use_reentrant": True}),
        (QWEN3, "full", {**TRAINER, "gradient_accumulation_steps": 2}),
        (QWEN3, "lora", {**TRL, "gradient_checkpointing": False}),
        (GRANITE, "lora", OFF),
        (GPT_OSS, "full", TRL),
    ],
)
def test_both_engines_agree(config: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    deep = {**config, "num_hidden_layers": 6}
    options = {"method": method, "router_loss": True, "batch_size": 2, "seq_len": 512, **options}
    instant, traced = (phases(deep, engine, **options) for engine in ("analytic", "trace"))
    assert instant == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.items()}


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        (MIXTRAL, "num_local_experts"),
        (QWEN2, "num_experts"),
        (GRANITE, "num_local_experts"),
        ({**GPT_OSS, "num_experts_per_tok": 4}, "num_local_experts"),
    ],
)
def test_logits_live_while_the_experts_run(config: dict[str, Any], experts: str) -> None:
    """`_, weights, indices = self.gate(x)` holds them (2 × 512 × 96 × 2 B) in transformers' blocks, as the trace runs them."""
    config = {**config, experts: 96, "vocab_size": 256}
    options = {**TRAINER, "method": "full", "batch_size": 2, "seq_len": 512}
    instant, traced = (phases(config, engine, **options) for engine in ("analytic", "trace"))
    assert instant["forward"] == pytest.approx(traced["forward"], abs=8192)


SMALL_QWEN3 = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32000,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}
SMALL_MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "output_router_logits": True,
}
LORA = {"method": "lora", "target_modules": ["q_proj", "v_proj"]}
REHEARSED = [
    (SMALL_QWEN3, {**TRL, **LORA}, 556_713_472, 637_534_208),
    (SMALL_QWEN3, {**TRL, "method": "full", "gradient_checkpointing": False}, 1_988_226_048, 2_023_751_680),
    (SMALL_MIXTRAL, {**TRAINER, **LORA}, 1_047_762_432, 1_222_639_616),
    (SMALL_MIXTRAL, {**TRAINER, "method": "full"}, 1_500_979_200, 1_767_899_136),
]


@pytest.mark.parametrize(("config", "options", "allocated", "reserved"), REHEARSED)
def test_trainers_ask_for_it_as_rehearsed(config: dict[str, Any], options: dict[str, Any], allocated: int, reserved: int) -> None:
    """SFTTrainer asks whatever the config says, transformers' Trainer where it says so."""
    peaks = estimate(config, batch_size=2, seq_len=1024, device_map="none", **options).peaks
    assert peaks is not None
    assert peaks.allocated == pytest.approx(allocated, rel=3e-5)
    assert peaks.reserved == pytest.approx(reserved, rel=0.004)


def test_pairs_have_it_too_as_rehearsed() -> None:
    """DPOTrainer: of the policy alone. Without it -0.37 %."""
    sizes = {"batch_size": 2, "seq_len": 512, "max_completion_length": 256, "device_map": "none"}
    peaks = estimate(SMALL_QWEN3, trainer="trl-dpo", **LORA, **sizes).peaks
    assert peaks is not None
    assert (peaks.allocated, peaks.reserved) == (pytest.approx(533_400_576, rel=1e-3), 568_328_192)


def test_who_asks_for_it() -> None:
    def adds(config: dict[str, Any], **options: Any) -> bool | None:
        return prepare(config, **options).setup.router_loss

    assert adds(QWEN3, trainer="trl") is True
    assert adds(QWEN3, trainer="trl", router_loss=False) is False
    assert adds({**QWEN3, "router_aux_loss_coef": 0.0}, trainer="trl") is False
    assert adds(QWEN3, trainer="transformers") is False
    assert adds({**QWEN3, "output_router_logits": True}, trainer="transformers") is True
    assert adds(V3, trainer="trl") is None
    with pytest.raises(RefusedError, match="DeepseekV3ForCausalLM has no load-balancing loss"):
        adds(V3, trainer="trl", router_loss=True)
    with pytest.raises(RefusedError, match="'GraniteMoeConfig' object has no attribute 'num_experts'"):
        adds(GRANITE, trainer="trl")


def test_trainers_that_ask_for_it_whatever_the_config_says() -> None:
    """trl 1.16 and, in axolotl 0.19, 1.9: `aux_loss_enabled` of each constructor. LLaMA-Factory and ms-swift write their own."""
    of_trl = {"trl", "trl-packed", "trl-dpo", "trl-kto", "trl-grpo", "trl-rloo"}
    in_axolotl = {"axolotl-dpo", "axolotl-kto", "axolotl-ebft", "axolotl-grpo"}
    assert {name for name, trainer in TRAINERS.items() if trainer.balances_experts} == of_trl | in_axolotl


def test_older_releases_join_the_logits_of_all_layers() -> None:
    older = estimate(QWEN3, router_loss=True, script=Script(transformers="5.15.0"))
    assert older.peaks is None
    assert any("before transformers 5.16" in reason for reason in older.not_modelled)


@pytest.mark.parametrize(
    ("tool", "values", "expected"),
    [
        ("axolotl", {"base_model": "mistralai/Mixtral-8x7B-v0.1", "model_config": {"output_router_logits": True}}, True),
        ("swift", {"model": "Qwen/Qwen3-30B-A3B", "router_aux_loss_coef": 0.001}, True),
        ("swift", {"model": "Qwen/Qwen3-30B-A3B"}, None),
        ("swift", {"model": "Qwen/Qwen3-30B-A3B", "router_aux_loss_coef": 0.001, "rlhf_type": "dpo"}, True),
        ("swift", {"model": "Qwen/Qwen3-30B-A3B", "router_aux_loss_coef": 0.001, "rlhf_type": "grpo"}, None),
        ("trl", {"model_name_or_path": "Qwen/Qwen3-30B-A3B", "router_aux_loss_coef": 0.0}, False),
        ("trl", {"model_name_or_path": "Qwen/Qwen3-30B-A3B", "router_aux_loss_coef": 0.01}, None),
    ],
)
def test_what_files_say(tool: str, values: dict[str, Any], expected: bool | None) -> None:
    plan = read_values(values, file="a.yaml", tool=tool)
    assert plan.options.get("router_loss") is expected
    assert not set(plan.unsupported) & {"router_aux_loss_coef", "model_config.output_router_logits"}

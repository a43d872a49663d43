"""Tensor parallelism as transformers does it: its plans, what it refuses, and rehearsed loops."""

from __future__ import annotations

import re
from typing import Any

import pytest

import peftplan
from peftplan.distributed.tensor_parallel import ATTENTION_ALONE, PLANS, UNPLANNED
from peftplan.errors import PeftplanError, RefusedError
from tools.rank_grid import LLAMA, cut

REPLICATED = "replicated_with_grad_allreduce"
BEFORE_MESHES = peftplan.Script(transformers="5.17.0")
"""A release whose `from_pretrained` does not compare its mesh with the world."""


def _stated(model_type: str) -> dict[str, str]:
    """transformers' plan of a model: of its config, and of its class with the head."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config = CONFIG_MAPPING[model_type]
    classes = MODEL_FOR_CAUSAL_LM_MAPPING if config in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_MAPPING
    return {**(config.base_model_tp_plan or {}), **(classes[config]._tp_plan or {})}


@pytest.mark.parametrize("model_type", PLANS)
def test_plans_are_those_of_transformers(model_type: str) -> None:
    """`lm_head` and the table of tokens are in every plan; norms of heads stay whole."""
    pytest.importorskip("transformers")
    stated = _stated(model_type)
    assert stated.pop("lm_head") == "colwise_gather_output"
    of_layers = {re.sub(r"^.*\.\*\.", "", name): style for name, style in stated.items() if "*" in name and style != REPLICATED}
    assert of_layers == PLANS[model_type]
    assert {style for name, style in stated.items() if "*" not in name} <= {"embedding_rowwise"}


@pytest.mark.parametrize("model_type", UNPLANNED)
def test_models_without_a_plan(model_type: str) -> None:
    pytest.importorskip("transformers")
    assert not _stated(model_type)


@pytest.mark.parametrize("model_type", ATTENTION_ALONE)
def test_heads_that_transformers_divides(model_type: str) -> None:
    """Of a model with pictures too, whose text has a config of its own."""
    pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]
    plan = CONFIG_MAPPING[model_type].sub_configs.get("text_config", config).base_model_tp_plan or {}
    divided = {style for name, style in plan.items() if name.endswith(("self_attn.k_proj", "self_attn.kv_b_proj"))}
    assert divided == {"colwise"}


@pytest.mark.parametrize(
    ("model", "gpus", "accepted"),
    [
        ("glm-4-9b", 4, "2 heads of keys and values"),
        ("glm-4.5-air", 16, "8 heads of keys and values"),
        ("qwen3-next-80b-a3b-instruct", 4, "2 heads of keys and values"),
        ("qwen2.5-vl-7b-instruct", 8, "28 attention heads"),
    ],
)
def test_heads_of_models_without_formula(model: str, gpus: int, accepted: str) -> None:
    """A rank has whole heads; those of Qwen3-VL's plan stay whole, which divides experts alone."""
    with pytest.raises(peftplan.InputError, match=f"accepted: a divisor of the model's {accepted}"):
        peftplan.estimate(model, method="full", gpus=gpus, strategy="tp")
    assert peftplan.estimate(model, method="full", gpus=2, strategy="tp").static.bytes() > 0
    assert peftplan.estimate("qwen3-vl-8b-instruct", method="full", gpus=32, strategy="tp").static.bytes() > 0


def test_a_stage_of_a_pipeline() -> None:
    """Ranks share the matrices of a stage: 16 GPUs in two stages need heads for eight. The last stage holds the head,
    the norm and half of the layers (transformers, distributed/pipeline_parallel.py, `layer_range_for_rank`)."""
    result = peftplan.estimate("llama-3.1-8b", method="full", gpus=16, strategy="tp", pp_size=2)
    assert result.distributed is not None
    assert (result.peaks, result.distributed.strategy.divided, result.distributed.strategy.replicas) == (None, 8, 1)
    table, norms = 128_256 * 4096, 4096
    layer = 2 * (4096 + 1024) * 4096 + 3 * 4096 * 14336
    weights = 2 * ((table + 16 * layer) // 8 + norms + 16 * 2 * norms)
    assert result.static.bytes(["weights"]) == weights
    with pytest.raises(peftplan.InputError, match="8 heads of keys and values"):
        peftplan.estimate("llama-3.1-8b", method="full", gpus=16, strategy="tp")


LOOP: dict[int, tuple[int, int, int, int, int]] = {
    2: (1_925_260_288, 8_554_826_240, 9_079_097_344, 9_294_111_744, 5_791_785_984),
    4: (961_618_944, 5_663_902_208, 6_189_221_888, 5_176_878_080, 2_901_910_528),
}
"""Ranks → loaded, forward, backward, step and after the step, of Llama-3.1-8B cut to 4 layers in a loop: bf16, 2,048 tokens,
checkpointing, AdamW that steps tensor by tensor; torch's own allocator on the emulated card (torch 2.13, transformers 5.24)."""


@pytest.mark.parametrize("world", LOOP)
def test_a_loop_of_four_layers(world: int) -> None:
    """AdamW of single tensors makes two temporaries as large as the largest parameter, and the part of a gradient."""
    loaded, forward, backward, step, after = LOOP[world]
    result = peftplan.estimate(
        cut("llama-3.1-8b", 4), method="full", gpus=world, strategy="tp", gpu="a100-80gb", seq_len=2048, autocast="none"
    )
    peaks = result.peaks
    assert peaks is not None
    weights, lasting = (result.static.bytes(categories) for categories in (["weights", "buffers"], ["gradients"]))
    assert weights == pytest.approx(loaded, rel=2e-3)
    assert peaks.by_phase["forward"] == pytest.approx(forward, rel=1e-3)
    assert peaks.by_phase["backward"] == pytest.approx(backward, rel=1e-3)
    part_of_table = 128_256 // world * 4096 * 2
    assert peaks.by_phase["step"] + part_of_table == pytest.approx(step, rel=1e-3)
    workspaces = peaks.ledgers["step"].bytes(["workspaces"])
    assert result.static.bytes() - lasting + workspaces == pytest.approx(after, rel=1e-3)


def test_the_first_rank_holds_the_odd_row() -> None:
    """DTensor divides as `torch.chunk` does: 50,257 = 4 x 12,564 + 1 rows make parts of 12,565, and a last one of 12,562."""
    result = peftplan.estimate(LLAMA | {"vocab_size": 50_257}, method="full", gpus=4, strategy="tp")
    shapes = {line.name: line.shape for line in result.static if line.category == "weights"}
    assert shapes["model.embed_tokens.weight"] == (12_565, 2048)
    assert shapes["lm_head.weight"] == (12_565, 2048)
    assert shapes["model.layers.{}.mlp.down_proj.weight"] == (2048, 8192 // 4)


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"model": "gpt2"}, "strategy: tp divides a model by its tp_plan, and GPT2LMHeadModel has none in transformers"),
    (
        {"model": "qwen2.5-0.5b"},
        "gpus: 4 is not valid; strategy tp divides matrices by 4; accepted: a divisor of the model's 14 attention heads",
    ),
    (
        {"model": "gemma-3-1b-pt"},
        "gpus: 4 is not valid; strategy tp divides matrices by 4; accepted: a divisor of the model's 1 heads of keys and values",
    ),
    (
        {"model": "qwen3-30b-a3b", "gpus": 8},
        "gpus: 8 is not valid; strategy tp divides matrices by 8; accepted: a divisor of the model's 4 heads of keys and values",
    ),
    (
        {"model": "deepseek-v2-lite", "gpus": 3},
        "gpus: 3 is not valid; strategy tp divides matrices by 3; accepted: a divisor of the model's 16 attention heads",
    ),
    ({"model": "llama-3.2-1b", "trainer": "plain"}, "optim: adamw_torch steps over lists of tensors, and a loop that passes"),
    (
        {"model": "llama-3.2-1b", "method": "lora", "r": 8, "target_modules": "all-linear"},
        "target_modules: o_proj is rowwise, and peft",
    ),
    (
        {"model": "phi-3-mini-4k-instruct", "method": "lora", "r": 8, "target_modules": "qkv_proj"},
        "target_modules: qkv_proj is colwise_gather_output, and peft",
    ),
)


@pytest.mark.parametrize(("options", "line"), REFUSED, ids=[line[:40] for _, line in REFUSED])
def test_what_the_libraries_refuse(options: dict[str, Any], line: str) -> None:
    """Each was tried: peft 0.21 with transformers 5.24 ends in a RuntimeError about shapes."""
    with pytest.raises(PeftplanError) as error:
        peftplan.estimate(**{"method": "full", "gpus": 4, **options}, strategy="tp")
    assert str(error.value).startswith(line)


def test_ranks_read_the_same_batch() -> None:
    result = peftplan.estimate("llama-3.2-1b", method="full", gpus=4, strategy="tp", batch_size=2)
    assert result.distributed is not None
    assert result.distributed.global_batch_size == 2
    assert "batch size 2 per rank, 2 per step" in result.distributed.words


def test_more_ranks_hold_less() -> None:
    """The residual stream and its checkpoints are on every rank, matrices and heads are not."""
    peaks = [peftplan.estimate("llama-3.1-8b", method="full", gpus=n, strategy="tp").peaks for n in (2, 4, 8)]
    sizes = [max(of_world.by_phase.values()) for of_world in peaks if of_world is not None]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 3


def test_beside_fsdp2_norms_alone_are_on_more_ranks() -> None:
    """65 norms of 4,096 in fp32: a fourth on each rank, not an eighth."""
    apart, divided = (
        peftplan.estimate(
            "llama-3.1-8b", method="full", gpus=8, strategy="fsdp2", tp_size=size, script=BEFORE_MESHES
        ).static.bytes(("weights",))
        for size in (1, 2)
    )
    assert divided - apart == 65 * 4096 * 4 // 8


@pytest.mark.parametrize("options", [{"strategy": "tp", "gpus": 4}, {"strategy": "fsdp2", "gpus": 8, "tp_size": 4}])
def test_a_model_without_a_plan_here_is_bounded_by_a_part_of_everything(options: dict[str, Any]) -> None:
    """30.5 billion parameters: a fourth in bf16, or an eighth in fp32. By a trace of 4 ranks each loads 15,285,276,672 bytes by
    transformers' plan and peaks at 57.6 GiB, so that the card runs what would not fit if each held everything."""
    result = peftplan.estimate("qwen3-30b-a3b", method="full", gpu="h100-80gb", script=BEFORE_MESHES, **options)
    weights = result.static.bytes(("weights",))
    assert result.peaks is None
    assert weights == pytest.approx(30_532_122_624 * 4 / 8, rel=1e-4)
    assert weights <= 15_285_276_672
    assert [card.verdict for card in result.gpus] == ["unknown"]


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_transformers_refuses_meshes_without_all_ranks(trainer: str) -> None:
    """Rehearsed over 8 GPUs: `from_pretrained` with `DistributedConfig(tp_size=2)` raises this, and Trainer does beside
    `DistributedConfig(tp_size=2, fsdp_size=4)` and `fsdp`, in `Accelerator.prepare`."""
    job: dict[str, Any] = {"method": "full", "gpus": 8, "strategy": "fsdp2", "trainer": trainer}
    with pytest.raises(RefusedError, match="The parallel mesh requires 2 processes, but world_size is 8"):
        peftplan.estimate("llama-3.1-8b", **job, tp_size=2)
    for fields in ({"tp_size": 8}, {"tp_size": 2, "script": BEFORE_MESHES}):
        assert peftplan.estimate("llama-3.1-8b", **job | fields).peaks is None


@pytest.mark.parametrize("trainer", ["automodel", "automodel-hf"])
def test_beside_fsdp2_a_model_of_transformers_has_no_peak(trainer: str) -> None:
    """Rehearsed are NeMo Automodel's own models."""
    result = peftplan.estimate("llama-3.1-8b", method="full", gpus=8, strategy="fsdp2", tp_size=4, trainer=trainer)
    assert (result.peaks is not None) == (trainer == "automodel")


def test_a_step_on_the_host_takes_nothing_of_the_device_for_shared_matrices() -> None:
    """Adam's root and denominator are where its states are: beside the workspace of cuBLAS the step has norms and scalars."""
    options: dict[str, Any] = {"method": "full", "gpus": 8, "strategy": "fsdp2", "trainer": "automodel", "offload_params": "cpu"}
    steps = [peftplan.estimate("llama-3.1-8b", **options, tp_size=size).peaks for size in (1, 4)]
    alone, shared = (peaks.by_phase["step"] for peaks in steps if peaks is not None)
    assert shared < alone + 2**20

"""What files of LLaMA-Factory mean, and what it and axolotl raise."""

from __future__ import annotations

import re
from typing import Any

import pytest

import peftplan
from peftplan.planning.configs import of_plan
from tests.job.configs.files import AXOLOTL, LLAMAFACTORY, LLAMAFACTORY_V1, SWIFT, TRL, read


@pytest.mark.parametrize(("method", "dtype"), [("full", "fp32"), ("lora", "bf16")])
def test_llamafactory_v1_trains_a_whole_model_in_fp32(method: Any, dtype: str) -> None:
    """v1/core/model_engine.py:195, where there is no peft_config; by a file and by options alike."""
    by_file = peftplan.estimate(config=read(LLAMAFACTORY_V1), method=method)
    by_hand = peftplan.estimate(
        "qwen3-0.6b", trainer="llamafactory-v1", method=method, strategy="fsdp2", gpus=8, batch_size=2, seq_len=2048
    )
    assert by_file.assumptions["dtype"] == by_hand.assumptions["dtype"] == dtype
    assert by_file.peaks == by_hand.peaks


def test_kernels_of_llamafactory_v1_need_to_be_named() -> None:
    assert read(LLAMAFACTORY_V1).unsupported == {}
    automatic = {**LLAMAFACTORY_V1, "kernel_config": {"name": "auto", "include_kernels": "auto"}}
    assert read(automatic).unsupported == {}, "on an NVIDIA card they replace experts alone"
    for named in (
        {**automatic, "model": "Qwen/Qwen3-30B-A3B"},
        {**automatic, "kernel_config": {"name": "liger_kernel", "include_kernels": "auto"}},
    ):
        assert read(named).unsupported.keys() == {"kernel_config.include_kernels"}


def test_scaling_of_llamafactory_changes_no_memory() -> None:
    plan = read({**LLAMAFACTORY, "lora_alpha": 32, "use_rslora": True})
    assert plan.unsupported == read(LLAMAFACTORY).unsupported


@pytest.mark.parametrize("packing", [{}, {"packing": True}, {"packing": False}])
def test_documents_are_kept_apart_in_packed_rows(packing: dict[str, bool]) -> None:
    """llamafactory 0.9.5, hparams/data_args.py:185: `neat_packing` turns `packing` on; the mask is one of all pairs."""
    assert read({**LLAMAFACTORY, **packing, "neat_packing": True}).options["padding"] is True


WITH_KERNELS = {key: value for key, value in AXOLOTL.items() if not key.endswith("_kernel")}
ON_RANKS = {**AXOLOTL, "adapter": "lora", "load_in_4bit": False, "attn_implementation": "flash_attention_2"}
AUTO = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}
LLAMA_FACTORY_FULL = {"stage": "sft", "finetuning_type": "full", "model_name_or_path": "Qwen/Qwen2-1.5B-Instruct"}


@pytest.mark.parametrize(
    ("values", "key", "raised"),
    [
        ({**AXOLOTL, "flash_attn_rms_norm": True}, "flash_attn_rms_norm", "DeprecationWarning"),
        ({**AXOLOTL, "max_packed_sequence_len": 2048}, "max_packed_sequence_len", "DeprecationWarning"),
        ({**WITH_KERNELS, "base_model": "EleutherAI/gpt-j-6b"}, "lora_qkv_kernel", "ValueError"),
        ({**WITH_KERNELS, "base_model": "microsoft/Phi-3.5-mini-instruct"}, "lora_qkv_kernel", "ValueError"),
        ({**WITH_KERNELS, "base_model": "Qwen/Qwen2-VL-7B-Instruct"}, "lora_qkv_kernel", "ValueError"),
        ({**WITH_KERNELS, "base_model": "LiquidAI/LFM2-1.2B"}, "lora_qkv_kernel", "ValueError"),
        ({**WITH_KERNELS, "base_model": "allenai/OLMoE-1B-7B-0924"}, "lora_qkv_kernel", "ValueError"),
        ({**WITH_KERNELS, "base_model": "meta-llama/Llama-3.2-11B-Vision-Instruct"}, "lora_qkv_kernel", "ValueError"),
        ({**AXOLOTL, "base_model": "tiiuae/falcon-7b", "attn_implementation": "xformers"}, "attn_implementation", "KeyError"),
        ({**AXOLOTL, "early_stopping_patience": 3, "save_steps": 10}, "early_stopping_patience", "ValueError"),
        ({**AXOLOTL, "adapter": "qlora", "load_in_4bit": True, "relora": True}, "relora", "RuntimeError"),
        ({**AXOLOTL, "warmup_steps": 0.1}, "warmup_steps", "ValidationError"),
        ({**AXOLOTL, "flash_attn_fuse_mlp": True}, "flash_attn_fuse_mlp", "ValueError"),
        ({**AXOLOTL, "rl": "ebft", "ebft": {"mode": "strided"}, "torch_compile": True}, "torch_compile", "ValueError"),
        ({**AXOLOTL, "load_in_4bit": False}, "adapter", "ValueError"),
        ({**AXOLOTL, "load_in_8bit": True}, "load_in_8bit", "ValueError"),
        ({**AXOLOTL, "rl": "rloo"}, "rl", "ValidationError"),
        ({**SWIFT, "rlhf_type": "rloo"}, "rlhf_type", "ValueError"),
        ({**ON_RANKS, "deepspeed": "deepspeed_configs/zero3.json"}, "deepspeed", "RuntimeError"),
        ({**ON_RANKS, "deepspeed": AUTO}, "deepspeed", "RuntimeError"),
        ({**LLAMA_FACTORY_FULL, "bf16": True, "fp16": True}, "fp16", "ValueError"),
        ({**TRL, "bf16": True, "fp16": True}, "fp16", "ValueError"),
        ({**LLAMA_FACTORY_FULL, "use_apollo": True}, "use_apollo", "NotImplementedError"),
        ({**LLAMA_FACTORY_FULL, "use_galore": True}, "use_galore", "NotImplementedError"),
        ({**LLAMA_FACTORY_FULL, "mixture_of_depths": "convert"}, "mixture_of_depths", "ImportError"),
        ({**LLAMA_FACTORY_FULL, "use_kt": True, "kt_cpu_activation": "retain"}, "kt_cpu_activation", "ValueError"),
        ({**LLAMAFACTORY_V1, "train_dataset": "data/v1_dpo_demo.yaml"}, "train_dataset", "NotImplementedError"),
    ],
)
def test_what_the_tool_raises_for_is_said_with_its_line(values: dict[str, Any], key: str, raised: str) -> None:
    """ReLoRA was rehearsed: the first step ends, and the second one raises. So was LoRA under ZeRO-3, where the first attention
    raises. KTransformers' examples were parsed by llamafactory 0.9.5. For LoRA kernels the attention of transformers 5.20.1 was
    searched as axolotl 0.21.0 does (`patch_self_attn_lora`)."""
    plan = read(values)
    assert re.search(rf" raises {raised}: .* \([\w/]+\.py:\d+\)$", {**plan.unsupported, **plan.refused}[key].why)
    assert key in plan.refused or plan.unsupported[key].effect == "unknown"


def test_the_plugin_of_diffusion_takes_a_fraction_of_warmup_since_axolotl_0_21() -> None:
    """integrations/diffusion/plugin.py:50 makes `warmup_ratio` of it before the config is checked, and the file runs."""
    values = {**AXOLOTL, "warmup_steps": 0.1, "plugins": ["axolotl.integrations.diffusion.DiffusionPlugin"]}
    assert "warmup_steps" not in read(values).refused
    assert "warmup_steps" in read(values, tool_version="0.19.0").refused
    assert "warmup_steps" in read({**values, "plugins": None}).refused


def test_llama_factory_makes_its_low_rank_optimizers_of_the_plain_adamw() -> None:
    """Of layers one after the other, with random projections, the optimizer is that of transformers."""
    plan = read({**LLAMA_FACTORY_FULL, "use_apollo": True, "optim": "adamw_torch"})
    assert plan.unsupported["use_apollo"].why == "APOLLO by its own optimizer"
    in_turn = {**LLAMA_FACTORY_FULL, "use_apollo": True, "apollo_layerwise": True, "apollo_rank": 64, "pure_bf16": True}
    plan = read(in_turn)
    assert (plan.unsupported, plan.refused["use_apollo"].instead) == ({}, {"optim": "adamw_torch"})
    assert (plan.options["optim"], plan.options["optim_args"]) == ("apollo_adamw_layerwise", "rank=64")
    assert "lm_head" not in str(plan.options["optim_target_modules"])
    for other in ({"apollo_proj": "svd"}, {"apollo_layerwise": False}, {"pure_bf16": False}):
        assert "use_apollo" in read({**in_turn, "optim": "adamw_torch", **other}).unsupported


def test_muon_of_llama_factory_v1_gathers_one_matrix_after_the_other() -> None:
    """0.9.6.dev0, v1/plugins/trainer_plugins/optimizers/muon_optimizer.py; 0.9.5 registers no optimizer."""
    values = {**LLAMAFACTORY_V1, "dist_config": {"name": "fsdp2"}, "optim_config": {"name": "muon"}}
    plan = read(values)
    assert (plan.unsupported, plan.options["optim"]) == ({}, "moonlight_muon")
    assert "release 0.9.5" in plan.assumed["optim"]
    assert of_plan(plan).peak_allocated is not None
    for other in ({"dist_config": {"name": "deepspeed"}}, {"peft_config": {"name": "lora"}}, {"model": "Qwen/Qwen3-30B-A3B"}):
        assert "optim_config.name" in read({**values, **other}).unsupported


@pytest.mark.parametrize(
    ("model", "more", "known"),
    [
        ("qwen3-0.6b", {}, True),
        ("qwen3-0.6b", {"offload_params": "cpu"}, False),
        ("qwen3-30b-a3b", {}, False),
        ("llama-3.2-1b", {}, False),
    ],
)
def test_what_of_muon_of_llama_factory_v1_was_rehearsed(model: str, more: dict[str, Any], *, known: bool) -> None:
    job: dict[str, Any] = {
        "method": "full",
        "trainer": "llamafactory-v1",
        "optim": "moonlight_muon",
        "strategy": "fsdp2",
        "gpus": 4,
    }
    assert (peftplan.estimate(model, **job, **more).peaks is not None) is known


@pytest.mark.parametrize(
    ("key", "default", "other", "effect"),
    [
        ("offload_params", False, True, "lowers"),
        ("reshard_after_forward", True, False, "raises"),
        ("cp_size", 1, 2, "unknown"),
    ],
)
def test_what_of_fsdp2_of_llama_factory_v1_is_not_counted(key: str, default: object, other: object, effect: str) -> None:
    """v1/plugins/trainer_plugins/distributed/fsdp2.py:158; it had no effect on what was counted."""
    values = {**LLAMAFACTORY_V1, "dist_config": {"name": "fsdp2", key: default}}
    assert not read(values).unsupported
    plan = read({**values, "dist_config": {"name": "fsdp2", key: other}})
    assert plan.unsupported[f"dist_config.{key}"].effect == effect


@pytest.mark.parametrize(
    ("where", "kernels"),
    [
        ({}, ("axolotl",)),
        ({"fsdp_version": 2}, ("axolotl",)),
        ({"fsdp_version": 2, "fsdp_config": {"fsdp_version": 2}}, ("axolotl",)),
        ({"fsdp_version": 1}, None),
    ],
)
def test_axolotl_leaves_its_kernels_off_under_fsdp1(where: dict[str, Any], kernels: tuple[str, ...] | None) -> None:
    """utils/schemas/config.py:2062 of axolotl 0.19, where several GPUs are found."""
    shards = {"fsdp_config": {"reshard_after_forward": True}, **where} if where else {}
    assert read({**WITH_KERNELS, **shards}).options.get("kernels") == kernels


@pytest.mark.parametrize("finetuning_type", ["full", "freeze", "lora"])
def test_llamafactory_quantizes_for_adapters_alone(finetuning_type: str) -> None:
    """hparams/parser.py:190 of llamafactory 0.9.5; a peak in 16 bits was stated."""
    plan = read({**LLAMAFACTORY, "finetuning_type": finetuning_type, "quantization_bit": 4})
    assert ("quantization_bit" in plan.unsupported) is (finetuning_type != "lora")


def test_llamafactory_v1_quantizes_as_its_plugin_does() -> None:
    """v1/plugins/model_plugins/quantization.py:98 and peft.py:175: what the file leaves out."""
    adapter = {"name": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all"}
    plan = read({**LLAMAFACTORY_V1, "peft_config": adapter, "quant_config": {"name": "bnb", "quantization_bit": 4}})
    assert not plan.unsupported
    stored = {"quant": "nf4", "double_quant": True, "compute_dtype": "fp16", "quant_storage": "fp16"}
    assert plan.options.items() >= {**stored, "method": "lora", "r": 16, "lora_dropout": 0.05}.items()


def test_llamafactory_v1_has_defaults_behind_its_plugins_names() -> None:
    """v1/plugins/model_plugins/peft.py:160, `config.get("target_modules", "all")`, and quantization.py: 4 bits for bnb alone."""
    plan = read({**LLAMAFACTORY_V1, "peft_config": {"name": "lora"}, "quant_config": {"name": "bnb"}})
    assert plan.options.items() >= {"target_modules": "all-linear", "quant": "nf4", "double_quant": True}.items()
    automatic = read({**LLAMAFACTORY_V1, "peft_config": {"name": "lora"}, "quant_config": {"name": "auto"}})
    assert "quant" not in automatic.options
    adapter = {"peft_config": {"name": "lora"}}
    single = read(
        {**LLAMAFACTORY_V1, **adapter, "quant_config": {"name": "bnb", "quantization_bit": 4, "double_quantization": False}}
    )
    assert single.options["double_quant"] is False
    adapted = read({**LLAMAFACTORY_V1, "peft_config": {"name": "lora", "target_modules": "q_proj"}})
    assert adapted.options["target_modules"] == "q_proj"


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        ("Qwen/Qwen3-VL-4B-Instruct", 16_515_072),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 14_966_784),
        ("google/gemma-3-4b-it", 14_901_248),
        ("llava-hf/llava-1.5-7b-hf", 19_988_480),
        ("meta-llama/Llama-3.2-11B-Vision", 26_214_400),
        ("Qwen/Qwen3-4B", 16_515_072),
        ("google/gemma-4-E4B-it", 19_439_616),
        ("google/gemma-4-26B-A4B", 9_999_360),  # routers have a projection
        ("Qwen/Qwen3.5-4B", 16_232_448),
        ("Qwen/Qwen3.5-35B-A3B", 11_238_720),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", 6_684_672),
        ("OpenGVLab/InternVL3-2B-hf", 9_232_384),
        ("meta-llama/Llama-4-Scout-17B-16E", 27_918_336),
    ],
)
def test_all_means_the_language_model(model: str, trained: int) -> None:
    """Counted of rank 8 from the names that `find_all_linear_modules` and `patch_target_modules` of llamafactory 0.9.5 gave for
    these models on the meta device; Qwen3 4B has the layers of Qwen3-VL 4B."""
    plan = read({**LLAMAFACTORY, "model_name_or_path": model, "lora_target": "all", "lora_rank": 8})
    assert peftplan.estimate(config=plan).trainable_parameters == trained


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen3-VL-4B-Instruct", 4_022_468_096),
        ("google/gemma-3-4b-it", 3_880_263_168),
        ("Qwen/Qwen3.5-4B", 4_205_751_296),
        ("google/gemma-4-E4B-it", 7_463_013_376),
        ("OpenGVLab/InternVL3-2B-hf", 1_776_283_136),
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", 23_572_403_200),
        ("meta-llama/Llama-3.2-11B-Vision", 9_775_192_080),
        ("meta-llama/Llama-4-Scout-17B-16E", 107_769_861_120),
    ],
)
def test_full_fine_tuning_trains_the_language_model_alone(model: str, trained: int) -> None:
    """Parameters of these models on the meta device whose names hold none of what `get_forbidden_modules` of llamafactory 0.9.5
    gave; towers and projectors are frozen by default."""
    plan = read({**LLAMA_FACTORY_FULL, "model_name_or_path": model, "pure_bf16": True})
    assert peftplan.estimate(config=plan).trainable_parameters == trained
    for other in ("freeze_vision_tower", "freeze_multi_modal_projector"):
        assert other in read({**LLAMA_FACTORY_FULL, "model_name_or_path": model, other: False}).unsupported


def test_what_trains_of_a_vision_language_model_is_cast_to_fp32() -> None:
    """model/adapter.py:52: the tower stays in bf16."""
    model = "Qwen/Qwen2.5-VL-3B-Instruct"
    result = peftplan.estimate(config=read({**LLAMA_FACTORY_FULL, "model_name_or_path": model, "bf16": True}))
    weights = sum(line.bytes() for line in result.ledger if line.category == "weights")
    assert weights == pytest.approx(4 * 3_085_938_688 + 2 * (3_754_622_976 - 3_085_938_688), rel=1e-4)


def test_all_linear_is_no_word_of_llama_factory() -> None:
    """It splits `lora_target` at commas, and peft raises: "Target modules {'all-linear'} not found in the base model."."""
    plan = read({**LLAMAFACTORY, "lora_target": "all-linear"})
    assert plan.refused["lora_target"].instead == {"lora_target": "all"}


@pytest.mark.parametrize(("stage", "refused"), [("z2", False), ("z3", True)])
def test_a_batch_without_a_picture_gets_one(stage: str, *, refused: bool) -> None:
    """data/collator.py:347: ZeRO-3 gathers the tower for it, which nothing counts."""
    plan = read(
        {
            **LLAMAFACTORY,
            "model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
            "deepspeed": f"examples/deepspeed/ds_{stage}_config.json",
        }
    )
    assert ("deepspeed" in plan.unsupported) is refused


@pytest.mark.parametrize(("model", "replaced"), [("Qwen/Qwen3-8B", False), ("Qwen/Qwen3-30B-A3B", True), ("me/unknown", True)])
def test_kernels_of_v1_that_run_on_cuda_replace_experts_alone(model: str, replaced: bool) -> None:
    """One of five registers on CUDA, and looks for experts (v1/plugins/model_plugins/kernels/ops/mlp/cuda_fused_moe.py). Only
    without checkpoints it matters for Qwen 3's."""
    job = {**LLAMA_FACTORY_FULL, "model_name_or_path": model, "use_v1_kernels": True}
    plan = read(job | {"disable_gradient_checkpointing": True})
    assert ("use_v1_kernels" in plan.unsupported) is replaced


def test_settings_of_axolotl_that_leave_the_tensors_as_they_are() -> None:
    """xformers 0.0.35 has no `swiglu_packedw`; LoftQ fills the tensors of LoRA; Hatchery loads a stub of the model."""
    fused = read({**AXOLOTL, "adapter": None, "flash_attn_fuse_mlp": True})
    loft = read({**AXOLOTL, "peft": {"loftq_config": {"loftq_bits": 4}}})
    assert (fused.unsupported, loft.unsupported) == ({}, {})
    remote = read({**AXOLOTL, "plugins": ["axolotl.integrations.hatchery.HatcheryPlugin"], "hatchery": {"backend": "tinker"}})
    assert remote.kind == "other"


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"attn_implementation": "sdpa"}, False),
        ({"attn_implementation": "sdpa", "sdpa_varlen": False}, True),
        ({"attn_implementation": "sdpa", "base_model": "mistralai/Mistral-7B-v0.1"}, True),
        ({"attn_implementation": "flash_attention_2"}, True),
    ],
)
def test_packed_rows_under_sdpa_run_a_kernel_of_their_own(values: dict[str, Any], known: bool) -> None:
    """`_apply_sdpa_varlen_patch` of axolotl 0.19: not of models with a sliding window."""
    plan = read({**AXOLOTL, "sample_packing": True, **values})
    assert ("sample_packing" not in plan.unsupported) is known


@pytest.mark.parametrize(
    ("model", "names", "trained"),
    [
        ("google/gemma-3-4b-it", "q_proj,k_proj, v_proj,o_proj,gate_proj,up_proj,down_proj", 14_901_248),
        (
            "Qwen/Qwen2.5-VL-3B-Instruct",
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            14_966_784,
        ),
        ("google/gemma-3-4b-it", "q_proj,v_proj", 34 * 8 * (2560 + 2048 + 2560 + 1024)),
        ("Qwen/Qwen3-4B", "q_proj,v_proj", 36 * 8 * (2560 + 4096 + 2560 + 1024)),
    ],
)
def test_names_of_targets_are_those_of_the_language_model(model: str, names: str | list[str], trained: int) -> None:
    """`patch_target_modules` of llamafactory 0.9.5: vision layers have projections of the same names."""
    plan = read({**LLAMAFACTORY, "model_name_or_path": model, "lora_target": names, "lora_rank": 8})
    assert peftplan.estimate(config=plan).trainable_parameters == trained


def test_fp8_by_torchao_has_no_effect_under_deepspeed() -> None:
    """train/fp8_utils.py:181 warns of it; a rehearsal held the bytes of bf16 (tests/rehearse/llamafactory.jsonl)."""
    full = {**LLAMA_FACTORY_FULL, "bf16": True, "deepspeed": "examples/deepspeed/ds_z3_fp8_config.json"}
    plain, wanted = (read({**full, **values}) for values in ({}, {"fp8": True, "fp8_backend": "torchao"}))
    assert not wanted.unsupported
    assert wanted.options == plain.options
    for other in ({"fp8": True, "fp8_backend": "te"}, {"fp8": True, "deepspeed": None}):
        assert "fp8" in read({**full, **other}).unsupported


def test_fp8_by_torchao_has_no_effect_under_fsdp() -> None:
    """The class is read only inside fsdp_config, where it is moved; transformers before 5.10 runs FSDP1 there. Reserved bytes of
    the rehearsed job are 22 % more than those of the replay."""
    of_llama = {**LLAMA_FACTORY_FULL, "model_name_or_path": "meta-llama/Llama-3.2-1B"}
    values = {**of_llama, "bf16": True, "fp8": True, "fp8_backend": "torchao", "fsdp": ["full_shard", "auto_wrap"]}
    plan = read({**values, "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"})
    assert (plan.unsupported, [*plan.refused]) == ({}, ["fsdp_transformer_layer_cls_to_wrap"])
    assert (plan.options["strategy"], plan.options["transformer_cls_names_to_wrap"]) == ("fsdp1", ("LlamaDecoderLayer",))
    moved = {**values, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
    assert read(moved).options == plan.options
    entry = of_plan(plan)
    assert (entry.peak_allocated is None, entry.peak_reserved) == (False, None)
    for whole in ({"fsdp": ["full_shard"]}, {"fsdp": True}, {"fsdp_config": {"min_num_params": 1_000_000}}):
        assert "fsdp" in read({**values, **whole}).unsupported
    other = read({**values, "fsdp_transformer_layer_cls_to_wrap": "MistralDecoderLayer"})
    assert "fsdp_transformer_layer_cls_to_wrap" in other.unsupported


def test_eaft_is_weighed_behind_the_cross_entropy() -> None:
    """Beside logits and log-probabilities of 8 x 512 tokens in fp32 the logits of those that are scored, all but one of a row."""
    plan = read({**LLAMA_FACTORY_FULL, "use_eaft_loss": True, "cutoff_len": 512, "bf16": True})
    assert not plan.unsupported
    peaks = peftplan.estimate(config=plan).peaks
    assert peaks is not None
    of_logits = {line.name: line.bytes() for line in peaks.ledgers["forward"] if line.shape[-1:] == (151_936,)}
    assert [of_logits[name] for name in ("to", "log_softmax", "index")] == [8 * n * 151_936 * 4 for n in (512, 512, 511)]


@pytest.mark.parametrize("values", [LLAMAFACTORY, LLAMA_FACTORY_FULL], ids=["lora", "full"])
def test_an_older_accelerate_prepares_a_model_for_fsdp2(values: dict[str, Any]) -> None:
    """Release 0.9.5 needs accelerate 1.11, which casts all weights to fp32 and makes no unit of the embedding
    (utils/fsdp_utils.py, `fsdp2_prepare_model`): LoRA was counted with half the bytes of its base."""
    fsdp = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}, "use_reentrant_gc": False, "bf16": True}
    plan = read({**values, **fsdp})
    result = peftplan.estimate(config=plan, gpus=4)
    assert result.distributed is not None
    assert result.distributed.strategy.accelerate == "1.11"
    if values is LLAMAFACTORY:
        assert result.peaks is not None
        pinned = peftplan.estimate(config=plan, gpus=4, accelerate="1.11").peaks
        assert pinned is not None
        assert result.peaks.by_phase == pinned.by_phase
    else:  # its weights are in fp32, which was not rehearsed
        assert "a release before accelerate 1.14" in result.not_modelled[0]
    assert peftplan.estimate(config=plan, gpus=4, accelerate="1.15").peaks is not None


def test_an_older_accelerate_by_options() -> None:
    job: dict[str, Any] = {"trainer": "llamafactory", "method": "full", "strategy": "fsdp2", "gpus": 4}
    assert "a release before accelerate 1.14" in peftplan.estimate("qwen2.5-3b", **job).not_modelled[0]


@pytest.mark.parametrize(
    ("changed", "raised"),
    [
        ({}, False),
        ({"quantization_bit": 4}, True),
        ({"quantization_bit": 8}, True),
        ({"model_name_or_path": "unsloth/llama-3-8b-Instruct-bnb-4bit"}, True),
        ({"quantization_bit": 4, "adapter_name_or_path": "saves/first"}, False),
    ],
)
def test_dora_over_quantized_weights_raises(changed: dict[str, object], raised: bool) -> None:
    """llamafactory 0.9.5, model/adapter.py:218: `bitsandbytes`, by transformers, is not its own `bnb`. Rehearsed: ValueError. An
    adapter that trains on over quantized weights is not made anew (model/adapter.py:165), and so not asked."""
    plan = read({**LLAMAFACTORY, **changed, "use_dora": True})
    assert ("use_dora" in plan.unsupported) is raised


def test_rays_workers_are_no_generation() -> None:
    assert "Ray" in read({**LLAMAFACTORY, "ray_num_workers": 4}).ignored["ray_num_workers"].why


@pytest.mark.parametrize(
    ("length", "stage", "tokens"), [(1001, "sft", 1008), (1001, "dpo", 1008), (1001, "pt", 1001), (1000, "sft", 1000)]
)
def test_rows_are_padded_to_a_multiple_of_eight(length: int, stage: str, tokens: int) -> None:
    """`pad_to_multiple_of=8` of the collators but that of pre-training (0.9.5, train/sft/workflow.py:65)."""
    options = read({**LLAMAFACTORY, "stage": stage, "cutoff_len": length}).options
    assert (options["seq_len"], bool(options.get("padding"))) == (tokens, length < tokens)


@pytest.mark.parametrize(("more", "runs"), [({}, False), ({"enable_liger_kernel": True}, True), ({"cutoff_len": 1504}, True)])
def test_positions_of_packed_rows_are_not_padded(more: dict[str, Any], runs: bool) -> None:
    """0.9.5 rehearsed: 1,504 tokens do not match 1,501 positions. Liger's kernel does not compare them."""
    plan = read({**LLAMAFACTORY, "packing": True, "cutoff_len": 1501, **more})
    assert ("cutoff_len" in plan.unsupported) is not runs


@pytest.mark.parametrize(("model", "has_own"), [("tiiuae/falcon-7b", True), ("Qwen/Qwen3-0.6B", False)])
@pytest.mark.parametrize("values", [LLAMAFACTORY, LLAMAFACTORY_V1], ids=["v0", "v1"])
def test_code_beside_the_weights_is_assumed_away(values: dict[str, Any], model: str, has_own: bool) -> None:
    key = "model" if "model" in values else "model_name_or_path"
    assert ("trust_remote_code" in read({**values, key: model, "trust_remote_code": True}).assumed) is has_own


@pytest.mark.parametrize(("rows", "bound"), [(1, set()), (4, {"eval_on_start"})])
def test_an_evaluation_on_start_makes_a_lower_bound(rows: int, bound: set[str]) -> None:
    """transformers 5.24.0, trainer.py:1655: whatever eval_strategy says."""
    plan = read({**LLAMAFACTORY, "val_size": 0.1, "eval_on_start": True, "per_device_eval_batch_size": rows})
    assert plan.unsupported.keys() == bound

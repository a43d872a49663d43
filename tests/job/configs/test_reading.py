"""What files of each tool mean, read by hand in the tool's source (versions and lines in `data/configs`)."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import RefusedError
from peftplan.job.configs.plan import Unsupported, bound
from peftplan.job.configs.read import read_values
from peftplan.planning.configs import of_plan
from peftplan.report.configs import summary
from tests.job.configs.files import AXOLOTL, LLAMAFACTORY, LLAMAFACTORY_V1, SWIFT, TORCHTUNE, TRL, read


@pytest.mark.parametrize(
    ("values", "tool", "expected"),
    [
        (
            AXOLOTL,
            "axolotl",
            {
                "method": "qlora", "quant": "nf4", "double_quant": True, "compute_dtype": "bf16", "kbit_prepare": False, "r": 32,
                "target_modules": "all-linear", "batch_size": 2, "seq_len": 4096, "optim": "paged_adamw_8bit", "dtype": "bf16",
                "autocast": "bf16", "gradient_checkpointing": True, "attn_implementation": "flash_attention_2",
            },
        ),
        # packing: one row of micro_batch_size × sequence_len
        ({**AXOLOTL, "sample_packing": True}, "axolotl", {"batch_size": 1, "seq_len": 8192}),
        # rows are padded up to a multiple of 64
        ({**AXOLOTL, "sequence_len": 900}, "axolotl", {"batch_size": 2, "seq_len": 960, "padding": True}),
        ({**AXOLOTL, "sequence_len": 900, "sample_packing": True}, "axolotl", {"batch_size": 1, "seq_len": 1920}),
        ({**AXOLOTL, "sequence_len": 900, "pad_to_sequence_len": False}, "axolotl", {"batch_size": 2, "seq_len": 900}),
        ({**AXOLOTL, "base_model": "google/gemma-4-E2B-it"}, "axolotl", {"use_reentrant": False}),
        # the sequence, the batch, the optimizer and checkpointing that axolotl's schema has by default
        (
            {"base_model": "gpt2", "adapter": None, "datasets": []},
            "axolotl",
            {"method": "full", "seq_len": 512, "batch_size": 1, "optim": "adamw_torch_fused", "gradient_checkpointing": False},
        ),
        # only adapter: qlora quantizes to 4 bits
        ({**AXOLOTL, "adapter": "lora"}, "axolotl", {"method": "lora", "quant": None}),
        ({**AXOLOTL, "adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, "axolotl", {"quant": "int8"}),
        (
            LLAMAFACTORY,
            "llamafactory",
            {
                "method": "lora", "r": 8, "target_modules": "all-linear", "seq_len": 1024, "batch_size": 1, "autocast": "bf16",
                "gradient_checkpointing": True, "use_reentrant": True, "lora_dropout": 0.0,
            },
        ),
        ({**LLAMAFACTORY, "finetuning_type": "full"}, "llamafactory", {"method": "full", "dtype": "fp32", "autocast": "bf16"}),
        (
            {**LLAMAFACTORY, "finetuning_type": "full", "pure_bf16": True, "bf16": False},
            "llamafactory",
            {"method": "full", "dtype": "auto", "autocast": "none"},
        ),
        (
            {**LLAMAFACTORY, "quantization_bit": 4},
            "llamafactory",
            {"quant": "nf4", "double_quant": True, "kbit_prepare": False, "compute_dtype": "bf16"},
        ),
        ({**LLAMAFACTORY, "finetuning_type": "full", "use_dft_loss": True}, "llamafactory", {"loss": "per-token"}),
        (
            {**LLAMAFACTORY, "finetuning_type": "oft", "oft_block_size": 64},
            "llamafactory",
            {"method": "oft", "oft_block_size": 64, "target_modules": "all-linear"},
        ),
        (  # 2,862,720 parameters of five layers of Qwen2.5 1.5B trained, those of all linear layers, whatever oft_target was
            {
                **LLAMAFACTORY,
                "finetuning_type": "oft",
                "oft_target": "q_proj",
                "lora_target": "v_proj",
                "additional_target": "lm_head",
            },
            "llamafactory",
            {"method": "oft", "oft_block_size": 32, "target_modules": "v_proj", "modules_to_save": "lm_head"},
        ),
        # v1: without include_kernels its kernels replace nothing; padding-free rows are one
        (
            LLAMAFACTORY_V1,
            "llamafactory-v1",
            {
                "trainer": "llamafactory-v1", "method": "full", "optim": "adamw_torch", "strategy": "fsdp2",
                "gpus": 8, "batch_size": 2, "seq_len": 2048, "gradient_checkpointing": True,
            },
        ),
        (
            {**LLAMAFACTORY_V1, "batching_strategy": "dynamic_padding_free", "flash_attn": "flash_attention_2"},
            "llamafactory-v1",
            {"batch_size": 1, "seq_len": 4096, "attn_implementation": "flash_attention_2"},
        ),
        # TRL's command line loads in fp32, targets what peft has by default, and quantizes once
        (
            TRL,
            "trl",
            {
                "trainer": "trl", "method": "lora", "dtype": "fp32", "autocast": "bf16", "r": 16, "lora_dropout": 0.05,
                "target_modules": "peft-default", "quant": "nf4", "double_quant": False, "seq_len": 1024, "batch_size": 8,
            },
        ),
        (
            TORCHTUNE,
            "torchtune",
            {
                "trainer": "torchtune", "dtype": "bf16", "adapter_dtype": "bf16", "autocast": "none", "r": 8, "batch_size": 2,
                "target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                "optim": "adamw_torch_fused", "gradient_checkpointing": True, "loss": "full",
            },
        ),
        (SWIFT, "swift", {"method": "lora", "r": 8, "target_modules": "all-linear", "batch_size": 1, "autocast": "bf16"}),
        ({**SWIFT, "quant_method": "bnb", "quant_bits": 4}, "swift", {"quant": "nf4", "double_quant": True}),
    ],
)  # fmt: skip
def test_options(values: dict[str, Any], tool: str, expected: dict[str, Any]) -> None:
    plan = read(values)
    assert plan.tool == tool
    assert {name: plan.options.get(name) for name in expected} == expected


def test_full_fine_tuning_leaves_the_adapters_fields_out() -> None:
    plan = read({**LLAMAFACTORY, "finetuning_type": "full", "lora_rank": 64})
    assert {"r", "lora_dropout", "target_modules"} & plan.options.keys() == set()
    assert plan.read["lora_rank"].option == ""


def test_a_command() -> None:
    plan = read({"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "full"}, kind="command", program="swift sft")
    assert (plan.tool, plan.options["method"]) == ("swift", "full")


def test_the_file_and_its_options_ask_the_same() -> None:
    """Options typed by hand for the same job give the same estimate, to the byte."""
    by_file = peftplan.estimate(config=read(AXOLOTL))
    by_hand = peftplan.estimate(
        "llama-3.1-8b", method="qlora", r=32, quant="nf4", double_quant=True, compute_dtype="bf16", quant_storage="bf16",
            kbit_prepare=False, target_modules="all-linear", batch_size=2, seq_len=4096, optim="paged_adamw_8bit", dtype="bf16",
            autocast="bf16", gradient_checkpointing=True, use_reentrant=False,
            attn_implementation="flash_attention_2", trainer="axolotl",
        )  # fmt: skip
    assert by_file.peaks == by_hand.peaks
    assert by_file.trainable_parameters == by_hand.trainable_parameters
    assert by_file.bound is None


def test_the_user_wins_over_the_file_and_the_file_over_the_tool() -> None:
    result = peftplan.estimate("qwen2.5-0.5b", config=read(AXOLOTL), seq_len=1024, method="full")
    assert result.model["name"] == "qwen2.5-0.5b"
    assert (result.assumptions["seq_len"], result.assumptions["batch_size"]) == (1024, 2)
    assert result.method["name"] == "full"
    assert result.assumptions["quant"] == "none"


@pytest.mark.parametrize(
    ("file", "options"),
    [
        (AXOLOTL, {"method": "lora"}),
        (AXOLOTL, {"method": "lora", "quant": "none"}),
        ({**AXOLOTL, "adapter": "lora"}, {"quant": "none"}),
    ],
)
def test_lora_in_place_of_qlora_has_a_base_in_16_bits(file: dict[str, Any], options: Any) -> None:
    """As a file that asks for LoRA has."""
    other = peftplan.estimate(config=read({**AXOLOTL, "adapter": "lora", "load_in_4bit": False}))
    result = peftplan.estimate(config=read(file), **options)
    assert (result.peaks, result.assumptions["quant"]) == (other.peaks, "none")


def test_a_method_and_a_format_of_the_user_keep_their_base() -> None:
    result = peftplan.estimate(config=read(AXOLOTL), method="lora", quant="nf4")
    assert (result.peaks, result.assumptions["quant"]) == (peftplan.estimate(config=read(AXOLOTL)).peaks, "nf4")


def test_defaults_are_the_tools() -> None:
    values = {name: value for name, value in AXOLOTL.items() if name != "optimizer"}
    result = peftplan.estimate(config=read(values))
    assert result.config is not None
    assert result.config["defaults"]["optim"].startswith("axolotl 0.21.0, utils/schemas/training.py:")
    assert "optim" not in result.chosen


BOUNDS: dict[str, Unsupported] = {
    "lower": Unsupported(1, "", "lowers"), "raise": Unsupported(1, "", "raises"), "open": Unsupported(1, "", "unknown"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), None),
        (("lower",), "at_most"),
        (("raise",), "at_least"),
        (("lower", "raise"), "unknown"),
        (("lower", "open"), "unknown"),
    ],
)
def test_directions(keys: tuple[str, ...], expected: str | None) -> None:
    assert bound({key: BOUNDS[key] for key in keys}) == expected


def test_a_key_that_lowers_the_peak_makes_it_an_upper_bound() -> None:
    values = {**AXOLOTL, "chunked_cross_entropy": True}
    result = peftplan.estimate(config=read(values), gpu=("a100-80gb", "16GiB"))
    assert result.bound == "at_most"
    assert [card.verdict for card in result.gpus] == ["fits", "unknown"]
    assert result.to_dict()["config"]["unsupported"]["chunked_cross_entropy"]["effect"] == "lowers"


def test_an_option_takes_the_place_of_its_key() -> None:
    values = {**AXOLOTL, "chunked_cross_entropy": True}
    assert peftplan.estimate(config=read(values), loss="full").bound is None


@pytest.mark.parametrize(("values", "loss"), [({}, "eaft"), ({"eaft_k": 20}, "eaft"), ({"eaft_k": 50}, None)])
def test_axolotl_weighs_tokens_by_entropy(values: dict[str, Any], loss: str | None) -> None:
    plan = read({**AXOLOTL, "use_eaft": True, **values})
    assert (plan.options.get("loss"), "use_eaft" in plan.unsupported) == (loss, loss is None)


EBFT: dict[str, Any] = {
    **AXOLOTL,
    "adapter": "lora",
    "load_in_4bit": False,
    "rl": "ebft",
    "ebft": {"feature_layers": [0.25, 0.5, 0.75], "embed_method": "last_token", "use_whitening": False, "ce_coef": 0.0},
    "trl": {"num_generations": 4, "max_completion_length": 128, "use_vllm": False, "loss_type": "grpo"},
}


def test_axolotls_ebft_on_prompts_is_a_trainer_that_reads_features() -> None:
    plan = read(EBFT)
    assert plan.unsupported == {}
    assert (plan.options["trainer"], plan.options["max_completion_length"]) == ("axolotl-ebft", 128)
    assert any("cuts no prompts" in words for words in plan.assumed.values())
    for other in ({"embed_method": "concat"}, {"use_whitening": True}, {"mode": "strided"}, {"feature_layers": [0.5]}):
        assert "rl" in read({**EBFT, "ebft": {**EBFT["ebft"], **other}}).unsupported
    assert "rl" in read({**EBFT, "adapter": None}).unsupported
    assert "rl" in read({**EBFT, "rl_beta": 0.1}).unsupported


def test_axolotls_ebft_in_strides_writes_eight_tokens_behind_every_eight() -> None:
    """31 anchors in 256 tokens: (256 - 8 - 8) // 8 + 1 (axolotl 0.19.0, core/trainers/ebft/strided.py:616)."""
    strided = {**EBFT["ebft"], "mode": "strided", "use_whitening": True}
    documents = [{"path": "a", "type": "ebft_pretrain.transform"}]
    values = {**EBFT, "ebft": strided, "datasets": documents, "sequence_len": 256, "gradient_checkpointing": True, "trl": None}
    plan = read(values)
    assert plan.unsupported == {}
    assert (plan.options["trainer"], plan.options["seq_len"]) == ("axolotl-ebft-strided", 256 + 31 * 8)
    assert plan.options["max_completion_length"] == 31 * 8
    full = read({**values, "adapter": None, "attn_implementation": None, "flash_attention": None})
    assert full.options["trainer"] == "axolotl-ebft-strided-full"
    for other in ({"stride": 4}, {"top_p": 0.9}, {"n_samples_per_prompt": 8}):
        assert "rl" in read({**values, "ebft": {**strided, **other}}).unsupported


def test_axolotls_ebft_on_completions_with_a_cross_entropy() -> None:
    """Behind a prompt of up to 8 tokens, and 8 more (`min_completion_prefix`), 30 anchors in 256 tokens."""
    strided = {**EBFT["ebft"], "mode": "strided", "use_whitening": True, "ce_coef": 0.03, "min_completion_prefix": 8}
    documents = [{"path": "a", "type": "ebft_strided_structured.transform"}]
    values = {**EBFT, "ebft": strided, "datasets": documents, "sequence_len": 256, "gradient_checkpointing": True, "trl": None}
    plan = read({**values, "flash_attention": None, "attn_implementation": "flex_attention"})
    assert plan.unsupported == {}
    assert (plan.options["trainer"], plan.options["max_completion_length"]) == ("axolotl-ebft-strided-scored", 30 * 8)
    assert plan.options["seq_len"] == 256 + 30 * 8
    assert "at most 8 tokens" in plan.assumed["max_completion_length"]
    for other in ({"min_completion_prefix": 4}, {"n_samples_per_prompt": 8}):
        assert "rl" in read({**values, "ebft": {**strided, **other}}).unsupported


@pytest.mark.parametrize("rl", ["grpo", "gdpo"])
def test_axolotls_grpo_reads_its_reference_in_fp32(rl: str) -> None:
    values = {**AXOLOTL, "adapter": None, "load_in_4bit": False, "rl": rl, "sample_packing": False}
    values["trl"] = {
        "beta": 0.001,
        "num_generations": 2,
        "max_completion_length": 128,
        "use_vllm": False,
        "reward_funcs": ["a.b"],
    }
    plan = read(values)
    assert plan.unsupported == {}
    assert (plan.options["trainer"], plan.options["beta"], plan.options["num_generations"]) == ("axolotl-grpo", 0.001, 2)
    for other in ({"adapter": "lora"}, {"trl": {**values["trl"], "use_vllm": True}}):
        assert "rl" in read({**values, **other}).unsupported
    assert "GRPOTrainer of axolotl" in peftplan.estimate("llama-3.2-1b", trainer="axolotl-grpo").not_modelled[0]


def test_axolotls_lisa_draws_layers() -> None:
    values = {**AXOLOTL, "adapter": None, "load_in_4bit": False, "lisa_n_layers": 4, "lisa_step_interval": 20}
    values["lisa_layers_attribute"] = "model.layers"
    plan = read(values)
    assert plan.unsupported == {}
    assert (plan.options["method"], plan.options["n_layers"]) == ("lisa", 4)
    assert "lisa_step_interval" in read({**values, "lisa_layers_attribute": "model.model.layers"}).unsupported


def test_packed_rows_of_nemotron_h_run_kernels() -> None:
    """axolotl's README of the model has people install mamba-ssm, so the file runs; without it the tool raises RuntimeError. Of
    its projections in 4 bits it was rehearsed (tests/rehearse/axolotl_mixers.jsonl)."""
    over_4_bits = {**AXOLOTL, "base_model": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "sample_packing": True}
    values = {**over_4_bits, "adapter": "lora", "load_in_4bit": False}
    why = read(values).unsupported["sample_packing"].why
    assert "mamba-ssm" in why
    assert "raises" not in why
    assert "sample_packing" not in read({**values, "use_kernels": True}).unsupported
    assert "sample_packing" not in read(over_4_bits).unsupported
    assert read(over_4_bits).options["kernels"] == ("mamba-ssm",)


def test_axolotls_ebft_writes_by_a_server_of_vllm() -> None:
    """trl's own default is an engine on the same card; axolotl 0.19.0, utils/schemas/validation.py:2066, sets `server`."""
    values = {**EBFT, "trl": {**EBFT["trl"], "use_vllm": True}}
    assert read(values).options["vllm_mode"] == "server"
    (card,) = peftplan.estimate(config=read(values), gpu="a100-80gb").gpus
    assert card.vllm_bytes == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"bf16": None}, ("fp32", "none")),
        ({"bf16": False}, ("fp32", "none")),
        ({"bf16": False, "fp16": True}, ("fp16", "fp16")),
        ({"bf16": False, "float16": True}, ("fp16", "none")),
        ({"bf16": False, "bfloat16": True}, ("bf16", "bf16")),
        ({"bf16": False, "adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, ("fp16", "none")),
    ],
)
def test_axolotl_without_bf16(values: dict[str, Any], expected: tuple[str, str]) -> None:
    """axolotl 0.19.0, utils/config/__init__.py:198, as `resolve_dtype` gave it for the first: 32 bits where no key states 16."""
    options = read({**AXOLOTL, **values}).options
    assert (options["dtype"], options["autocast"]) == expected


MIRROR = {"base_model": "alpindale/Llama-3.2-11B-Vision-Instruct"}


@pytest.mark.parametrize(
    ("values", "key", "place"),
    [
        ({"base_model": "MiniMaxAI/MiniMax-M2", "use_scattermoe": True}, "use_scattermoe", "quantizer_finegrained_fp8.py:195"),
        ({**MIRROR, "lora_mlp_kernel": None}, "lora_qkv_kernel", "monkeypatch/lora_kernels.py:327"),
    ],
)
def test_axolotl_raises_for_a_model_and_a_copy_of_it(values: dict[str, Any], key: str, place: str) -> None:
    """Rehearsed: the one with its repository in fp8, the other under its own name."""
    plan = read({**AXOLOTL, "adapter": "lora", **values})
    assert place in {**plan.unsupported, **plan.refused}[key].why


def test_axolotl_pins_an_optimum_that_loads_no_gptq() -> None:
    """1.16.2, as run: transformers' quantizer imports it first, and would ask for 1.24 and gptqmodel next."""
    assert " raises ImportError" in read({**AXOLOTL, "gptq": True}).unsupported["gptq"].why
    assert "gptq" in read({**AXOLOTL, "gptq": False}).ignored


def test_a_file_with_which_the_tool_raises_is_read_with_the_change_that_runs() -> None:
    """LoRA kernels that assert that they know the code of the attention, and a key that is no longer there."""
    values = {"base_model": "allenai/Olmo-3-7B-Instruct-SFT", "flash_attn_rms_norm": True, "lora_mlp_kernel": None}
    plan = read({**AXOLOTL, **values})
    switches = {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    assert {key: row.instead for key, row in plan.refused.items()} == {
        "flash_attn_rms_norm": {"flash_attn_rms_norm": None}, "lora_qkv_kernel": switches,
    }  # fmt: skip
    changed = {key: value for key, value in values.items() if key != "flash_attn_rms_norm"} | switches
    assert plan.options == read({**AXOLOTL, **changed}).options
    norms, kernels = plan.warnings()
    assert norms.endswith("the numbers are those without flash_attn_rms_norm")
    assert kernels.endswith("with lora_mlp_kernel: false, lora_qkv_kernel: false, lora_o_kernel: false")
    assert peftplan.estimate(config=plan).warnings[:2] == plan.warnings()
    assert of_plan(plan).refused == f"{norms}; {kernels}"
    with pytest.raises(RefusedError, match=r"no longer has fused norms .*; it runs without flash_attn_rms_norm$"):
        peftplan.estimate(config=plan, strict=True)


def test_an_option_takes_the_place_of_a_key_with_which_the_tool_raises() -> None:
    values = {"base_model": "EleutherAI/gpt-j-6b", "sequence_len": 512, "attn_implementation": "xformers"}
    plan = read({**AXOLOTL, **values, "lora_mlp_kernel": False})
    assert peftplan.estimate(config=plan).warnings[:1] == plan.warnings()
    chosen = peftplan.estimate(config=plan, attn_implementation="eager")
    assert chosen.config is not None
    assert (chosen.config["refused"], [text for text in chosen.warnings if "raises" in text]) == ({}, [])


def test_gemma_3_runs_flash_attention_in_the_transformers_that_a_tool_pins() -> None:
    """axolotl 0.19 pins transformers 5.16; 5.24 took FlashAttention from classes that read images (`FLASH_BESIDE_IMAGES`)."""
    values = {**AXOLOTL, "base_model": "google/gemma-3-4b-it", "attn_implementation": "flash_attention_2"}
    assert peftplan.estimate(config=read(values)).total_parameters > 4_300_079_472
    with pytest.raises(RefusedError, match="no flash_attention_2"):
        peftplan.estimate("gemma-3-4b-it", attn_implementation="flash_attention_2")
    peftplan.estimate("gemma-3-4b-it", attn_implementation="flash_attention_2", script=peftplan.Script(transformers="5.23.0"))


@pytest.mark.parametrize(("model", "knows"), [("Qwen/Qwen3-8B", True), ("google/gemma-4-E2B-it", False)])
def test_fused_attention_is_known_in_qwen_3(model: str, knows: bool) -> None:
    values = {"fused_attn_kernel": True, "attn_implementation": "flash_attention_2"}
    plan = read({**AXOLOTL, "base_model": model, **values})
    assert ("fused_attn_kernel" not in plan.unsupported, "axolotl-fused" in plan.options.get("kernels", ())) == (knows, knows)


def test_fused_attention_does_without_ligers_rotation() -> None:
    values = {"fused_attn_kernel": True, "attn_implementation": "flash_attention_2", "liger_rope": True}
    plan = read({**AXOLOTL, "base_model": "Qwen/Qwen3-8B", "plugins": ["axolotl.integrations.liger.LigerPlugin"], **values})
    assert plan.unsupported.keys() == {"fused_attn_kernel"}
    assert peftplan.estimate(config=plan).peaks is not None


@pytest.mark.parametrize(("values", "gpus"), [({"ray_num_workers": 4}, 4), ({}, 1), ({"use_ray": False}, 8)])
def test_ray_starts_as_many_processes_as_it_has_workers(values: dict[str, Any], gpus: int) -> None:
    """axolotl 0.19.0, cli/train.py:126; utils/schemas/integrations.py:168: one by default."""
    plan = read({**AXOLOTL, "deepspeed": "deepspeed_configs/zero2.json", "use_ray": True, **values})
    assert plan.options["gpus"] == gpus


@pytest.mark.parametrize("deepspeed", ["deepspeed_configs/zero3_bf16.json", {"zero_optimization": {"stage": 3}}])
def test_cut_cross_entropy_fails_under_zero3(deepspeed: object) -> None:
    """Rehearsed with DeepSpeed 0.18.9 and 0.19.8: gpt-oss of 2 layers, and Qwen2.5 0.5B, over 8 GPUs."""
    values = {**AXOLOTL, "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"], "deepspeed": deepspeed}
    full = read({key: value for key, value in values.items() if key not in ("adapter", "load_in_4bit")})
    assert " raises RuntimeError" in full.refused["cut_cross_entropy"].why
    assert " raises " not in read(values).unsupported["cut_cross_entropy"].why


@pytest.mark.parametrize(
    ("values", "loss"),
    [
        ({}, "cut-cross-entropy"),
        ({"cut_cross_entropy": False}, None),
        ({"rl": "dpo"}, None),
        ({"deepspeed": "deepspeed_configs/zero2.json"}, "cut-cross-entropy"),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "cut-cross-entropy"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, None),
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, None),
    ],
)
def test_axolotls_plugin_cuts_the_cross_entropy(values: dict[str, Any], loss: str | None) -> None:
    """Under ZeRO-3, FSDP and trainers of preferences it stays a key that lowers the peak."""
    plan = read({**AXOLOTL, "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"], **values})
    assert plan.options.get("loss") == loss
    assert ("cut_cross_entropy" in plan.unsupported) is (loss is None and "cut_cross_entropy" not in values)


@pytest.mark.parametrize("key", ["cut_cross_entropy", "liger_rms_norm", "liger_fused_linear_cross_entropy"])
def test_a_key_of_a_plugin_that_is_not_loaded_has_no_effect(key: str) -> None:
    plan = read({**AXOLOTL, key: True})
    assert plan.options == read(AXOLOTL).options
    assert f"{key} has no effect: it needs axolotl.integrations." in summary(plan.to_dict())
    assert key not in read(AXOLOTL).assumed


def test_a_key_of_unknown_effect_leaves_no_peak() -> None:
    result = peftplan.estimate(config=read({**AXOLOTL, "rl": "grpo"}), gpu="h100-80gb")
    assert result.peaks is None
    assert result.to_dict()["memory"]["peak_allocated"] is None
    assert result.gpus[0].verdict == "unknown"
    assert result.trainable_parameters == 83_886_080  # counts stay: r 32 on all linear layers of Llama 3.1 8B


def test_an_unknown_key_suggests_the_nearest() -> None:
    plan = read({**AXOLOTL, "micro_batch_siez": 4})
    assert "did you mean micro_batch_size" in plan.ignored["micro_batch_siez"].why


def test_strict_makes_it_an_error() -> None:
    with pytest.raises(RefusedError, match=r"run\.yml: rl is not supported"):
        peftplan.estimate(config=read({**AXOLOTL, "rl": "grpo"}), strict=True)


def test_json_in_a_command() -> None:
    """A field that is a mapping is JSON on a command line (`--gradient_checkpointing_kwargs '{"use_reentrant": true}'`)."""
    plan = read({**SWIFT, "gradient_checkpointing_kwargs": '{"use_reentrant": true}'}, kind="command", program="swift sft")
    assert plan.options["use_reentrant"] is True


@pytest.mark.parametrize(
    ("values", "storage"),
    [
        (AXOLOTL, "bf16"),  # loaders/model.py:809
        ({**LLAMAFACTORY, "quantization_bit": 4}, "bf16"),  # model/model_utils/quantization.py:178, the compute dtype
        ({**TRL, "bnb_4bit_quant_storage": "bfloat16"}, "bf16"),
        (TRL, None),
    ],
)
def test_what_4_bit_weights_are_packed_as(values: dict[str, Any], storage: str | None) -> None:
    """FSDP shards packed weights only if they are stored as floats, and FSDP1 refuses others."""
    assert read(values).options.get("quant_storage") == storage


@pytest.mark.parametrize(
    ("model", "grows"), [("microsoft/phi-1_5", False), ("HuggingFaceTB/SmolLM2-135M", False), ("gpt2", True)]
)
def test_a_vocabulary_that_is_a_multiple_of_32_stays(model: str, grows: bool) -> None:
    """51,200 and 49,152 rows are multiples of 32; 50,257 are not."""
    config = {"base_model": model, "resize_token_embeddings_to_32x": True, "flash_attention": True, "micro_batch_size": 1}
    assert ("resize_token_embeddings_to_32x" in read(config).unsupported) is grows


ZERO_3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}


@pytest.mark.parametrize(
    ("keys", "version", "reentrant"),
    [
        ({}, None, False),
        ({}, "0.19", True),
        (ZERO_3, None, True),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, None, True),
        ({"gradient_checkpointing_kwargs": {"preserve_rng_state": True}}, None, False),
        ({"fsdp": ["full_shard"]}, None, True),
    ],
)
def test_axolotl_s_checkpoints_are_those_of_its_release(keys: dict[str, object], version: str | None, *, reentrant: bool) -> None:
    """axolotl 0.21.0, utils/config/__init__.py:481: not reentrant, but under ZeRO-3; 0.19.0: they are (:401)."""
    values = {"base_model": "meta-llama/Llama-3.2-1B", "adapter": "lora", "load_in_8bit": True, "gradient_checkpointing": True}
    plan = read_values(values | {"sequence_len": 512} | keys, file="a.yml", tool="axolotl", tool_version=version)
    assert plan.options["use_reentrant"] is reentrant


@pytest.mark.parametrize(
    "config",
    [
        {"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"fsdp_offload_params": False}},
        {"fsdp_version": 1, "fsdp_config": {"offload_params": False}},
        {"fsdp_config": {"fsdp_sharding_strategy": "FULL_SHARD"}},
    ],
)
def test_a_file_that_axolotl_0_21_refuses_is_read_as_by_0_19(config: dict[str, object]) -> None:
    """0.21.0 has no FSDP1 (utils/schemas/validation.py:1442)."""
    values = {"base_model": "meta-llama/Llama-3.2-1B", "sequence_len": 512, "micro_batch_size": 1, "adapter": "lora"}
    plan = read(values | config)
    assert (plan.options["strategy"], plan.options["tool_version"], plan.version) == ("fsdp1", "0.19", "0.19")
    assert "axolotl 0.21.0 raises ValueError" in plan.assumed["tool_version"]
    assert read(values | {"fsdp_config": {"offload_params": False}}).options["strategy"] == "fsdp2"


def test_axolotl_0_21_refuses_fsdp1() -> None:
    """It had a peak if the release was named, or the strategy."""
    with pytest.raises(RefusedError, match=r"axolotl 0\.21\.0 has no FSDP1.*--tool-version 0\.19\.0"):
        peftplan.estimate("llama-3.2-1b", trainer="axolotl", strategy="fsdp1", gpus=4)
    older = peftplan.estimate("llama-3.2-1b", trainer="axolotl", strategy="fsdp1", gpus=4, tool_version="0.19.0")
    assert older.peaks is not None

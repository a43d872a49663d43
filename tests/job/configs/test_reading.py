"""What files of each tool mean, read by hand in the tool's source (versions and lines in `data/configs`)."""

from __future__ import annotations

import re
from typing import Any

import pytest

import peftplan
from peftplan.errors import RefusedError
from peftplan.job.configs.plan import ConfigPlan, Unsupported, bound
from peftplan.job.configs.read import read_text, read_values
from peftplan.job.kernels import named_kernels
from peftplan.planning.configs import of_plan
from tools.config_page import Case, refused_by

AXOLOTL = {
    "base_model": "meta-llama/Llama-3.1-8B",
    "adapter": "qlora",
    "load_in_4bit": True,
    "sequence_len": 4096,
    "lora_r": 32,
    "lora_target_linear": True,
    "micro_batch_size": 2,
    "optimizer": "paged_adamw_8bit",
    "bf16": "auto",
    "gradient_checkpointing": True,
    "attn_implementation": "flash_attention_2",
    "lora_mlp_kernel": False,
}
LLAMAFACTORY_V1 = {
    "model": "Qwen/Qwen3-0.6B",
    "model_class": "llm",
    "kernel_config": {"name": "auto"},
    "dist_config": {"name": "fsdp2", "dcp_path": None},
    "train_dataset": "data/v1_sft_demo.yaml",
    "micro_batch_size": 2,
    "cutoff_len": 2048,
}
LLAMAFACTORY = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_target": "all",
    "cutoff_len": 1024,
    "per_device_train_batch_size": 1,
    "bf16": True,
}
TRL = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "use_peft": True, "load_in_4bit": True}
TORCHTUNE = {
    "model": {
        "_component_": "torchtune.models.llama3_1.lora_llama3_1_8b",
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
    },
    "checkpointer": {"checkpoint_dir": "/data/Meta-Llama-3.1-8B-Instruct/"},
    "tokenizer": {"max_seq_len": None},
    "dtype": "bf16",
    "batch_size": 2,
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True},
    "enable_activation_checkpointing": True,
}
SWIFT = {"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "lora", "torch_dtype": "bfloat16", "max_length": 2048}


def read(values: dict[str, Any], **more: Any) -> ConfigPlan:
    return read_values(values, file="run.yml", **more)


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
            {"method": "full", "dtype": "bf16", "autocast": "none"},
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
    named = read({**LLAMAFACTORY_V1, "kernel_config": {"name": "auto", "include_kernels": "auto"}})
    assert named.unsupported.keys() == {"kernel_config.include_kernels"}


def test_a_command() -> None:
    plan = read({"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "full"}, kind="command", program="swift sft")
    assert (plan.tool, plan.options["method"]) == ("swift", "full")


def test_the_file_and_its_options_ask_the_same() -> None:
    """Options typed by hand for the same job give the same estimate, to the byte."""
    by_file = peftplan.estimate(config=read(AXOLOTL))
    by_hand = peftplan.estimate(
        "llama-3.1-8b", method="qlora", r=32, quant="nf4", double_quant=True, compute_dtype="bf16", quant_storage="bf16",
            kbit_prepare=False, target_modules="all-linear", batch_size=2, seq_len=4096, optim="paged_adamw_8bit", dtype="bf16",
            autocast="bf16", gradient_checkpointing=True, attn_implementation="flash_attention_2", trainer="axolotl",
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
    assert result.config["defaults"]["optim"].startswith("axolotl 0.19.0, utils/schemas/training.py:")
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


@pytest.mark.parametrize(
    ("values", "loss"),
    [({}, "cut-cross-entropy"), ({"cut_cross_entropy": False}, None), ({"rl": "dpo"}, None), ({"deepspeed": "zero2.json"}, None)],
)
def test_axolotls_plugin_cuts_the_cross_entropy(values: dict[str, Any], loss: str | None) -> None:
    """Under ZeRO, FSDP and trainers of preferences it stays a key that lowers the peak."""
    plan = read({**AXOLOTL, "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"], **values})
    assert plan.options.get("loss") == loss
    assert ("cut_cross_entropy" in plan.unsupported) is (loss is None and "cut_cross_entropy" not in values)


def test_a_key_of_unknown_effect_leaves_no_peak() -> None:
    result = peftplan.estimate(config=read({**AXOLOTL, "rl": "grpo"}), gpu="h100-80gb")
    assert result.peaks is None
    assert result.to_dict()["memory"]["peak_allocated"] is None
    assert result.gpus[0].verdict == "unknown"
    assert result.trainable_parameters == 83_886_080  # counts stay: r 32 on all linear layers of Llama 3.1 8B


def test_an_unknown_key_suggests_the_nearest() -> None:
    plan = read({**AXOLOTL, "micro_batch_siez": 4})
    assert "did you mean micro_batch_size" in plan.unsupported["micro_batch_siez"].why


def test_strict_makes_it_an_error() -> None:
    with pytest.raises(RefusedError, match=r"run\.yml: rl is not supported"):
        peftplan.estimate(config=read({**AXOLOTL, "rl": "grpo"}), strict=True)


TRL_SCRIPT = """
import torch
from trl import SFTConfig, SFTTrainer
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.bfloat16, quantization_config=quantization)
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B")
args = SFTConfig(output_dir="a", max_length=512, per_device_train_batch_size=4, packing=False)
lora = LoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
SFTTrainer(model=model, args=args, peft_config=lora, train_dataset=load_dataset("a")).train()
"""


def test_trl_script() -> None:
    """TRL's SFTTrainer in a Python script, read from its calls."""
    plan = read_text(TRL_SCRIPT, file="train.py")
    assert (plan.tool, plan.model, plan.unsupported) == ("trl-script", "Qwen/Qwen2.5-0.5B", {})
    expected = {
        "trainer": "trl",
        "method": "lora",
        "r": 32,
        "target_modules": ("q_proj", "v_proj"),
        "quant": "nf4",
        "seq_len": 512,
    }
    expected |= {"compute_dtype": "bf16", "dtype": "bf16", "batch_size": 4}
    assert {name: plan.options.get(name) for name in expected} == expected
    # BitsAndBytesConfig's own defaults: FP4, computing in fp32
    bare = read_text(
        TRL_SCRIPT.replace(', bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16', ""), file="train.py"
    )
    assert (bare.options["quant"], bare.options["compute_dtype"]) == ("fp4", "fp32")
    full = read_text(TRL_SCRIPT.replace("lora = LoraConfig(", "other = dict(").replace("peft_config=lora, ", ""), file="train.py")
    assert full.options["method"] == "full"


def test_scaling_of_llamafactory_changes_no_memory() -> None:
    plan = read({**LLAMAFACTORY, "lora_alpha": 32, "use_rslora": True})
    assert plan.unsupported == read(LLAMAFACTORY).unsupported


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


def test_an_optimizer_of_a_package_is_not_supported() -> None:
    """Its states are not known; the rest of the file is read, and the parameters are counted."""
    plan = read({**TORCHTUNE, "optimizer": {"_component_": "dion.Muon"}})
    assert plan.unsupported["optimizer._component_"].option == "optim"
    assert peftplan.estimate(config=plan).trainable_parameters > 0


@pytest.mark.parametrize(
    ("group", "component", "kernels", "unsupported"),
    [
        (256, "Int8DynActInt4WeightQATQuantizer", ("torchao.fake_quant",), set()),
        (128, "Int8DynActInt4WeightQATQuantizer", ("torchao.fake_quant",), {"quantizer.groupsize"}),
        (256, "Int4WeightOnlyQATQuantizer", None, {"quantizer._component_"}),
    ],
)
def test_quantizers_of_torchtune(group: int, component: str, kernels: tuple[str, ...] | None, unsupported: set[str]) -> None:
    quantizer = {"_component_": f"torchtune.training.quantization.{component}", "groupsize": group}
    plan = read({**TORCHTUNE, "quantizer": quantizer})
    assert plan.unsupported.keys() == unsupported
    assert (named_kernels(plan.options.get("kernels")) or None) == kernels


MODEL = {"model_name_or_path": "Qwen/Qwen2.5-0.5B"}


@pytest.mark.parametrize(
    ("program", "values", "expected"),
    [
        ("trl dpo", {}, {"trainer": "trl-dpo", "seq_len": 1024}),
        ("trl dpo", {"beta": 0.3, "precompute_ref_log_probs": True}, {"beta": 0.3, "precompute_ref_log_probs": True}),
        ("trl kto", {"loss_type": "apo_zero_unpaired"}, {"trainer": "trl-kto", "loss_type": "apo_zero_unpaired"}),
        ("trl reward", {"max_length": 2048}, {"trainer": "trl-reward", "seq_len": 2048}),
        ("trl grpo", {}, {"trainer": "trl-grpo", "max_completion_length": 512, "seq_len": 512 + 512}),
        ("trl grpo", {"max_completion_length": 1024, "max_prompt_length": 256}, {"max_completion_length": 1024, "seq_len": 1280}),
        ("trl grpo", {"use_vllm": True, "vllm_mode": "server"}, {"use_vllm": True, "vllm_mode": "server"}),
        ("python examples/scripts/orpo.py", {"beta": 0.1}, {"trainer": "trl-orpo", "beta": 0.1}),
        ("python trl/scripts/rloo.py", {"beta": 0.1}, {"trainer": "trl-rloo", "beta": 0.1}),
        (
            "python examples/scripts/prm.py",
            {},
            {"trainer": "transformers", "task_type": "TOKEN_CLS", "num_labels": 2, "dtype": "bf16", "seq_len": 1024},
        ),
    ],
)
def test_trl_commands_of_preferences_and_rewards(program: str, values: dict[str, Any], expected: dict[str, Any]) -> None:
    plan = read({**MODEL, **values}, kind="command", program=program)
    assert plan.unsupported == {}
    assert {name: plan.options.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {**AXOLOTL, "rl": "dpo", "precompute_ref_log_probs": True},
            {"trainer": "axolotl-dpo", "precompute_ref_log_probs": True},
        ),
        ({**AXOLOTL, "rl": "ipo"}, {"trainer": "axolotl-dpo"}),
        ({**AXOLOTL, "rl": "kto", "rl_beta": 0.5}, {"trainer": "axolotl-kto"}),
        ({**AXOLOTL, "rl": "orpo", "orpo_alpha": 0.1}, {"trainer": "axolotl-orpo"}),
        ({**AXOLOTL, "rl": "simpo"}, {"trainer": "axolotl-cpo", "loss_type": "simpo"}),
        ({**AXOLOTL, "reward_model": True, "num_labels": 1}, {"trainer": "axolotl-reward", "num_labels": 1}),
        ({**AXOLOTL, "process_reward_model": True}, {"trainer": "axolotl", "task_type": "TOKEN_CLS", "num_labels": 2}),
        ({**LLAMAFACTORY, "stage": "dpo"}, {"trainer": "llamafactory-dpo", "loss_type": "sigmoid"}),
        ({**LLAMAFACTORY, "stage": "dpo", "pref_loss": "orpo"}, {"trainer": "llamafactory-dpo", "loss_type": "orpo"}),
        ({**LLAMAFACTORY, "stage": "kto"}, {"trainer": "llamafactory-kto", "loss_type": None}),
    ],
)
def test_preferences_in_axolotl_and_llama_factory(values: dict[str, Any], expected: dict[str, Any]) -> None:
    plan = read(values)
    assert plan.unsupported == {}
    assert {name: plan.options.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "key", "effect"),
    [
        ({**AXOLOTL, "rl": "grpo"}, "rl", "unknown"),
        ({**AXOLOTL, "rl": "dpo", "dpo_use_liger_kernel": True}, "dpo_use_liger_kernel", "lowers"),
        ({**AXOLOTL, "rl": "dpo", "dpo_loss_type": ["sigmoid", "sft"]}, "dpo_loss_type", "raises"),
        ({**LLAMAFACTORY, "stage": "ppo"}, "stage", "unknown"),
    ],
)
def test_what_preferences_of_other_tools_do_beside(values: dict[str, Any], key: str, effect: str) -> None:
    assert read(values).unsupported[key].effect == effect


def test_defaults_for_vllm_count_where_it_generates() -> None:
    plan = read({**MODEL, "per_device_train_batch_size": 8}, kind="command", program="trl grpo")
    assert peftplan.estimate(config=plan).warnings == ()
    assert peftplan.estimate(config=plan, use_vllm=True).assumptions["vllm_gpu_memory_utilization"] == 0.3


def test_options_of_another_trainer_are_left_out() -> None:
    """The default of vLLM's share, 0.3, is none of supervised fine-tuning; a server's address moves no byte."""
    plan = read(MODEL, kind="command", program="trl sft")
    assert "vllm_gpu_memory_utilization" not in plan.options
    grpo = read({**MODEL, "vllm_server_host": "10.0.0.1", "reward_funcs": "accuracy_reward"}, kind="command", program="trl grpo")
    assert {"vllm_server_host", "reward_funcs"} <= grpo.ignored.keys()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("gkd", {"trainer": "trl-gkd", "teacher_model": "Qwen/Qwen2-1.5B-Instruct", "seq_len": 1024}),
        ("gold", {"trainer": "trl-gold", "teacher_model": "Qwen/Qwen2-1.5B-Instruct", "seq_len": 1024}),
        (
            "distillation",
            {"trainer": "trl-distillation", "teacher_model": "Qwen/Qwen2-1.5B-Instruct", "max_completion_length": 512},
        ),
        ("tpo", {"trainer": "trl-tpo", "teacher_model": None}),
    ],
)
def test_scripts_with_a_teacher_and_tpo(script: str, expected: dict[str, Any]) -> None:
    teacher = {} if script == "tpo" else {"teacher_model_name_or_path": "Qwen/Qwen2-1.5B-Instruct"}
    plan = read({**MODEL, **teacher}, kind="command", program=f"python examples/scripts/{script}.py")
    assert plan.unsupported == {}
    assert {name: plan.options.get(name) for name in expected} == expected


@pytest.mark.parametrize("key", ["zero_stage", "random_ltd"])
def test_programs_of_deepspeed_examples_are_not_read_as_trl(key: str) -> None:
    """DeepSpeed-Chat's `main.py` and `run_clm_no_trainer.py` have loops of their own; their command lines look like TRL's."""
    values = {"model_name_or_path": "facebook/opt-1.3b", "gradient_accumulation_steps": 8, key: True}
    assert read(values, kind="command", program="deepspeed").tool == "other"


@pytest.mark.parametrize("script", ["bco", "ppo/ppo_tldr", "xpo", "nash_md"])
def test_scripts_of_trainers_that_trl_has_no_more(script: str) -> None:
    """`import trl.experimental.bco` of trl 1.16 raises; the files of the four scripts are those of 1.9."""
    values = {**MODEL, "reward_model_path": "a/b"}
    why = read(values, kind="command", program=f"python examples/scripts/{script}.py").unsupported["trainer"].why
    assert f"raises ModuleNotFoundError: it no longer has trl.experimental.{script.partition('/')[0]}, " in why


@pytest.mark.parametrize("script", ["gold", "gkd"])
def test_a_script_of_another_trainer_is_not_read_as_sft(script: str) -> None:
    plan = read(MODEL, kind="command", program=f"python examples/scripts/{script}.py")
    assert plan.unsupported["trainer"].effect == "unknown"


def test_keys_of_swifts_rollouts_are_known() -> None:
    """They stand in rlhf_trainers/args_mixin.py."""
    rollout = {"use_vllm": True, "vllm_mode": "colocate", "vllm_server_port": 8000, "sleep_level": 1, "reward_funcs": "accuracy"}
    plan = read({"model": "Qwen/Qwen2.5-7B-Instruct", "rlhf_type": "grpo", **rollout}, kind="command", program="swift rlhf")
    assert not plan.unsupported
    expected = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.9, "vllm_enable_sleep_mode": True}
    assert expected.items() <= plan.options.items()


MOE = "Qwen/Qwen3-30B-A3B-Instruct-2507"


@pytest.mark.parametrize("values", [{}, {"target_modules": "all-linear"}, {"experts_impl": "grouped_mm"}])
def test_swift_adapts_no_experts_and_may_drop(values: dict[str, object]) -> None:
    """It lists names of linear layers; its dropout is 0.05. 48 layers of q, k, v and o at rank 8, as peft counts them."""
    plan = read({**SWIFT, "model": MOE, **values}, kind="command", program="swift sft")
    assert not plan.unsupported
    result = peftplan.estimate(config=plan)
    assert result.trainable_parameters == 48 * 8 * (2 * (2048 + 4096) + 2 * (2048 + 512)) == 6_684_672
    assert result.bound is None


@pytest.mark.parametrize(
    ("values", "key", "where"),
    [
        ({"optimizer": "muon"}, "optimizer", "optimizers/muon.py:15"),
        ({"loss_type": "loss_scale"}, "loss_type", "mixin.py:1115"),
        ({"init_weights": "lora-ga"}, "init_weights", "train/tuner.py:218"),
    ],
)
def test_what_swift_itself_raises_is_said(values: dict[str, object], key: str, where: str) -> None:
    """AttributeError and KeyError of ms-swift 4.6.0 were rehearsed; LoRA-GA ends in `from peft.tuners import BoneModel`."""
    plan = read({**SWIFT, **values}, kind="command", program="swift sft")
    assert plan.unsupported.keys() == {key}
    case = Case("run.sh", plan, of_plan(plan))
    assert case.entry.total_parameters is not None
    assert where in (refused_by(case) or "")


@pytest.mark.parametrize("values", [{"galore_optim_per_parameter": True}, {"galore_quantization": True}])
def test_swift_makes_no_galore(values: dict[str, object]) -> None:
    """transformers' Trainer calls `create_optimizer`; ms-swift's GaLore hangs on `create_optimizer_and_scheduler`."""
    plain = {"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "full"}
    plan, of_adamw = (
        read({**plain, **more}, kind="command", program="swift sft") for more in ({"use_galore": True, **values}, {})
    )
    assert not plan.unsupported
    assert "GaLore" in plan.assumed["optim"]
    assert plan.options == of_adamw.options


def test_lisa_lowers_the_peak_of_full_fine_tuning() -> None:
    """Two of four layers trained at a time hold 15.6 GB where all hold 17.5 (rehearsed)."""
    values = {"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "full", "lisa_activated_layers": 2}
    plan = read(values, kind="command", program="swift sft")
    assert bound(plan.unsupported) == "at_most"


def test_files_of_swift_that_sample_or_run_megatron_are_told_apart() -> None:
    """Arguments of `swift sample`, and of Megatron under Ray (megatron/arguments/megatron_args.py)."""
    assert read({**SWIFT, "sampler_engine": "vllm", "num_return_sequences": 4}).kind == "other"
    plan = read({**SWIFT, "rlhf_type": "grpo", "micro_batch_size": 2, "global_batch_size": 16, "lr": 1e-6})
    assert Case("run.yaml", plan, of_plan(plan)).kind == "Megatron"


def test_other_experts_are_not_known() -> None:
    plan = read({**SWIFT, "model": MOE, "experts_impl": "eager"}, kind="command", program="swift sft")
    assert plan.unsupported.keys() == {"experts_impl"}


@pytest.mark.parametrize(
    ("ranks", "gpus", "nodes"), [("list(range(0, 4))", 4, None), (16, 8, 2), ("list(range(8, 12))", 4, None)]
)
def test_ray_starts_the_ranks_that_the_file_says(ranks: object, gpus: int, nodes: int | None) -> None:
    groups = {"nproc_per_node": 8 if ranks == 16 else 4, "default": {"device": "GPU", "ranks": ranks, "workers": ["default"]}}
    plan = read({**SWIFT, "deepspeed": "zero3", "use_ray": True, "device_groups": groups})
    assert not plan.unsupported
    assert (plan.options["gpus"], plan.options.get("nodes")) == (gpus, nodes)


@pytest.mark.parametrize("ranks", ["sorted({0, 1})", 6, "list(range(4, 4))"])
def test_ranks_of_ray_that_are_not_known_or_fill_no_nodes_are_said(ranks: object) -> None:
    groups = {"nproc_per_node": 4, "default": {"device": "GPU", "ranks": ranks, "workers": ["default"]}}
    assert read({**SWIFT, "deepspeed": "zero3", "device_groups": groups}).unsupported.keys() == {"device_groups"}


@pytest.mark.parametrize(("model", "unsupported"), [(SWIFT["model"], set()), ("meta-llama/Llama-3.2-1B", {"new_special_tokens"})])
def test_new_tokens_fit_where_the_embedding_has_rows_to_spare(model: str, unsupported: set[str]) -> None:
    """Qwen's tokenizers use at most 151,669 of 151,936 rows; Llama's use all of theirs."""
    plan = read({**SWIFT, "model": model, "new_special_tokens": "tokens.txt"}, kind="command", program="swift sft")
    assert plan.unsupported.keys() == unsupported
    assert ("new_special_tokens" in plan.assumed) is (not unsupported)


def test_a_placeholder_that_the_reader_fills_in_is_assumed() -> None:
    values = {**SWIFT, "task_type": "seq_cls", "num_labels": "<num-labels>"}
    plan = read(values, kind="command", program="swift sft")
    assert not plan.unsupported
    assert (plan.options["num_labels"], plan.assumed["num_labels"]) == (2, "the file has a placeholder; 2 is assumed")


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, {"trainer": "swift-dpo"}),
        ({"rlhf_type": "dpo", "beta": 0.2, "loss_type": "ipo"}, {"trainer": "swift-dpo", "beta": 0.2, "loss_type": "ipo"}),
        ({"rlhf_type": "orpo"}, {"trainer": "swift-orpo"}),
        ({"rlhf_type": "grpo", "max_length": 1000}, {"trainer": "swift-grpo", "seq_len": 1512, "max_completion_length": 512}),
        ({"rlhf_type": "grpo", "max_completion_length": 4000}, {"seq_len": 6048, "max_completion_length": 4000}),
        ({"rlhf_type": "grpo", "max_length": None}, {"seq_len": 2048 + 512, "max_completion_length": 512}),
    ],
)
def test_swift_names_its_trainer(values: dict[str, object], options: dict[str, object]) -> None:
    """`swift rlhf` trains by DPO unless told otherwise. GRPO's max_length is that of a prompt."""
    plan = read({**SWIFT, **values}, kind="command", program="swift rlhf")
    assert not plan.unsupported
    assert options.items() <= plan.options.items()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rlhf_type": "kto"}, "rlhf_type"),
        ({"rlhf_type": "dpo", "packing": True}, "packing"),
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"rlhf_type": "grpo", "use_liger_kernel": True}, "use_liger_kernel"),
        ({"rlhf_type": "grpo", "top_entropy_quantile": 0.2}, "top_entropy_quantile"),
        # rehearsed: 7.28 GB, and 7.20 GB where completions alone have labels
        ({"rlhf_type": "grpo", "loss_scale": "all"}, "loss_scale"),
        ({"rlhf_type": "grpo", "num_generations": 1, "loss_type": "fipo"}, "loss_type"),
        ({"rlhf_type": "dpo", "loss_type": "sigmoid bco_pair sft"}, "loss_type"),
    ],
)
def test_of_swifts_trainers_some_are_not_read(values: dict[str, object], key: str) -> None:
    assert read({**SWIFT, **values}, kind="command", program="swift rlhf").unsupported.keys() == {key}


def test_packed_rows_of_trl_are_one_row_under_flash_attention() -> None:
    """Two packed rows of 1,024 tokens; max_seq_length is the old name of max_length."""
    packed = {**MODEL, "packing": True, "per_device_train_batch_size": 2, "attn_implementation": "flash_attention_2"}
    for lengths, seq_len in (({}, 2048), ({"max_length": 512}, 1024), ({"max_seq_length": 4096}, 8192)):
        plan = read({**packed, **lengths}, kind="command", program="trl sft")
        assert (plan.options["batch_size"], plan.options["seq_len"]) == (1, seq_len)
        assert not plan.unsupported
    for other in ({"attn_implementation": "sdpa"}, {"attn_implementation": "flex_attention"}, {"packing_strategy": "ffd"}):
        assert read({**packed, **other}, kind="command", program="trl sft").unsupported.keys() == {"packing"}


@pytest.mark.parametrize(
    ("model", "grows"), [("microsoft/phi-1_5", False), ("HuggingFaceTB/SmolLM2-135M", False), ("gpt2", True)]
)
def test_a_vocabulary_that_is_a_multiple_of_32_stays(model: str, grows: bool) -> None:
    """51,200 and 49,152 rows are multiples of 32; 50,257 are not."""
    config = {"base_model": model, "resize_token_embeddings_to_32x": True, "flash_attention": True, "micro_batch_size": 1}
    assert ("resize_token_embeddings_to_32x" in read(config).unsupported) is grows


def test_nemo_builds_some_models_itself() -> None:
    """Classes in its registry are modules of its own, unless `force_hf`. Dense Llama, Qwen2 and Qwen3 have formulas as it builds
    them, and others as transformers does."""
    config = {
        "model": {"_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"},
        "step_scheduler": {"local_batch_size": 1},
    }
    for name, force_hf, expected, trainer in (
        ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", None, ["model"], "automodel"),
        ("meta-llama/Llama-3.2-1B", None, [], "automodel"),
        ("meta-llama/Llama-3.2-1B", True, [], "automodel-hf"),
        ("mistralai/Mistral-7B-v0.1", None, [], "automodel"),
    ):
        model = {**config["model"], "pretrained_model_name_or_path": name, "force_hf": force_hf}
        plan = read({**config, "model": model})
        assert (list(plan.unsupported), plan.options["trainer"]) == (expected, trainer)


def test_a_server_of_trl_trains_nothing() -> None:
    plan = read({"model": "Qwen/Qwen2.5-7B", "tensor-parallel-size": 2}, kind="command", program="trl vllm-serve")
    assert plan.kind == "other"


NEMO_MODEL = {"_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained", "pretrained_model_name_or_path": "gpt2"}
NEMO_LORA = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig"}


def of_nemo(distributed: dict[str, object], **more: object) -> ConfigPlan:
    values = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "model": NEMO_MODEL,
        "step_scheduler": {"local_batch_size": 4, "global_batch_size": 64},
        "distributed": distributed,
    }
    return read({**values, **more})


def test_nemo_divides_the_global_batch() -> None:
    """`grad_acc_steps = global_batch_size // (local_batch_size * dp_size)` (components/training/step_scheduler.py)."""
    plan = of_nemo({"strategy": "fsdp2", "dp_size": "none", "tp_size": 1})
    assert plan.unsupported == {}
    assert plan.assumed["gpus"] == "the launcher decides; 8 are assumed"
    assert [plan.options[name] for name in ("trainer", "strategy", "gpus")] == ["automodel", "fsdp2", 8]
    assert plan.options["gradient_accumulation_steps"] == 64 // (4 * 8)
    assert of_nemo({"strategy": "fsdp2", "dp_size": 2}).options["gradient_accumulation_steps"] == 64 // (4 * 2)
    divided = of_nemo({"strategy": "fsdp2", "dp_size": "none", "tp_size": 4})
    assert (divided.options["tp_size"], divided.options["gradient_accumulation_steps"]) == (4, 64 // (4 * 8 // 4))
    assert of_nemo({"strategy": "fsdp2", "dp_size": 2, "tp_size": 4}).options["gpus"] == 2 * 4
    assert "tp_size" not in plan.options


def test_nemo_started_by_skypilot() -> None:
    sky = {"cloud": "kubernetes", "accelerators": "H100:4", "num_nodes": 2, "hf_token": "${HF_TOKEN}"}
    plan = of_nemo(
        {"strategy": "fsdp2", "dp_size": "none"}, skypilot=sky, recipe={"_target_": "nemo_automodel.recipes.llm.train_ft.X"}
    )
    assert plan.unsupported == {}
    assert (plan.options["gpus"], plan.options["nodes"]) == (4, 2)
    assert plan.options["gradient_accumulation_steps"] == 64 // (4 * 4 * 2)


@pytest.mark.parametrize(
    "distributed",
    [
        {"strategy": "megatron_fsdp"},
        {"strategy": "fsdp2", "cp_size": 2},
        {"strategy": "fsdp2", "activation_checkpointing": "selective"},
        {"strategy": "fsdp2", "offload_policy": {"_target_": "torch.distributed.fsdp.CPUOffloadPolicy"}},
    ],
)
def test_what_nemo_shards_otherwise_is_not_supported(distributed: dict[str, object]) -> None:
    assert len(of_nemo(distributed).unsupported) == 1


def test_nemo_packs_quantized_weights_as_floats() -> None:
    """components/quantization/qlora.py (`create_bnb_config`): bfloat16 unless the file says otherwise."""
    plans = [
        of_nemo({"strategy": "fsdp2", "dp_size": "none"}, peft=NEMO_LORA, quantization={"load_in_4bit": True, **storage})
        for storage in ({}, {"bnb_4bit_quant_storage": "uint8"})
    ]
    assert [plan.options["quant_storage"] for plan in plans] == ["bf16", "uint8"]


@pytest.mark.parametrize(
    ("peft", "targets", "excluded"),
    [
        ({}, r"(?:.*\.)?.*_proj", None),
        ({"match_all_linear": True}, "every-linear", None),
        ({"exclude_modules": ["*.out_proj"]}, "every-linear", r"(?:.*\.)?.*\.out_proj"),
        ({"target_modules": ["c_attn"]}, ("c_attn",), None),
    ],
)
def test_nemo_names_its_targets(peft: dict[str, object], targets: object, excluded: str | None) -> None:
    """components/_peft/module_matcher.py (`ModuleMatcher`): all linear layers include the output layer."""
    options = of_nemo({"strategy": "fsdp2"}, peft=NEMO_LORA | peft).options
    assert (options["target_modules"], options.get("exclude_modules")) == (targets, excluded)


def test_nemo_shards_with_fsdp2_unless_one_gpu_runs() -> None:
    """recipes/_dist_utils.py: `_target_` is taken out; components/distributed/model_parallelizer.py
    (`_parallelize_unsharded_fsdp2`): nothing is sharded over one rank."""
    older = {"_target_": "nemo_automodel.components.distributed.fsdp2.FSDP2Manager", "dp_size": "none"}
    assert [of_nemo(older).options[name] for name in ("strategy", "gpus")] == ["fsdp2", 8]
    alone = of_nemo({**older, "dp_size": 1})
    assert ("strategy" in alone.options, alone.unsupported) == (False, {})


def test_nemo_packs_documents_into_rows() -> None:
    """A mask tells documents apart, or FlashAttention's metadata; how the tool's own modules do it has no formula."""
    packed = {"packed_sequence": {"packed_sequence_size": 1024}}
    plans = [
        of_nemo({"strategy": "fsdp2"}, model=NEMO_MODEL | {"force_hf": True, **attention}, **packed)
        for attention in ({}, {"attn_implementation": "flash_attention_2"})
    ]
    assert [(plan.options["seq_len"], plan.options.get("padding"), plan.unsupported) for plan in plans] == [
        (1024, True, {}),
        (1024, None, {}),
    ]
    assert of_nemo({"strategy": "fsdp2"}, **packed).unsupported.keys() == {"packed_sequence.packed_sequence_size"}


def test_losses_and_optimizers_of_nemo() -> None:
    """Adam adds decayed weights to copies of all gradients (torch, optim/adam.py)."""
    loss = "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"
    adam = {"_target_": "torch.optim.Adam", "weight_decay": 0}
    sharded = {"strategy": "fsdp2"}
    assert of_nemo(sharded, loss_fn={"_target_": loss}, optimizer=adam).unsupported == {}
    peft = {
        "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
        "dim": 8,
        "target_modules": "*_proj",
        "use_triton": True,
    }
    assert of_nemo(sharded, peft=peft).unsupported == {}
    assert "256 MiB" in of_nemo(sharded, peft=peft).assumed["use_triton"]
    assert of_nemo(sharded, optimizer={**adam, "weight_decay": 0.1}).options["optim"] == "adam"
    flash = of_nemo(sharded, optimizer={"_target_": "flashoptim.FlashAdamW", "master_weight_bits": 32})
    assert (flash.options["optim"], flash.options["optim_args"]) == ("flash_adamw", "master_weight_bits=32")
    of_te = of_nemo(sharded, loss_fn={"_target_": "nemo_automodel.components.loss.te_parallel_ce.TEParallelCrossEntropy"})
    assert (of_te.options["loss"], of_te.unsupported) == ("te-parallel", {})
    fused = of_nemo(sharded, loss_fn={"_target_": "nemo_automodel.components.loss.linear_ce.FusedLinearCrossEntropy"})
    assert (fused.options["loss"], fused.unsupported) == ("cut-apart", {})
    compiled = {"_target_": "nemo_automodel.components.loss.linear_ce.FusedLinearCrossEntropy", "impl": "torch_compile"}
    assert of_nemo(sharded, loss_fn=compiled).unsupported.keys() == {"loss_fn.impl"}
    assert of_nemo(sharded | {"defer_fsdp_grad_sync": False}).options["sync_each_batch"] is True
    alone = of_nemo(sharded | {"defer_fsdp_grad_sync": False}, step_scheduler={"global_batch_size": 8, "local_batch_size": 1})
    assert "sync_each_batch" not in alone.options
    assert alone.read["distributed.defer_fsdp_grad_sync"].why == "a step has one micro batch"


def test_nemo_says_which_dtype_of_the_checkpoint_it_takes() -> None:
    assert of_nemo({"strategy": "fsdp2"}).assumed["dtype"] == "the checkpoint decides too; bfloat16 is assumed"
    t5 = of_nemo({"strategy": "fsdp2"}, model=NEMO_MODEL | {"pretrained_model_name_or_path": "google-t5/t5-small"})
    assert t5.options["dtype"] == "fp32"


WITH_KERNELS = {key: value for key, value in AXOLOTL.items() if not key.endswith("_kernel")}
LLAMA_FACTORY_FULL = {"stage": "sft", "finetuning_type": "full", "model_name_or_path": "Qwen/Qwen2-1.5B-Instruct"}


@pytest.mark.parametrize(
    ("values", "key", "raised"),
    [
        ({**AXOLOTL, "flash_attn_rms_norm": True}, "flash_attn_rms_norm", "DeprecationWarning"),
        ({**AXOLOTL, "max_packed_sequence_len": 2048}, "max_packed_sequence_len", "DeprecationWarning"),
        ({**WITH_KERNELS, "base_model": "EleutherAI/gpt-j-6b"}, "lora_qkv_kernel", "AssertionError"),
        ({**WITH_KERNELS, "base_model": "microsoft/Phi-3.5-mini-instruct"}, "lora_qkv_kernel", "AssertionError"),
        ({**AXOLOTL, "base_model": "tiiuae/falcon-7b", "attn_implementation": "xformers"}, "attn_implementation", "KeyError"),
        ({**AXOLOTL, "early_stopping_patience": 3, "save_steps": 10}, "early_stopping_patience", "ValueError"),
        ({**AXOLOTL, "adapter": "qlora", "load_in_4bit": True, "relora": True}, "relora", "RuntimeError"),
        ({**AXOLOTL, "warmup_steps": 0.1}, "warmup_steps", "ValidationError"),
        ({**AXOLOTL, "rl": "ebft", "ebft": {"mode": "strided"}, "torch_compile": True}, "torch_compile", "ValueError"),
        ({**LLAMA_FACTORY_FULL, "use_apollo": True}, "use_apollo", "NotImplementedError"),
        ({**LLAMA_FACTORY_FULL, "use_galore": True}, "use_galore", "NotImplementedError"),
    ],
)
def test_what_the_tool_raises_for_is_said_with_its_line(values: dict[str, Any], key: str, raised: str) -> None:
    """ReLoRA was rehearsed: the first step ends, and the second one raises."""
    row = read(values).unsupported[key]
    assert re.search(rf" raises {raised}: .* \([\w/]+\.py:\d+\)$", row.why)
    assert row.effect == "unknown"


def test_llama_factory_makes_its_low_rank_optimizers_of_the_plain_adamw() -> None:
    plan = read({**LLAMA_FACTORY_FULL, "use_apollo": True, "optim": "adamw_torch"})
    assert plan.unsupported["use_apollo"].why == "APOLLO by its own optimizer"


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


def test_torchtune_reads_pairs_for_a_loss_of_preferences() -> None:
    """Others of its losses of pairs, and full fine-tuning with a second model, have no peak."""
    pairs = {**TORCHTUNE, "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}
    plan = read(pairs)
    assert (plan.options["trainer"], plan.options["loss"], plan.unsupported) == ("torchtune-dpo", "full", {})
    other = read({**TORCHTUNE, "loss": {"_component_": "torchtune.rlhf.loss.RSOLoss"}})
    assert other.unsupported["loss._component_"].effect == "unknown"


def test_torchtune_reads_a_teacher() -> None:
    """A divergence in eight chunks of logits, with the cross entropy in as many; another divergence has no peak."""
    losses = {"loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}}
    chunks = {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}
    of_teacher = {
        "teacher_model": {"_component_": "torchtune.models.qwen2.qwen2_1_5b"},
        "teacher_checkpointer": {"checkpoint_dir": "/data/Qwen2-1.5B-Instruct"},
    }
    plan = read({**TORCHTUNE, **losses, **of_teacher, "kd_loss": chunks})
    assert (plan.options["trainer"], plan.options["loss"], plan.unsupported) == ("torchtune-kd", "torchtune-kl", {})
    assert plan.options["teacher_model"] == "Qwen2-1.5B-Instruct"
    other = read({**TORCHTUNE, **losses, **of_teacher, "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLLoss"}})
    assert other.unsupported["kd_loss._component_"].effect == "unknown"


def test_torchtune_over_the_processes_of_its_header() -> None:
    values = {
        "model": {"_component_": "torchtune.models.llama3_2.llama3_2_1b"},
        "checkpointer": {"checkpoint_dir": "/tmp/Llama-3.2-1B-Instruct/"},
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True},
        "optimizer_in_bwd": True,
    }
    plan = read(values, nproc_per_node=4)
    assert (plan.options["strategy"], plan.options["gpus"]) == ("fsdp2", 4)
    assert plan.options["optimizer_in_backward"] is True
    ends = {**values, "custom_sharded_layers": ["tok_embeddings", "output"], "fsdp_cpu_offload": True}
    assert read(ends, nproc_per_node=4).options["custom_sharded_layers"] == ("tok_embeddings", "output")
    assert "offload_params" not in read(ends).options


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


def test_gspo_is_grpo_with_ratios_of_sequences() -> None:
    script = "--model_name_or_path Qwen/Qwen3-0.6B --num_generations 8 --beta 0.0 --importance_sampling_level sequence"
    plan = read_text(f"accelerate launch --num_processes 2 examples/scripts/gspo.py {script}\n", file="run.sh")
    assert (plan.options["trainer"], plan.options["beta"], dict(plan.unsupported)) == ("trl-grpo", 0.0, {})


def test_long_lora_of_swift_raises() -> None:
    """`fa2_forward() got an unexpected keyword argument 'past_key_values'`, of its own code in Llama of transformers 5.19."""
    plan = read({"model": "LLM-Research/Meta-Llama-3.1-8B-Instruct", "tuner_type": "longlora", "attn_impl": "flash_attn"})
    assert " raises TypeError" in plan.unsupported["tuner_type"].why


PEFTS_EXAMPLE = (
    "torchrun --nproc_per_node 8 train.py --model_name_or_path mistralai/Mistral-7B-v0.1 --max_length 2048 --bf16 True"
    " --packing True --per_device_train_batch_size 8 --chat_template_format chatml --splits train,test --use_reentrant False"
    " --use_flash_attn True --use_peft_lora True --lora_r 8 --lora_dropout 0.1 --lora_target_modules all-linear"
    " --use_4bit_quantization True --use_nested_quant True --bnb_4bit_compute_dtype bfloat16"
)


def test_peft_s_examples_have_words_of_their_own() -> None:
    """peft, examples/sft/utils.py: what is not in 4 bits is fp32 unless 4-bit weights are packed in 16 bits."""
    plan = read_text(f"{PEFTS_EXAMPLE}\n", file="run.sh")
    assert not plan.unsupported
    stored = {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16", "quant_storage": "uint8", "dtype": "fp32"}
    shape = {"batch_size": 1, "seq_len": 8 * 2048, "attn_implementation": "flash_attention_2", "use_reentrant": False}
    assert plan.options.items() >= {**stored, **shape, "trainer": "trl", "method": "lora", "r": 8, "gpus": 8}.items()
    assert "eight rows" in plan.assumed["vocabulary"]
    packed = read_text(f"{PEFTS_EXAMPLE} --bnb_4bit_quant_storage_dtype bfloat16\n", file="run.sh")
    assert (packed.options["quant_storage"], packed.options["dtype"]) == ("bf16", "bf16")


@pytest.mark.parametrize("word", ["--use_peft_lora True", "--use_4bit_quantization True"])
def test_peft_s_examples_attend_eagerly_unless_told(word: str) -> None:
    """peft, examples/sft/utils.py: `"flash_attention_2" if args.use_flash_attn else "eager"`; train.py: False by default."""
    lora = "--lora_r 8 --lora_dropout 0.1 --lora_target_modules all-linear"
    plan = read_text(f"python train.py --model_name_or_path gpt2 {word} {lora}\n", file="run.sh")
    assert plan.options["attn_implementation"] == "eager"


def test_peft_s_examples_set_use_reentrant_too_late() -> None:
    """train.py sets `gradient_checkpointing_kwargs` once transformers 5.24 has copied it to `activation_checkpointing_kwargs`,
    which alone its Trainer reads (trainer.py:1507), and which leave checkpoints that are not reentrant (modeling_utils.py:3158).
    """
    plan = read_text(f"{PEFTS_EXAMPLE.replace('--use_reentrant False', '--use_reentrant True')}\n", file="run.sh")
    assert plan.options["use_reentrant"] is False
    assert "transformers 5.24" in plan.assumed["use_reentrant"]
    assert "use_reentrant" not in read_text(f"{PEFTS_EXAMPLE}\n", file="run.sh").assumed
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments("unused", gradient_checkpointing=True, use_cpu=True, report_to="none")
    if hasattr(arguments, "activation_checkpointing_kwargs"):
        arguments.gradient_checkpointing_kwargs = {"use_reentrant": True}
        assert arguments.activation_checkpointing_kwargs is None


def test_peft_s_examples_leave_lora_to_their_script() -> None:
    plan = read_text("python train.py --model_name_or_path gpt2 --use_peft_lora True --lora_r 8\n", file="run.sh")
    assert plan.unsupported["use_peft_lora"].effect == "unknown"

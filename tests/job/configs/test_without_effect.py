"""Keys that were listed as without effect, although some of their values change what a step holds."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.job.configs.plan import ConfigPlan, Tool
from peftplan.job.configs.read import read_values


def axolotl(**values: Any) -> ConfigPlan:
    settings = {"base_model": "NousResearch/Llama-2-7b-hf", "micro_batch_size": 1, "sequence_len": 512}
    return read_values(settings | values, file="a.yml", tool="axolotl")


def swift(**values: Any) -> ConfigPlan:
    settings = {"model": "Qwen/Qwen2.5-7B-Instruct", "packing": True, "max_length": 2048}
    return read_values(settings | values, file="a.sh", tool="swift", kind="command", program="swift sft", NPROC_PER_NODE="2")


@pytest.mark.parametrize("key", ["model_type", "type_of_model"])
@pytest.mark.parametrize(
    ("values", "supported"),
    [
        ({"*": "LlamaForCausalLM"}, True),
        ({"*": "AutoModelForCausalLM"}, True),
        ({"*": "AutoModelForSequenceClassification"}, False),
        ({"*": "AutoModelForSequenceClassification", "reward_model": True}, True),
        ({"*": "MistralForCausalLM"}, False),
        ({"*": "MistralForCausalLM", "trust_remote_code": True}, True),  # model.py:1058: the automatic class
    ],
)
def test_axolotl_loads_another_class_than_the_model_s(key: str, values: dict[str, Any], supported: bool) -> None:
    plan = axolotl(**{key if name == "*" else name: value for name, value in values.items()})
    assert (key in plan.ignored, key in plan.unsupported) == (supported, not supported)


def test_llamafactory_v1_loads_another_head() -> None:
    for model_class, supported in (("llm", True), ("cls", False), ("other", False)):
        plan = read_values({"model": "Qwen/Qwen3-0.6B", "model_class": model_class}, file="a.yaml", tool="llamafactory-v1")
        assert ("model_class" in plan.unsupported) is not supported


def test_a_key_that_axolotl_drops_cannot_be_said() -> None:
    assert axolotl(gptq_groupsize=None).ignored["gptq_groupsize"].at
    assert "gptq_groupsize" in axolotl(gptq_groupsize=128).unsupported


@pytest.mark.parametrize("key", ["dpo_use_logits_to_keep", "dpo_norm_loss", "dpo_generate_during_eval"])
def test_axolotl_raises_for_options_that_trl_had(key: str) -> None:
    plan = axolotl(rl="dpo", **{key: False})
    assert plan.refused[key].instead == {key: None}


def test_a_watched_model_raises_the_peak() -> None:
    assert axolotl(wandb_watch="all").unsupported["wandb_watch"].effect == "raises"
    assert "wandb_watch" in axolotl(wandb_watch="false").ignored


def test_packed_rows_of_their_own_length() -> None:
    """ms-swift packs texts of at most max_length tokens up to packing_length; a shorter one leaves the longest text."""
    assert swift(packing_length=8192).options["seq_len"] == 8192
    assert swift(packing_length=1024).options["seq_len"] == 2048
    assert "packing_length" in swift(packing_length=1024, packing=False).ignored
    assert "packing_length" in swift(packing_length=8192, sequence_parallel_size=2).unsupported


@pytest.mark.parametrize("key", ["merge_lora", "save_safetensors"])
def test_arguments_of_other_commands_of_ms_swift(key: str) -> None:
    assert swift(**{key: False}).refused[key].instead == {key: None}
    settings = {"model": "Qwen/Qwen2.5-7B-Instruct", key: False}
    assert key in read_values(settings, file="a.sh", tool="swift", kind="command", program="megatron sft").ignored


@pytest.mark.parametrize("key", ["gc_steps", "gc_collect_steps"])
def test_axolotl_empties_the_cache(key: str) -> None:
    """It reads gc_steps as torch_empty_cache_steps too, which was a bound."""
    assert axolotl(**{key: 1}).unsupported[key].effect == "lowers"
    assert key in axolotl(**{key: None}).ignored


@pytest.mark.parametrize("tool", ["trl", "llamafactory", "swift", "axolotl"])
@pytest.mark.parametrize("key", ["split_batches", "gradient_accumulation_kwargs.sync_each_batch"])
def test_fields_of_accelerate_s_config_that_lower_the_peak(tool: Tool, key: str) -> None:
    name = f"accelerator_config.{key}"
    assert read_values({name: True}, file="a.yml", tool=tool).unsupported[name].effect == "lowers"
    assert name in read_values({name: False}, file="a.yml", tool=tool).ignored


@pytest.mark.parametrize(
    ("values", "weighs"),
    [
        ({"loss_scale": "all"}, False),
        ({"loss_scale": "last_round+ignore_empty_think"}, False),
        ({"loss_scale": "hermes", "is_binary_loss_scale": True}, False),
        ({"loss_scale": "hermes"}, True),
        ({"loss_scale": "last_round+react", "use_liger_kernel": True}, True),
        ({"is_binary_loss_scale": False}, True),
    ],
)
def test_ms_swift_weighs_tokens(values: dict[str, Any], weighs: bool) -> None:
    """Where weights are not 0 and 1 alone, it takes the labels from the model and computes the loss of each token."""
    plan = swift(**values)
    assert (plan.options.get("loss") == "per-token", plan.unsupported) == (weighs, {})
    shared = swift(**values, sequence_parallel_size=2, padding_free=True, attn_impl="flash_attn")
    assert ("loss_scale" in shared.unsupported) is (weighs and "loss_scale" in values)


@pytest.mark.parametrize(
    ("values", "supported"),
    [
        ({"max_length": 1024}, True),
        ({"max_length": 1000}, False),  # 1,024 tokens
        ({"pad_to_multiple_of": None}, True),
        ({}, True),  # max_length is 1,024 where the file says none
        ({"max_seq_length": 1000}, False),
    ],
)
def test_trl_pads_rows_beyond_their_length(values: dict[str, Any], supported: bool) -> None:
    settings = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "output_dir": "o", "pad_to_multiple_of": 64}
    plan = read_values(settings | values, file="a.yml", tool="trl")
    assert ("pad_to_multiple_of" in plan.unsupported) is not supported


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "SEQ_CLS"])
def test_an_adapter_of_a_reward_model_needs_its_task(task: str | None) -> None:
    """peft's `PeftModelForCausalLM` reads `prepare_inputs_for_generation`, which a model that scores does not have."""
    values = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "use_peft": True} | ({} if task is None else {"lora_task_type": task})
    plan = read_values(values, file="a.sh", tool="trl", kind="command", program="trl reward")
    assert ("lora_task_type" in plan.refused) is (task != "SEQ_CLS")


@pytest.mark.parametrize(
    ("tool", "key"),
    [
        ("swift", "log_foo"),
        ("trl", "dataset_foo"),
        ("llamafactory", "preprocessing_foo"),
    ],
)
def test_a_key_that_the_schema_lacks_is_not_without_effect_by_how_it_begins(tool: Tool, key: str) -> None:
    plan = read_values({key: 1}, file="a.yml", tool=tool)
    assert "not a key of" in plan.unsupported[key].why


def test_a_key_below_one_of_the_schema_is_without_effect_as_that_one() -> None:
    assert (
        "chat_template_kwargs.enable_thinking"
        in read_values({"chat_template_kwargs.enable_thinking": False}, file="a.yml", tool="trl").ignored
    )

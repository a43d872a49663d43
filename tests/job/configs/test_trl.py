"""What commands, files and scripts of TRL's trainers mean, and those of other tools that run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import RefusedError
from peftplan.job.configs.read import read_text, read_values
from peftplan.planning.configs import of_plan
from tests.job.configs.files import AXOLOTL, LLAMAFACTORY, TRL, read

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
            {"trainer": "transformers", "task_type": "TOKEN_CLS", "num_labels": 2, "dtype": "unstated", "seq_len": 1024},
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
        ({**LLAMAFACTORY, "stage": "rm"}, {"trainer": "llamafactory-reward"}),
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


def test_online_dpo_reads_the_length_of_its_own_config() -> None:
    """OnlineDPOConfig: rows of 512 tokens, completions of 64; the docs call the script by its older name."""
    values = {**MODEL, "reward_model_path": "trl-lib/Qwen2-0.5B-Reward"}
    plan = read(values, kind="command", program="python examples/scripts/dpo_online.py")
    assert plan.unsupported == {}
    expected = {"trainer": "trl-online-dpo", "dtype": "fp32", "seq_len": 512, "max_completion_length": 64}
    assert {name: plan.options.get(name) for name in expected} == expected
    longer = {**values, "max_length": 1024, "max_new_tokens": 53, "use_vllm": True}
    plan = read(longer, kind="command", program="python examples/scripts/online_dpo.py")
    assert (plan.options["seq_len"], plan.options["max_completion_length"]) == (1024, 53)
    assert plan.unsupported.keys() == {"use_vllm"}


@pytest.mark.parametrize("key", ["zero_stage", "random_ltd"])
def test_programs_of_deepspeed_examples_are_not_read_as_trl(key: str) -> None:
    """DeepSpeed-Chat's `main.py` and `run_clm_no_trainer.py` have loops of their own; their command lines look like TRL's."""
    values = {"model_name_or_path": "facebook/opt-1.3b", "gradient_accumulation_steps": 8, key: True}
    assert read(values, kind="command", program="deepspeed").tool == "other"


def test_a_script_of_a_trainer_that_trl_has_no_more() -> None:
    """`import trl.experimental.bco` of trl 1.16 raises."""
    why = read(MODEL, kind="command", program="python examples/scripts/bco.py").unsupported["trainer"].why
    assert "raises ModuleNotFoundError: it no longer has trl.experimental.bco, " in why


@pytest.mark.parametrize("script", ["xpo", "nash_md"])
def test_scripts_whose_reference_writes_too_are_counted_for_the_last_trl_that_has_them(script: str) -> None:
    values = {**MODEL, "reward_model_path": "trl-lib/Qwen2-0.5B-Reward", "max_new_tokens": 53}
    plan = read(values, kind="command", program=f"python examples/scripts/{script}.py")
    assert plan.unsupported == {}
    expected = {"trainer": f"trl-{script.replace('_', '-')}", "dtype": "fp32", "seq_len": 512, "max_completion_length": 53}
    assert {name: plan.options.get(name) for name in expected} == expected
    assert "before 1.16" in str(plan.assumed["trainer"])
    vllm = read({**values, "use_vllm": True}, kind="command", program=f"python examples/scripts/{script}.py")
    assert vllm.unsupported.keys() == {"use_vllm"}


def test_ppo_loads_its_policy_by_another_name_than_its_tokenizer() -> None:
    """ppo.py: the policy is that of `sft_model_path`, by default Pythia 160M, as the reward model."""
    values = {"model_name_or_path": "EleutherAI/pythia-1b-deduped", "per_device_train_batch_size": 64}
    plan = read(values, kind="command", program="python examples/scripts/ppo/ppo.py")
    assert plan.unsupported == {}
    expected = {"trainer": "trl-ppo", "reward_model": "EleutherAI/pythia-160m", "seq_len": 512 + 53, "autocast": "none"}
    assert {name: plan.options.get(name) for name in expected} == expected
    assert plan.model == "EleutherAI/pythia-160m"
    in_parts = read(
        {**values, "local_rollout_forward_batch_size": 1}, kind="command", program="python examples/scripts/ppo/ppo.py"
    )
    assert (in_parts.unsupported, in_parts.options["rollout_batch_size"]) == ({}, 1)
    for parts, unsupported in ((1, set()), (4, {"num_mini_batches"})):
        in_batches = read({**values, "num_mini_batches": parts}, kind="command", program="python examples/scripts/ppo/ppo.py")
        assert in_batches.unsupported.keys() == unsupported


@pytest.mark.parametrize("script", ["gold", "gkd"])
def test_a_script_of_another_trainer_is_not_read_as_sft(script: str) -> None:
    plan = read(MODEL, kind="command", program=f"python examples/scripts/{script}.py")
    assert plan.unsupported["trainer"].effect == "unknown"


def test_packed_rows_of_trl_are_one_row_under_flash_attention() -> None:
    """Two packed rows of 1,024 tokens; max_seq_length is the old name of max_length."""
    packed = {**MODEL, "packing": True, "per_device_train_batch_size": 2, "attn_implementation": "flash_attention_2"}
    for lengths, seq_len in (({}, 2048), ({"max_length": 512}, 1024), ({"max_seq_length": 4096}, 8192)):
        plan = read({**packed, **lengths}, kind="command", program="trl sft")
        assert (plan.options["batch_size"], plan.options["seq_len"]) == (1, seq_len)
        assert not plan.unsupported
    for other in ({"attn_implementation": "eager"}, {"attn_implementation": "flex_attention"}):
        assert {"packing"} <= read({**packed, **other}, kind="command", program="trl sft").unsupported.keys()


def test_packed_rows_of_trl_under_sdpa_have_a_mask_of_their_documents() -> None:
    """Of tokens x tokens, in booleans."""
    packed = {**MODEL, "packing": True, "per_device_train_batch_size": 2}
    plan = read(packed, kind="command", program="python trl/scripts/sft.py")
    assert plan.unsupported == {}
    assert (plan.options["trainer"], plan.options["batch_size"], plan.options["seq_len"]) == ("trl-packed", 1, 2048)
    job: dict[str, Any] = {"model": "qwen2.5-0.5b", "method": "lora", "seq_len": 2048}
    lines = peftplan.estimate(**job, trainer="trl-packed").to_dict()["memory"]["lines"]
    assert [line["bytes"] for line in lines if line["name"] == "model attention_mask"] == [2048 * 2048]
    for other in ({"attn_implementation": "eager"}, {"batch_size": 2}):
        assert peftplan.estimate(**job, trainer="trl-packed", **other).to_dict()["memory"]["peak_allocated"] is None
    for lengths, key in (({"max_seq_length": 4096}, "packing"), ({"max_length": None}, "max_length")):
        assert read({**packed, **lengths}, kind="command", program="python trl/scripts/sft.py").unsupported.keys() == {key}
    with pytest.raises(RefusedError, match="joins 2 rows of 2048 tokens into one; use --batch-size 1 --seq-len 4096"):
        peftplan.estimate(**job, trainer="trl-packed", batch_size=2, engine="trace")


@pytest.mark.parametrize(
    ("attention", "trainer"),
    [("", "trl-packed"), (', attn_implementation="flash_attention_2"', "trl"), (', attn_implementation="eager"', None)],
)
def test_a_script_that_packs_has_one_row(attention: str, trainer: str | None) -> None:
    lines = [line for line in TRL_SCRIPT.splitlines() if not line.startswith("quantization = ")]
    script = "\n".join(lines).replace("packing=False", "packing=True").replace(", quantization_config=quantization", attention)
    plan = read_text(script, file="train.py")
    assert plan.unsupported.keys() == (set() if trainer else {"args.packing"})
    if trainer:
        assert (plan.options["trainer"], plan.options["batch_size"], plan.options["seq_len"]) == (trainer, 1, 4 * 512)


def test_tools_answer_within_the_completions_that_vllm_writes() -> None:
    program = "python examples/scripts/grpo_agent.py"
    plan = read({**MODEL, "use_vllm": True, "max_completion_length": 1024}, kind="command", program=program)
    assert plan.unsupported == {}
    assert (plan.options["trainer"], plan.options["seq_len"]) == ("trl-grpo", 512 + 1024)
    assert read(MODEL, kind="command", program=program).unsupported["trainer"].effect == "unknown"


def test_ssd_learns_the_completions_that_it_writes() -> None:
    """SSDTrainer of trl before 1.11, rehearsed with Qwen2 of four layers in bf16: 2 x 2 prompts of 256 tokens, completions of as
    many; 2,538,878,464 bytes in backward. What it reserves is not stated."""
    program = "python examples/scripts/ssd.py"
    values = {**MODEL, "prompt_column": "question", "max_prompt_length": 1024, "max_completion_length": 512}
    plan = read(values, kind="command", program=program)
    assert plan.unsupported == {}
    assert (plan.options["trainer"], plan.options["seq_len"]) == ("trl-ssd", 1536)
    assert read({**values, "use_vllm": True}, kind="command", program=program).unsupported.keys() == {"use_vllm"}
    memory = peftplan.estimate(config=plan).to_dict()["memory"]
    assert memory["peak_allocated"] > 0
    assert memory["peak_reserved"] is None
    gpt2 = peftplan.estimate("gpt2", trainer="trl-ssd", method="full")
    assert gpt2.to_dict()["memory"]["peak_allocated"] is None
    lora = peftplan.estimate("qwen2.5-0.5b", trainer="trl-ssd", method="lora")
    assert lora.to_dict()["memory"]["peak_allocated"] is None


def test_dpo_of_pictures_has_the_peak_of_rows_without_any() -> None:
    values = {"model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct", "dtype": "bfloat16", "use_peft": True}
    values |= {"lora_target_modules": "all-linear", "loss_type": ["sigmoid", "bco_pair", "sft"]}
    plan = read(values, kind="command", program="accelerate launch examples/scripts/mpo_vlm.py")
    assert (plan.unsupported, plan.options["trainer"], plan.options["device_map"]) == ({}, "trl-dpo", "none")
    answer = peftplan.estimate(config=plan).to_dict()
    assert answer["memory"]["scope"] == "text"
    assert answer["memory"]["peak_reserved"] > answer["memory"]["peak_allocated"] > 0


def test_a_server_of_trl_trains_nothing() -> None:
    plan = read({"model": "Qwen/Qwen2.5-7B", "tensor-parallel-size": 2}, kind="command", program="trl vllm-serve")
    assert plan.kind == "other"


def test_a_recipe_of_pairs_whose_trainer_the_user_names() -> None:
    """A YAML with `beta` may be DPO's, ORPO's, CPO's or KTO's: its script says which one; the flag stands in for it."""
    recipe = {**TRL, "beta": 0.05}
    plan = read(recipe)
    assert plan.unsupported["trainer"].why.endswith("name it, such as --trainer trl-dpo")
    assert peftplan.estimate(config=plan).peaks is None
    by_flag = peftplan.estimate(config=plan, trainer="trl-dpo")
    by_script = peftplan.estimate(config=read(recipe, kind="command", program="trl dpo"))
    assert by_flag.bound is None
    assert by_flag.peaks == by_script.peaks


def test_dpo_pads_rows_although_it_is_told_not_to() -> None:
    """trainer/dpo_trainer.py:733 warns, and pads; SFTTrainer does not."""
    rows = {**TRL, "beta": 0.05, "padding_free": True}
    assert not read_values(rows, file="recipes/smollm3/dpo/apo.yaml").unsupported
    assert "padding_free" in read_values({**TRL, "padding_free": True}, file="recipes/smollm3/sft/sft.yaml").unsupported


def test_liger_leaves_model_types_alone_that_it_does_not_know() -> None:
    """liger-kernel, transformers/monkey_patch.py: `_apply_liger_kernel_to_instance` logs that, and returns."""
    names = {
        model: read_values({**TRL, "model_name_or_path": model, "use_liger_kernel": True}, file="a.yaml").options["kernels"]
        for model in ("CohereLabs/tiny-aya-global", "Qwen/Qwen3-0.6B")
    }
    assert names == {"CohereLabs/tiny-aya-global": (), "Qwen/Qwen3-0.6B": "liger"}


def test_the_handbook_s_old_name_of_flash_attention() -> None:
    recipe = {**TRL, "use_flash_attention_2": True}
    assert read(recipe).options["attn_implementation"] == "flash_attention_2"
    assert read(recipe).unsupported == {}


def test_a_quantization_config_that_no_model_is_loaded_with() -> None:
    """A program that leaves it out of from_pretrained trains in 16 or 32 bits: its peak is none of a base in 4 bits."""
    program = """
model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B"{})
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
trainer = SFTTrainer(model=model, args=SFTConfig(output_dir="out"), peft_config=LoraConfig(r=8))
"""
    handed = read_text(program.format(", quantization_config=quantization"), file="train.py")
    assert (handed.options["quant"], handed.unsupported) == ("nf4", {})
    left_out = read_text(program.format(""), file="train.py")
    assert left_out.unsupported.keys() == {"quant.load_in_4bit"}
    assert peftplan.estimate(config=left_out).peaks is None
    assert peftplan.estimate(config=left_out, quant="none").bound is None


@pytest.mark.parametrize(
    ("file", "trainer"),
    [
        ("recipes/zephyr-7b-beta/dpo/config_full.yaml", "trl-dpo"),
        ("config_dpo.yaml", "trl-dpo"),
        ("recipes/llama3/orpo/config.yaml", "trl-orpo"),
        ("recipes/llama3/online_dpo/config.yaml", None),
        ("recipes/llama3/simpo/config.yaml", None),
        ("recipes/dpo-and-kto/kto/config.yaml", None),
        ("kto_after_dpo.yaml", None),
        ("orpo_dpo.yaml", None),
    ],
)
def test_a_recipe_of_pairs_in_the_folder_of_its_trainer(file: str, trainer: str | None) -> None:
    plan = read_values({**TRL, "beta": 0.05}, file=file)
    assert ("trainer" in plan.unsupported) is (trainer is None)
    if trainer is not None:
        assert plan.options["trainer"] == trainer
        assert "folder or name" in plan.assumed["trainer"]


@pytest.mark.parametrize("other", [{"num_generations": 8}, {"teacher_model_name_or_path": "Qwen/Qwen3-4B"}])
def test_keys_of_another_trainer_win_over_a_folder_of_dpo(other: dict[str, object]) -> None:
    assert read_values({**TRL, "beta": 0.05, **other}, file="runs/dpo/config.yaml").options.get("trainer") != "trl-dpo"


@pytest.mark.parametrize("use_vllm", [True, False])
@pytest.mark.parametrize("tools", ["tools=[search]", "environment_factory=Game"])
def test_tools_of_grpo_answer_within_the_completion(use_vllm: bool, tools: str) -> None:
    """trl, grpo_trainer.py:2132: "Truncate so that … does not exceed max_completion_length"; vLLM has the cache of the turns."""
    source = f"""
from trl import GRPOConfig, GRPOTrainer
trainer = GRPOTrainer(
    model="Qwen/Qwen3-0.6B",
    reward_funcs=score,
    {tools},
    args=GRPOConfig(use_vllm={use_vllm}, generation_batch_size=64, max_tool_calling_iterations=3),
)
"""
    plan = read_text(source, file="a.py")
    assert set(plan.unsupported) == (set() if use_vllm else {"args.generation_batch_size"})
    assert ("tool_turns" in plan.options) is (not use_vllm)


def test_one_completion_of_a_prompt_is_compared_with_none() -> None:
    """trl's example of CARLA writes as many completions as it has servers, by default one (trl, grpo_config.py:1137);
    with two servers it runs."""
    source = """
parser = argparse.ArgumentParser()
parser.add_argument("--env-urls", nargs="+", default=["https://a.hf.space"])
args = parser.parse_args()
GRPOTrainer(model="Qwen/Qwen3-0.6B", args=GRPOConfig(num_generations=len(args.env_urls)))
"""
    assert " raises ValueError" in read_text(source, file="a.py").unsupported["args.num_generations"].why
    of_servers = "per_device_train_batch_size=len(args.env_urls), steps_per_generation=1, num_generations"
    plan = read_text(source.replace("num_generations", of_servers), file="a.py")
    assert " raises ValueError" in plan.refused["args.num_generations"].why
    assert (plan.unsupported, plan.options["batch_size"]) == ({}, 2)


def test_a_trainer_quantizes_the_model_that_it_loads_by_name() -> None:
    """trl, sft_trainer.py:690; a model that is loaded already keeps its weights (704)."""
    source = """
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer
model = {model}
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
SFTTrainer(model=model, args=SFTConfig(), peft_config=LoraConfig(), quantization_config=quantization)
"""
    by_name = read_text(source.format(model='"Qwen/Qwen3-0.6B"'), file="a.py")
    assert not by_name.unsupported
    assert by_name.options["quant"] == "nf4"
    loaded = read_text(source.format(model='AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")'), file="a.py")
    assert "trainer.quantization_config" in loaded.unsupported


@pytest.mark.parametrize(("values", "dtype"), [({"dtype": None}, "bf16"), ({"torch_dtype": None}, "bf16"), ({}, "fp32")])
def test_an_empty_dtype_is_that_of_the_checkpoint(values: dict[str, None], dtype: str) -> None:
    """trl, scripts/sft.py:80 hands None to from_pretrained, whose default is the checkpoint's dtype; ModelConfig's is float32."""
    recipe = {"model_name_or_path": "mistralai/Mistral-7B-v0.1", "per_device_train_batch_size": 1, **values}
    assert peftplan.estimate(config=read(recipe)).assumptions["dtype"] == dtype


def test_numbers_of_a_loss_and_of_a_reference_that_is_not_synchronized() -> None:
    """trl 1.16: `tpo_l_gamma` is a scalar (experimental/tpo/tpo_trainer.py:688); without `sync_ref_model` no callback reads the
    other two (trainer/dpo_trainer.py:992)."""
    base: dict[str, object] = {"model_name_or_path": "Qwen/Qwen3-0.6B", "per_device_train_batch_size": 1}
    numbers = {"ref_model_sync_steps": 512, "ref_model_mixup_alpha": 0.6}
    dpo = read_values({**base, **numbers}, file="a.sh", tool="trl", kind="command", program="trl dpo")
    assert not dpo.unsupported
    assert numbers.keys() <= dpo.ignored.keys()
    synchronized = {**base, **numbers, "sync_ref_model": True}
    plan = read_values(synchronized, file="a.sh", tool="trl", kind="command", program="trl dpo")
    assert plan.unsupported.keys() == {"sync_ref_model"}
    of_tpo = {**base, "loss_type": "tpo-l", "tpo_l_gamma": 0.5}
    assert not read_values(of_tpo, file="a.sh", tool="trl", kind="command", program="python examples/scripts/tpo.py").unsupported


@pytest.mark.parametrize(
    ("other", "file", "known"),
    [
        ({"loss_type": "sigmoid"}, "a.yml", False),
        ({"loss_type": ["sigmoid"]}, "a.yml", False),
        ({"loss_type": "dft"}, "a.yml", True),
        ({}, "config_dpo.yaml", False),
        ({}, "dpo-project/sft.yaml", True),
    ],
)
def test_a_file_of_another_trainer_is_not_read_as_sft(other: dict[str, object], file: str, known: bool) -> None:
    """trl 1.16, trainer/sft_trainer.py:1042: SFTTrainer has `nll` and `dft`, whose sum is of the same numbers."""
    values = {"model_name_or_path": "Qwen/Qwen3-0.6B", "use_peft": True, "max_length": 512, **other}
    assert ("trainer" not in read_values(values, file=file, tool="trl").unsupported) is known


def test_a_strategy_of_packing_that_trl_renamed_is_counted_by_its_new_name() -> None:
    values = {
        "model_name_or_path": "Qwen/Qwen3-0.6B",
        "attn_implementation": "flash_attention_2",
        "packing": True,
        "max_length": 4096,
    }
    plans = [read({**values, "packing_strategy": strategy}, tool="trl") for strategy in ("ffd", "bfd")]
    renamed, named = (of_plan(plan) for plan in plans)
    assert renamed.peak_allocated == named.peak_allocated is not None
    assert (renamed.refused is not None, named.refused) == (True, None)


def test_the_user_s_attention_decides_what_packing_means(tmp_path: Path) -> None:
    """A file alone may be that of any program, whose mask of packed rows depends on its attention."""
    values = {"model_name_or_path": "Qwen/Qwen3-0.6B", "packing": True, "max_length": 512, "per_device_train_batch_size": 2}
    file = tmp_path / "a.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    open_peak, eager, flash = (
        peftplan.estimate(config=file, tool="trl", attn_implementation=name) for name in (None, "eager", "flash_attention_2")
    )
    assert (open_peak.peaks, eager.peaks) == (None, None)
    file.write_text(json.dumps({**values, "attn_implementation": "flash_attention_2"}), encoding="utf-8")
    named = peftplan.estimate(config=file, tool="trl")
    assert flash.peaks is not None
    assert flash.peaks == named.peaks
    assert flash.config is not None
    assert "attn_implementation" not in flash.config["read"]


@pytest.mark.parametrize("is_old", [True, False])
def test_the_old_name_of_max_length_says_that_an_earlier_release_runs(is_old: bool) -> None:
    """SFTConfig no longer has `max_seq_length`: a file with it ran with an earlier release, whose loss may keep all logits."""
    key = "max_seq_length" if is_old else "max_length"
    recipe = f"model_name_or_path: Qwen/Qwen2.5-0.5B\ndataset_mixer: {{a: 1.0}}\n{key}: 512\nper_device_train_batch_size: 2\n"
    program = f"trainer = SFTTrainer('Qwen/Qwen2.5-0.5B', args=SFTConfig({key}=512))\ntrainer.train()\n"
    for name, text in (("sft.yaml", recipe), ("sft.py", f"from trl import SFTConfig, SFTTrainer\n{program}")):
        plan = read_text(text, file=name)
        assert plan.options["seq_len"] == 512
        assert ("trl" in plan.assumed) == is_old


@pytest.mark.parametrize("beta", ["0.5", "1", "1.0", "0", "0.0"])
def test_the_weight_of_gkd_is_read_however_it_is_written(beta: str) -> None:
    """trl, experimental/gkd: at 0 and 1 `generalized_jsd_loss` makes one divergence and no mixture."""
    command = "python trl/scripts/gkd.py --model_name_or_path Qwen/Qwen2.5-0.5B --teacher_model_name_or_path Qwen/Qwen2.5-1.5B"
    plan = read_text(f"{command} --output_dir x --beta {beta}\n", file="gkd.sh")
    assert plan.options["beta"] == float(beta)
    assert not plan.unsupported

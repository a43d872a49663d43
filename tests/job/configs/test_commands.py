"""Commands that name a file of settings, or a program of the user's own: both are read, and the command's words win."""

from pathlib import Path

import pytest

import peftplan
from peftplan.errors import RefusedError
from peftplan.job.configs.read import read_config
from peftplan.planning.configs import configs

FACTORY = """
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
stage: sft
do_train: true
finetuning_type: lora
template: qwen
dataset: d
"""
PROGRAM = """
import sys
from dataclasses import dataclass, field
import torch, transformers
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer
from peft import LoraConfig, get_peft_model

@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="facebook/opt-125m")
    lora_r: int = field(default=4)

@dataclass
class TrainingArguments(transformers.TrainingArguments):
    optim: str = field(default="adamw_torch")
    model_max_length: int = field(default=512)

def main():
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, training_args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, training_args = parser.parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, torch_dtype=torch.half)
    model = get_peft_model(model, LoraConfig(r=model_args.lora_r, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    Trainer(model=model, args=training_args).train()

main()
"""


def test_settings_of_a_command_are_read(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(FACTORY + "per_device_train_batch_size: 4\n")
    (tmp_path / "run.sh").write_text("CUDA_VISIBLE_DEVICES=0 llamafactory-cli train lora.yaml per_device_train_batch_size=2\n")
    plan = read_config(tmp_path / "run.sh")
    assert plan.tool == "llamafactory"
    assert plan.files == (str(tmp_path / "run.sh"), str(tmp_path / "lora.yaml"))
    assert plan.options["batch_size"] == 2
    assert plan.options["method"] == "lora"


TRL = "model_name_or_path: facebook/opt-350m\ndataset_name: d\nuse_peft: true\nlora_r: 8\nmax_length: 512\n"


def test_settings_count_beside_a_model_that_the_command_names(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(TRL)
    (tmp_path / "run.sh").write_text("trl sft --config lora.yaml --model_name_or_path facebook/opt-125m --lora_r 32\n")
    plan = read_config(tmp_path / "run.sh")
    assert plan.model == "facebook/opt-125m"
    assert {name: plan.options.get(name) for name in ("method", "r", "seq_len")} == {"method": "lora", "r": 32, "seq_len": 512}
    (tmp_path / "lora.yaml").unlink()
    with pytest.raises(RefusedError, match=r"takes its settings from lora\.yaml"):
        read_config(tmp_path / "run.sh")


@pytest.mark.parametrize(
    ("command", "trainer"),
    [
        ("trl sft", "trl"),
        ("trl dpo", "trl-dpo"),
        ("trl kto", "trl-kto"),
        ("accelerate launch trl/scripts/dpo.py", "trl-dpo"),
        ("accelerate launch scripts/train.py", "trl"),
    ],
)
def test_the_program_decides_who_trains_by_its_settings(tmp_path: Path, command: str, trainer: str) -> None:
    (tmp_path / "lora.yaml").write_text(TRL)
    (tmp_path / "run.sh").write_text(f"{command} --config lora.yaml\n")
    plan = read_config(tmp_path / "run.sh")
    assert plan.options.get("trainer") == trainer
    assert not plan.unsupported


def test_a_program_named_after_another_trainer_has_no_peak(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(TRL)
    (tmp_path / "run.sh").write_text("accelerate launch scripts/run_dpo.py --config lora.yaml\n")
    assert "name it, such as --trainer trl-dpo" in read_config(tmp_path / "run.sh").unsupported["program"].why
    assert peftplan.estimate(config=tmp_path / "run.sh").peaks is None
    assert peftplan.estimate(config=tmp_path / "run.sh", trainer="trl-dpo").peaks is not None


def test_processes_of_a_command_count_for_a_tool_without_commands_of_its_own(tmp_path: Path) -> None:
    values = "base_model: meta-llama/Llama-3.1-8B\nadapter: lora\nlora_target_linear: true\nsequence_len: 512\n"
    (tmp_path / "lora.yml").write_text(values + "deepspeed: ds/zero2.json\nbf16: true\n")
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "zero2.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    (tmp_path / "run.sh").write_text("accelerate launch --num_processes 8 --num_machines 2 -m axolotl.cli.train lora.yml\n")
    plan = read_config(tmp_path / "run.sh")
    assert plan.tool == "axolotl"
    assert {name: plan.options.get(name) for name in ("gpus", "nodes", "strategy")} == {
        "gpus": 4,
        "nodes": 2,
        "strategy": "zero2",
    }
    assert not plan.unsupported


def test_a_launch_file_of_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PARSED)
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    run = tmp_path / "run.sh"
    run.write_text("accelerate launch --config_file ours.yaml train.py --model_name_or_path facebook/opt-350m\n")
    assert "add it with another --config" in read_config(run).unsupported["accelerate: config_file"].why
    plan = read_config([run, tmp_path / "zero2.json"])
    assert plan.options["strategy"] == "zero2"
    assert not plan.unsupported
    run.write_text(run.read_text().replace("--config_file ours.yaml", "--deepspeed_config_file zero2.json"))
    assert read_config(run).options["strategy"] == "zero2"


def test_words_of_a_launcher_count_for_a_program(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PARSED)
    command = "accelerate launch --mixed_precision fp16 --num_processes $GPUS train.py --model_name_or_path facebook/opt-350m\n"
    (tmp_path / "run.sh").write_text(command)
    plan = read_config(tmp_path / "run.sh")
    assert plan.options["autocast"] == "fp16"
    assert plan.assumed["gpus"] == "the launcher's number is $GPUS; 1 is assumed"


def test_a_dotted_word_overrides_a_nested_key(tmp_path: Path) -> None:
    model = "model:\n  _component_: torchtune.models.llama3_1.lora_llama3_1_8b\n  lora_rank: 8\n  lora_alpha: 16\n"
    values = f"{model}  lora_attn_modules: [q_proj]\n  apply_lora_to_mlp: false\nbatch_size: 2\ndtype: bf16\n"
    (tmp_path / "lora.yaml").write_text(values)
    command = "tune run lora_finetune_single_device --config lora.yaml model.lora_rank=32 batch_size=1\n"
    (tmp_path / "run.sh").write_text(command)
    plan = read_config(tmp_path / "run.sh")
    assert plan.options["r"] == 32
    assert plan.options["batch_size"] == 1


def test_settings_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("llamafactory-cli train other/lora.yaml\n")
    with pytest.raises(RefusedError, match=r"takes its settings from other/lora\.yaml"):
        read_config(tmp_path / "run.sh")


def test_a_program_gets_the_words_of_its_command(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    command = "torchrun --nproc_per_node=4 train.py --model_name Qwen/Qwen2.5-7B --lora_r 64 --bf16 True \\\n"
    (tmp_path / "run.sh").write_text(command + "  `# a row on each GPU` --per_device_train_batch_size 1\n")
    plan = read_config(tmp_path / "run.sh")
    assert plan.tool == "transformers-script"
    assert plan.model == "Qwen/Qwen2.5-7B"
    wanted = {"r": 64, "batch_size": 1, "gpus": 4, "optim": "adamw_torch", "autocast": "bf16", "dtype": "fp16"}
    assert {name: plan.options.get(name) for name in wanted} == wanted
    assert not plan.unsupported


def test_a_word_of_no_class_stays_unknown(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "run.sh").write_text("python train.py --offload_everything True\n")
    assert "args.offload_everything" in read_config(tmp_path / "run.sh").unsupported


PARSED = """
import argparse, transformers
from transformers import AutoModelForCausalLM, Trainer
from peft import LoraConfig, get_peft_model
parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path")
parser.add_argument("--lora-r", type=int, default=2)
parser.add_argument("--bf16", action="store_true")
args = parser.parse_args()
model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
model = get_peft_model(model, LoraConfig(r=args.lora_r, target_modules=["q_proj"], task_type="CAUSAL_LM"))
Trainer(model=model, args=transformers.TrainingArguments(bf16=args.bf16)).train()
"""


def test_a_parser_of_the_program_gets_them_too(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PARSED)
    (tmp_path / "run.sh").write_text("python train.py --model_name_or_path facebook/opt-350m --lora-r 16 --bf16\n")
    plan = read_config(tmp_path / "run.sh")
    assert plan.model == "facebook/opt-350m"
    assert (plan.options["r"], plan.options["autocast"]) == (16, "bf16")
    assert "r" not in plan.assumed


@pytest.mark.parametrize("word", ["--offload", "--lora 4", "--no-bf16"])
def test_a_word_that_the_program_does_not_read_is_named(tmp_path: Path, word: str) -> None:
    (tmp_path / "train.py").write_text(PARSED)
    (tmp_path / "run.sh").write_text(f"python train.py --model_name_or_path facebook/opt-350m {word}\n")
    name = word.split()[0].lstrip("-").replace("-", "_")
    assert "not seen to read" in read_config(tmp_path / "run.sh").unsupported[name].why


def test_words_of_the_script_s_caller_are_not_those_of_an_option(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PARSED)
    (tmp_path / "run.sh").write_text('python train.py --model_name_or_path facebook/opt-350m --lora-r 16 "$@"\n')
    plan = read_config(tmp_path / "run.sh")
    assert plan.options["r"] == 16
    assert not plan.unsupported


def test_a_variable_that_the_command_sets_has_no_default(tmp_path: Path) -> None:
    text = PARSED.replace("r=args.lora_r", 'r=int(os.environ.get("LORA_R", 8))').replace("import argparse", "import os, argparse")
    (tmp_path / "train.py").write_text(text)
    (tmp_path / "run.sh").write_text("LORA_R=64 python train.py --model_name_or_path facebook/opt-350m\n")
    assert "lora.r" in read_config(tmp_path / "run.sh").unsupported


def test_a_module_beside_the_program_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("MODEL = {'name': 'facebook/opt-350m', 'r': 16}\n")
    text = "from config import MODEL as M\n" + PROGRAM.replace("model_args.model_name_or_path", "M['name']")
    (tmp_path / "train.py").write_text(text.replace("model_args.lora_r", "M['r']"))
    (tmp_path / "run.sh").write_text("python train.py --bf16 true\n")
    plan = read_config(tmp_path / "run.sh")
    assert (plan.model, plan.options["r"]) == ("facebook/opt-350m", 16)


def test_a_module_is_the_one_beside_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "config.py").write_text("MODEL = 'facebook/opt-1.3b'\n")
    (tmp_path / "jobs" / "config.py").write_text("MODEL = 'facebook/opt-350m'\n")
    text = "from config import MODEL\n" + PARSED.replace("args.model_name_or_path", "MODEL")
    (tmp_path / "jobs" / "train.py").write_text(text)
    (tmp_path / "jobs" / "above.py").write_text(text.replace("from config", "from ..config"))
    monkeypatch.chdir(tmp_path)
    assert read_config("jobs/train.py").model == "facebook/opt-350m"
    assert read_config("jobs/above.py").model == "facebook/opt-1.3b"


def test_a_command_runs_in_the_folder_that_its_script_enters(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "train.py").write_text(PARSED)
    (tmp_path / "jobs" / "train.py").write_text(PARSED.replace("default=2", "default=4"))
    (tmp_path / "run.sh").write_text("cd jobs\npython train.py --model_name_or_path facebook/opt-350m\n")
    assert read_config(tmp_path / "run.sh").options["r"] == 4


def test_a_program_of_which_nothing_is_known_stays_one(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('no model')\n")
    (tmp_path / "run.sh").write_text("python train.py --lr 1\n")
    assert read_config(tmp_path / "run.sh").tool == "other"


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/mnt/LLM-Research/Meta-Llama-3___1-8B-Instruct", "llama-3.1-8b"),
        ("/x/hub/models--Qwen--Qwen2.5-72B-Instruct/snapshots/495f39366efef23836d0cfae4fbe635880d2be31", "qwen2.5-72b"),
        ("/home/a/models/Llama3.2-1B/", "llama-3.2-1b"),
    ],
)
def test_folders_that_are_named_after_a_model(tmp_path: Path, path: str, model: str) -> None:
    from peftplan.arch import catalogue

    (tmp_path / "lora.yaml").write_text(FACTORY.replace("Qwen/Qwen2.5-7B-Instruct", path))
    plan = read_config(tmp_path / "lora.yaml")
    entry = catalogue.find(plan.model or "")
    assert entry is not None
    assert entry.name == model
    assert "by its name" in plan.assumed["model"]


def test_a_launch_file_of_another_machine_stands_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(FACTORY + "deepspeed: /data/jobs/ours_z3.json\n")
    (tmp_path / "ours_z3.json").write_text('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}')
    plan = read_config(tmp_path / "lora.yaml")
    assert plan.options["strategy"] == "zero3"
    assert "is read in its place" in plan.assumed["deepspeed"]


def test_inference_is_no_training(tmp_path: Path) -> None:
    (tmp_path / "chat.yaml").write_text("model_name_or_path: saves/full\ntemplate: llama3\n")
    (tmp_path / "eval.yaml").write_text(FACTORY.replace("do_train: true", "do_train: 0\ndo_eval: 1"))
    assert [read_config(tmp_path / name).kind for name in ("chat.yaml", "eval.yaml")] == ["other", "other"]


def test_a_folder_of_another_machine_asks_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(FACTORY.replace("Qwen/Qwen2.5-7B-Instruct", "/mnt/models/our-own-chat/"))
    with pytest.raises(RefusedError, match=r"/mnt/models/our-own-chat/ is not here; add the MODEL that it holds"):
        peftplan.estimate(config=tmp_path / "lora.yaml")
    assert peftplan.estimate("qwen2.5-7b", config=tmp_path / "lora.yaml").trainable_parameters
    (entry,) = configs(tmp_path / "lora.yaml")
    assert entry.error == "/mnt/models/our-own-chat/ is not here; name its model: peftplan estimate MODEL --config lora.yaml"


def test_a_program_without_its_command_says_where_its_model_is(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PARSED.replace('path")', 'path", required=True)'))
    (entry,) = configs(tmp_path / "train.py")
    assert entry.error == "it takes its model from args.model_name_or_path; add MODEL, or name the script that runs it"


def test_names_in_one_text_are_divided(tmp_path: Path) -> None:
    program = PARSED.replace('["q_proj"]', 'args.targets.split(",")')
    (tmp_path / "train.py").write_text(program.replace("args = p", 'parser.add_argument("--targets")\nargs = p'))
    (tmp_path / "run.sh").write_text("python train.py --model_name_or_path facebook/opt-350m --targets q_proj,v_proj\n")
    assert read_config(tmp_path / "run.sh").options["target_modules"] == ("q_proj", "v_proj")


def test_a_trainer_without_settings_asks_for_its_command(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    (entry,) = configs(tmp_path / "train.py")
    assert entry.error == "Trainer: the program has its settings from its command line; name the shell script that launches it"
    with pytest.raises(RefusedError, match="name the shell script that launches it"):
        peftplan.estimate(config=tmp_path / "train.py")

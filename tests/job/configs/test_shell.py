"""Shell scripts: which command of a script trains, what belongs to its launcher, and where its settings stand."""

from __future__ import annotations

from pathlib import Path
from time import process_time

import pytest

import peftplan
from peftplan.errors import PeftplanError, RefusedError
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_config, read_text
from peftplan.report.configs import summary

LLAMA_FACTORY = """
    --stage sft --do_train --model_name_or_path Qwen/Qwen3-8B --dataset mine --template qwen3 --finetuning_type lora
    --lora_rank 16 --lora_target q_proj,v_proj --cutoff_len 4096 --per_device_train_batch_size 2 --bf16 --output_dir out
"""
ARGUMENTS = " ".join(LLAMA_FACTORY.split())
SWIFT = "swift sft --model Qwen/Qwen2.5-7B-Instruct --tuner_type lora --dataset mine"


def read(tmp_path: Path, script: str) -> ConfigPlan:
    file = tmp_path / "train.sh"
    file.write_text(script, encoding="utf-8")
    return peftplan.read_config(file)


@pytest.mark.parametrize(
    "command",
    [
        "llamafactory-cli train",
        "python src/train_bash.py",
        "deepspeed --include localhost:0 --master_port 9901 src/train.py",
        "srun --ntasks 1 torchrun --nproc_per_node 1 --nnodes=1 --node_rank=0 --master_addr=127.0.0.1 src/train.py",
    ],
)
def test_commands_of_llama_factory(tmp_path: Path, command: str) -> None:
    plan = read(tmp_path, f"#!/bin/bash\nset -x\nexport WANDB_MODE=offline\n{command} {ARGUMENTS}\n")
    expected = {"method": "lora", "r": 16, "seq_len": 4096, "batch_size": 2, "target_modules": "q_proj,v_proj"}
    assert (plan.tool, plan.model, plan.unsupported) == ("llamafactory", "Qwen/Qwen3-8B", {})
    assert {name: plan.options.get(name) for name in expected} == expected


def test_words_before_the_script_are_the_launcher_s(tmp_path: Path) -> None:
    plan = read(tmp_path, f"torchrun --nproc-per-node 4 --nnodes 2 --master_port 29500 src/train.py {ARGUMENTS}")
    assert (plan.options["gpus"], plan.options["nodes"]) == (4, 2)
    assert plan.ignored["master_port"].why == "how processes find each other"


@pytest.mark.parametrize(
    "script",
    [
        f"ARGS=(\n {LLAMA_FACTORY} # mine\n)\nARGS+=(--lora_alpha 32)\ntorchrun --nproc_per_node 2 src/train.py \"${{ARGS[@]}}\"",
        f'args="\n{LLAMA_FACTORY}"\ntorchrun --nproc_per_node 2 src/train.py ${{args}}',
        # a comment does not go on in the next line, whatever its end
        f"# torchrun src/train.py \\\n  # --lora_rank 8 \\\ntorchrun --nproc_per_node ${{1:-2}} src/train.py \\\n  {ARGUMENTS}",
        f"python prepare.py --rows 100\nbash -c 'torchrun --nproc_per_node 2 src/train.py {ARGUMENTS}'",
    ],
)  # fmt: skip
def test_variables_arrays_and_comments(tmp_path: Path, script: str) -> None:
    plan = read(tmp_path, script)
    assert (plan.model, plan.options["r"], plan.options["gpus"]) == ("Qwen/Qwen3-8B", 16, 2)
    assert plan.unsupported == {}


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("llamafactory-cli train examples/train_lora/mine.yaml", "examples/train_lora/mine.yaml"),
        ("accelerate launch -m axolotl.cli.train mine.yml", "mine.yml"),
        ("accelerate launch --config_file zero3.yaml --num_processes 8 scripts/run_sft.py mine.yaml", "mine.yaml"),
        ("trl sft --config mine.yaml", "mine.yaml"),
        ("tune run --nproc_per_node 2 lora_finetune_distributed --config llama3_1/8B_lora batch_size=4", "llama3_1/8B_lora"),
    ],
)
def test_a_command_that_takes_its_settings_from_a_file_names_it(tmp_path: Path, command: str, file: str) -> None:
    with pytest.raises(RefusedError, match=rf"takes its settings from {file}; name that file"):
        read(tmp_path, command)


def test_a_program_with_options_of_its_own_is_no_tool_s(tmp_path: Path) -> None:
    """Its defaults are not TRL's, though it shares keys with it; TRL's own scripts, and keys of TRL alone, are TRL's."""
    own = read(tmp_path, "python qlora.py --model_name_or_path huggyllama/llama-7b --bits 4 --source_max_len 16")
    assert (own.tool, own.kind, own.unsupported["program"].value) == ("other", "other", "python qlora.py")
    with pytest.raises(RefusedError, match=r"runs python qlora.py, a program with options of its own; name the program itself"):
        peftplan.estimate(config=own)
    arguments = "--model_name_or_path Qwen/Qwen2.5-0.5B --use_peft --lora_r 8"
    assert read(tmp_path, f"accelerate launch train.py {arguments}").tool == "trl"
    assert read(tmp_path, f"python trl/scripts/sft.py {arguments} --mine 1").unsupported.keys() == {"mine"}


def test_a_number_sign_in_a_word_begins_no_comment(tmp_path: Path) -> None:
    """As in bash, and as the rows of data sets are written for ms-swift."""
    data = "AI-ModelScope/alpaca-gpt4-data-zh#500 'swift/self-cognition#500'"
    plan = read(tmp_path, f"swift sft --model Qwen/Qwen3-8B --dataset {data} --tuner_type full --max_length 512 # mine")
    assert (
        plan.read["dataset"].value if "dataset" in plan.read else plan.ignored["dataset"].value == data.replace("'", "").split()
    )
    assert (plan.options["method"], plan.options["seq_len"]) == ("full", 512)


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        (f"{SWIFT} --max_length 1024\n{SWIFT} --max_length 8192\n", "line 1, is read, not that of line 2"),
        (f"if $A; then\n{SWIFT} --max_length 1024\nelse\n{SWIFT} --max_length 8192\nfi", "line 2, is read, not that of line 4"),
        (
            f"{SWIFT} --max_length 1024 &\n{SWIFT} \\\n --max_length 1 &\n{SWIFT} --max_length 2",
            "is read, not that of lines 2, 4",
        ),
    ],
)
def test_further_training_commands_are_said(tmp_path: Path, script: str, lines: str) -> None:
    plan = read(tmp_path, script)
    assert plan.options["seq_len"] == 1024
    assert lines in plan.assumed["command"]
    estimate = peftplan.estimate(config=plan, gpu="l4")
    assert estimate.config is not None
    assert lines in summary(estimate.config)


def test_a_command_that_exports_or_infers_is_no_training_command(tmp_path: Path) -> None:
    script = f"swift export --model a/b --adapters c\n{SWIFT} --max_length 1024\nswift infer --model a/b --max_length 2"
    plan = read(tmp_path, script)
    assert (plan.kind, plan.options["seq_len"]) == ("training", 1024)
    assert "command" not in plan.assumed


@pytest.mark.parametrize(
    "script",
    [
        "cd x && {}", "cd x; {}", "export A=1 && {}", "(cd x && {})", "if $A; then {}; fi", "run() {{ {}; }}", "[ -d x ] || {}",
        "export L=1024 && {}", "X=$(cd y; pwd) && {}", "X=\"a; b\"; {} 2>&1 | tee log; echo 'a && b'",
        'D="$(cd "$(dirname "$0")" && pwd)"; {}', "X=`a; b`; {} &", "for ((i=0;i<3;i++)); do {}; done",
    ],
)  # fmt: skip
def test_commands_in_one_line(tmp_path: Path, script: str) -> None:
    plan = read(tmp_path, script.format(f"{SWIFT} --max_length 1024"))
    assert (plan.tool, plan.options["seq_len"], plan.unsupported) == ("swift", 1024, {})
    assert "command" not in plan.assumed


@pytest.mark.parametrize(
    ("script", "length"),
    [
        ("if $A; then\nL=1024\nelse\nL=4096\nfi", None),
        ("if $A; then L=1024; elif $B; then L=1024; else L=4096; fi", None),
        ("L=1024; if $A; then L=4096; fi", None),
        ("L=1024\n[ $A = 1 ] && L=4096", None),
        ("[[ $A ]] && L=1024 || L=4096", None),
        ("case $A in\n  a|b) L=1024 ;;\n  *) L=4096 ;;\nesac", None),
        ("L=1024\ncase $A in a) L=4096;; esac", None),
        ("L=1024\nfor L in 1024 4096; do true; done", None),
        ("if $A; then L=1024; else L=1024; fi", 1024),
        ("L=1\nif $A; then L=1024; else L=1024; fi", 1024),
        ("L=1\ncase $A in a) L=1024;; *) L=1024;; esac", 1024),
        ('if [ -z "$L" ]; then L=1024; fi', 1024),
        ("L=1; if $A; then M=1; fi; L=1024", 1024),
    ],
)
def test_a_variable_that_branches_set_differently_is_open(tmp_path: Path, script: str, length: int | None) -> None:
    plan = read(tmp_path, f"{script}\n{SWIFT} --max_length $L")
    assert plan.options.get("seq_len") == length
    assert plan.unsupported.keys() == (set() if length else {"max_length"})


def test_options_that_a_branch_sets_are_said(tmp_path: Path) -> None:
    script = f'ARGS=(--max_length 1024)\nif $A; then\n  ARGS+=(--packing true)\nfi\n{SWIFT} "${{ARGS[@]}}"'
    plan = read(tmp_path, script)
    assert plan.assumed["$ARGS"] == "$ARGS depends on a branch of the script; '--max_length 1024 --packing true' is read"
    ranks = read(tmp_path, f"if $A; then\nexport NPROC_PER_NODE=2\nelse\nexport NPROC_PER_NODE=4\nfi\n{SWIFT}")
    assert (ranks.options["gpus"], ranks.assumed["$NPROC_PER_NODE"].rpartition("; ")[2]) == (4, "'4' is read")


def test_an_unknown_script_is_no_tool_s_whatever_its_options(tmp_path: Path) -> None:
    """Options that every program has over transformers say nothing of TRL or ms-swift; names and options of their own do."""
    arguments = "--model_name_or_path Qwen/Qwen2.5-7B --per_device_train_batch_size 4"
    assert read(tmp_path, f"python train.py {arguments}").tool == "other"
    assert read(tmp_path, "python train.py --model Qwen/Qwen2.5-7B --max_length 512").tool == "other"
    assert read(tmp_path, f"accelerate launch --num_processes 2 dpo.py {arguments}").tool == "trl"
    assert read(tmp_path, f"python my_dpo.py {arguments}").tool == "other"
    assert read(tmp_path, "python train.py --model Qwen/Qwen2.5-7B --tuner_type lora").tool == "swift"


def test_a_command_that_is_answered_by_another(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text("yes | swift sft --model Qwen/Qwen3-0.6B --max_length 512 | tee log.txt\n")
    assert read_config(tmp_path / "a.sh").options["seq_len"] == 512


def test_further_commands_of_a_named_tool_are_said(tmp_path: Path) -> None:
    """No tool knows these scripts; `--tool` does."""
    (tmp_path / "a.sh").write_text("python a.py --model_name_or_path gpt2\n\npython b.py --model_name_or_path gpt2\n")
    plan = read_config(tmp_path / "a.sh", tool="trl")
    assert plan.assumed["command"] == "the file has 2 commands; the first, in line 1, is read, not that of line 3"


def test_a_list_where_a_rule_takes_a_number_is_refused_in_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("model_name_or_path: gpt2\nuse_peft: true\nlora_r: [8, 16]\n")
    with pytest.raises(PeftplanError, match=r"a\.yml:3: lora_r: .* accepted: a whole number from 1 to 2,147,483,647"):
        read_config(tmp_path / "a.yml")


def test_a_number_of_processes_that_is_not_known_is_one_and_said() -> None:
    command = "swift sft --model Qwen/Qwen3-0.6B --max_length 512"
    assert read_text(f"NPROC_PER_NODE=$N {command}\n", file="a.sh").assumed["gpus"] == "the launcher's number is $N; 1 is assumed"
    sharded = read_text(f"NPROC_PER_NODE=$N {command} --deepspeed zero2\n", file="a.sh")
    assert sharded.assumed["gpus"] == "the launcher decides; 8 are assumed"
    assert "gpus" not in read_text(f"{command}\n", file="a.sh").assumed


COMMAND = "swift sft --model Qwen/Qwen2.5-7B-Instruct --lora_rank"


@pytest.mark.parametrize(
    "text",
    [
        f"cat <<EOF\n{COMMAND} 9\nEOF\n{COMMAND} 4\n",
        f"cat > run.sh << 'EOF'\n{COMMAND} 9\nEOF\n{COMMAND} 4\n",
        f": <<-X\n\t{COMMAND} 9\n\tX\n{COMMAND} 4\n",
        f": '\n{COMMAND} 9\n'\n{COMMAND} 4\n",
        f"echo '\n{COMMAND} 9\n'\n{COMMAND} 4\n",
        f"echo {COMMAND} 9\n# {COMMAND} 9\n{COMMAND} 4\n",
        f"if false; then\n{COMMAND} 9\nelse\n{COMMAND} 4\nfi\n",
        f"if [ 0 = 1 ]; then\n{COMMAND} 9\nfi\n{COMMAND} 4\n",
        f"false && {COMMAND} 9\n{COMMAND} 4\n",
        f"old() {{\n{COMMAND} 9\n}}\n{COMMAND} 4\n",
        f"swift sft --help\n{COMMAND} 4\n",
        f"{COMMAND} 4\nexit 0\n{COMMAND} 9\n",
        f"train() {{\n  local rank=$1\n  {COMMAND} $rank\n}}\ntrain 4\n",
        f"function main {{\n{COMMAND} 4\n}}\nmain \"$@\"\n",
        f"for rank in 4; do\n{COMMAND} $rank\ndone\n",
        f": ${{RANK:=4}}\n{COMMAND} $RANK\n",
        f"{COMMAND} ${{RANK:-4}}\n",
        "swift sft \\\n  --model Qwen/Qwen2.5-7B-Instruct \\\n  # --lora_rank 9 \\\n  --lora_rank 4 # not 9\n",
        f"nohup {COMMAND} 4 > log 2>&1 &\n",
        f"srun -N 2 bash -c '{COMMAND} 4'\n",
        f"sbatch <<EOF\n#!/bin/bash\n{COMMAND} 4\nEOF\n",
        f"cat <<EOF | bash\n{COMMAND} 4\nEOF\n",
        f"timeout 10h uv run {COMMAND} 4\n",
        f"docker run --gpus all image bash -lc \"cd /w && {COMMAND} 4\"\n",
        f"\ufeff{COMMAND} 4\r\n",
        "torchrun --nproc_per_node 2 -m swift.cli.sft --model Qwen/Qwen2.5-7B-Instruct --tuner_type lora --lora_rank 4\n",
        "python -m torch.distributed.run swift/cli/sft.py --model Qwen/Qwen2.5-7B-Instruct --tuner_type lora --lora_rank 4\n",
    ],
)  # fmt: skip
def test_which_command_trains(tmp_path: Path, text: str) -> None:
    """The one of rank 4 runs, and no other: those of rank 9 are texts, or in a branch or a function that never runs."""
    path = tmp_path / "run.sh"
    path.write_text(text, encoding="utf-8")
    plan = peftplan.read_config(path)
    assert (plan.options["r"], plan.unsupported, plan.assumed.get("command")) == (4, {}, None)


def test_a_command_in_a_file_that_the_script_writes(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(f"cat > job.sh <<EOF\n{COMMAND} 4\nEOF\nqsub job.sh\n")
    assert "a file that it writes" in peftplan.read_config(path).assumed["command"]


def test_the_words_of_a_function_are_not_those_of_the_script(tmp_path: Path) -> None:
    script = (
        f'log() {{\n  echo "$1"\n}}\nlog "Qwen/Qwen2.5-0.5B"\n{SWIFT} --model ${{1:-Qwen/Qwen2.5-7B-Instruct}} --max_length 512\n'
    )
    assert read(tmp_path, script).model == "Qwen/Qwen2.5-7B-Instruct"
    script = f"run() {{\n  {SWIFT} --max_length ${{1:-512}}\n}}\ntrain() {{\n  log 8\n  run\n}}\nlog() {{\n  :\n}}\ntrain 1024\n"
    assert read(tmp_path, script).options["seq_len"] == 512


def test_the_default_of_an_empty_variable(tmp_path: Path) -> None:
    """Behind `:-` it counts where the variable is empty, behind `-` where it is not set."""
    plan = read(tmp_path, f"LENGTH=''\nMORE=''\n{SWIFT} --max_length ${{LENGTH:-512}} ${{MORE---max_length 1024}}")
    assert plan.options["seq_len"] == 512


@pytest.mark.parametrize(
    "script",
    [
        "a() {\n" + "  b\n" * 60 + "}\nb() {\n" + "  a\n" * 60 + "}\na\n",
        "a() {\n}\n" * 20_000,
        "a() {\n" * 40_000,
        "cat <<E\n" * 40_000,
        'echo "\n' * 20_001,
        "A=(\n" * 40_000,
    ],
    ids=["calls", "functions", "open functions", "texts", "quotes", "arrays"],
)
def test_a_script_that_repeats_itself_is_read_in_seconds(tmp_path: Path, script: str) -> None:
    before = process_time()
    assert read(tmp_path, f"{SWIFT} --max_length 512\n{script}").options["seq_len"] == 512
    assert process_time() - before < 20  # minutes before

"""Shell scripts: branches that the script's own variables decide, as bash takes them, and files that a script writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import peftplan
from peftplan.errors import RefusedError
from peftplan.job.configs.plan import ConfigPlan

SWIFT = "swift sft --model Qwen/Qwen2.5-7B-Instruct --tuner_type lora --dataset mine"
QWEN = """model_name_or_path: Qwen/Qwen3-8B
stage: sft
finetuning_type: lora
lora_rank: {rank}
template: qwen3
bf16: true
cutoff_len: {length}
"""


def read(tmp_path: Path, script: str) -> ConfigPlan:
    file = tmp_path / "train.sh"
    file.write_text(script, encoding="utf-8")
    return peftplan.read_config(file)


DECIDED = [
    'M=1; if [ "$M" = 1 ]; then L=1024; else L=4096; fi',
    'M=2; if [ "$M" = 1 ]; then L=1024; else L=4096; fi',
    'M=2\nif [[ $M == 1 ]]; then\nL=1024\nelif [[ "$M" == 2 ]]; then\nL=2048\nelse\nL=4096\nfi',
    'M=b; L=512; if [ "$M" != a ] && [ -n "$M" ]; then L=1024; fi',
    'M=b; L=512; if [ "$M" = a ] || [ -z "$M" ]; then L=1024; fi',
    "M=b; L=512; if [ $M = a -o $M = b ]; then L=1024; fi",
    "M=7B; if [[ $M == *B ]]; then L=1024; else L=2048; fi",
    'M=7B; if [[ $M == "*B" ]]; then L=1024; else L=2048; fi',
    "M=7; if (( M > 5 )); then L=1024; else L=2048; fi",
    "M=7; if ((M * 2 <= 13)); then L=1024; else L=2048; fi",
    "M=7; if [ $M -ge 7 ]; then L=1024; else L=2048; fi",
    "M=7; if ! [ $M -ge 7 ]; then L=1024; else L=2048; fi",
    "M=7; if [ ! $M -ge 8 ]; then L=1024; else L=2048; fi",
    "M=; L=512; if [ $M ]; then L=1024; fi",
    "M=true; if $M; then L=1024; else L=2048; fi",
    "M=false; L=512; $M && L=1024",
    "M=x; L=512; [ $M = x ] && L=1024; N=1",
    "M=x; L=512\n[ $M = y ] && L=1024\nN=1",
    "M=x; L=512; [ $M = y ] || L=1024",
    "M=x; [ $M = y ] && L=512 || L=1024",
    "M=x; [ $M = x ] && L=512 || L=1024",
    "M=x; L=512; [ $M = y ] && [ $M = x ] || L=1024",
    "M=x; L=512; [ $M = y ] && {\nL=1024\nN=1\nL=2048\n}",
    "M=x; L=512; [ $M = x ] && { N=1; L=2048; }",
    "M=x; L=512; [ $M = y ] &&\n  L=1024",
    "M=b; case $M in\n  a|c) L=1024 ;;\n  b) L=2048 ;;\n  *) L=4096 ;;\nesac",
    'M=7B; case "$M" in *B) L=1024;; *) L=4096;; esac',
    "M=d; L=512; case $M in a) L=1024;; b) L=4096;; esac",
    "M=a; N=b; if [ $M = a ]; then if [ $N = a ]; then L=1; else L=2; fi; else L=3; fi",
    "M=b; if [ $M = a ]; then if [ $N = a ]; then L=1; else L=2; fi; else L=3; fi",
    "G=8; if [ $((G / 4)) -eq 2 ]; then L=1024; else L=2048; fi",
    "M=a\nif [ $M = a ]; then\nA=(1024)\nelse\nA=(2048)\nfi\nL=${A[@]}",
]


@pytest.mark.parametrize("script", DECIDED)
def test_a_branch_that_variables_decide_is_the_one_that_bash_takes(tmp_path: Path, script: str) -> None:
    taken = subprocess.run(["bash"], input=f"{script}\necho $L", capture_output=True, text=True, check=True).stdout
    plan = read(tmp_path, f"{script}\n{SWIFT} --max_length $L")
    assert (plan.options["seq_len"], plan.unsupported) == (int(taken), {})
    assert not {"condition", "$L"} & plan.assumed.keys()


@pytest.mark.parametrize(
    "script",
    [
        'L=1; if [ "$1" = a ]; then L=2; fi',
        "L=1; if [ -f data.json ]; then L=2; fi",
        "L=1; if [ $(nproc) -gt 4 ]; then L=2; fi",
        "M=1; L=1; for N in 1 2; do if [ $M = 2 ]; then L=2; fi; M=2; done",
        "if $A; then M=1; else M=2; fi; if [ $M = 1 ]; then L=1; else L=2; fi",
        'if $A; then M="-a b"; else M=""; fi; if [ "$M" ]; then L=1; else L=2; fi',
    ],
)
def test_a_branch_that_only_the_run_decides_is_open(tmp_path: Path, script: str) -> None:
    assert "max_length" in read(tmp_path, f"{script}\n{SWIFT} --max_length $L").unsupported


def test_a_value_that_only_some_branches_set_is_assumed(tmp_path: Path) -> None:
    plan = read(tmp_path, f"if nvidia-smi | grep -q A100; then L=1024; fi\n{SWIFT} --max_length ${{L:-512}}\n")
    assert (plan.options["seq_len"], plan.assumed["$L"]) == (1024, "$L depends on a branch of the script; '1024' is read")


def test_the_condition_of_a_command_is_assumed_where_the_script_does_not_decide_it(tmp_path: Path) -> None:
    plan = read(tmp_path, f"M=1\nif [ -d data ]; then\n{SWIFT} --max_length 512\nfi\n")
    assert plan.assumed["condition"] == "the script runs the command where '[ -d data ]' holds, which it does not decide"
    script = f"M=lora\nif [ $M = full ]; then\n{SWIFT} --max_length 512\nexit 0\nfi\n{SWIFT} --max_length 1024\nexit\n{SWIFT}"
    plan = read(tmp_path, script)
    assert (plan.options["seq_len"], plan.assumed.get("condition"), plan.assumed.get("command")) == (1024, None, None)
    script = f"M=lora\nif [ $M = lora ]; then\n{SWIFT} --max_length 512\nexit 0\nfi\n{SWIFT} --max_length 1024\n"
    assert read(tmp_path, script).options["seq_len"] == 512


@pytest.mark.parametrize(
    "write", ["cat > run.yaml <<EOF", "cat <<EOF > run.yaml", "tee run.yaml <<-EOF", "cat >run.yaml << 'EOF'"]
)
@pytest.mark.parametrize("train", ["llamafactory-cli train run.yaml", "mkdir -p out && llamafactory-cli train ./run.yaml"])
def test_settings_that_the_script_writes_are_read_there(tmp_path: Path, write: str, train: str) -> None:
    rank, end = ("16", "EOF") if "'" in write else ("$R", "\tEOF" if "<<-" in write else "EOF")
    plan = read(tmp_path, f"R=16\n{write}\n{QWEN.format(rank=rank, length=512)}{end}\n{train}\n")
    assert (plan.tool, plan.options["r"], plan.options["seq_len"], plan.unsupported) == ("llamafactory", 16, 512, {})
    assert plan.places["cutoff_len"] == f"{tmp_path / 'train.sh'}:9"  # two lines, and six keys before it


def test_a_file_that_is_written_in_two_parts_and_words_that_win(tmp_path: Path) -> None:
    script = f"cat > run.yaml <<EOF\n{QWEN.format(rank=8, length=512)}EOF\ncat >> run.yaml <<EOF\nlora_dropout: 0.1\nEOF\n"
    plan = read(tmp_path, f"{script}llamafactory-cli train run.yaml lora_rank=32\n")
    assert (plan.options["r"], plan.options["lora_dropout"]) == (32, 0.1)
    axolotl = "base_model: Qwen/Qwen3-8B\nadapter: lora\nlora_r: 8\nmicro_batch_size: $B\nsequence_len: 1024\ndatasets: []\n"
    plan = read(tmp_path, f"B=3\ncat <<EOF > a.yml\n{axolotl}EOF\naxolotl train a.yml\n")
    assert (plan.tool, plan.options["batch_size"]) == ("axolotl", 3)


def test_launch_files_that_the_script_writes(tmp_path: Path) -> None:
    fsdp = "distributed_type: FSDP\nnum_processes: 4\nfsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: true\n"
    script = f"cat > acc.yaml <<EOF\n{fsdp}EOF\naccelerate launch --config_file acc.yaml -m swift.cli.sft {SWIFT[10:]}\n"
    plan = read(tmp_path, script)
    assert (plan.options["gpus"], plan.options["strategy"]) == (4, "fsdp2")
    settings = "model_name_or_path: Qwen/Qwen3-0.6B\nmax_length: 1024\nuse_peft: true\n"
    script = f"cat > acc.yaml <<EOF\n{fsdp}EOF\ncat > run.yaml <<EOF\n{settings}EOF\n"
    plan = read(tmp_path, f"{script}trl sft --config run.yaml --accelerate_config acc.yaml\n")
    assert (plan.options["gpus"], plan.options["strategy"], plan.unsupported) == (4, "fsdp2", {})
    zero = '{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}'
    plan = read(tmp_path, f"cat > ds.json <<EOF\n{zero}\nEOF\nNPROC_PER_NODE=2 {SWIFT} --deepspeed ds.json\n")
    assert (plan.options["gpus"], plan.options["strategy"]) == (2, "zero3")
    settings = f"{QWEN.format(rank=8, length=512)}deepspeed: ds.json\n"
    script = f"cat > ds.json <<EOF\n{zero}\nEOF\ncat > run.yaml <<EOF\n{settings}EOF\n"
    assert read(tmp_path, f"{script}NPROC_PER_NODE=2 llamafactory-cli train run.yaml\n").options["strategy"] == "zero3"


@pytest.mark.parametrize(
    ("change", "by"),
    [
        ("sed -i 's/512/1024/' run.yaml", "sed"),
        ("envsubst < a.yaml > run.yaml", "envsubst"),
        ("cat run.yaml | envsubst > run.yaml", "envsubst"),
        ('echo "lora_rank: 8" >> run.yaml', "echo"),
        ("if [ -f a ]; then\ncat > run.yaml <<EOF\nlora_rank: 8\nEOF\nfi", "a branch of the script"),
    ],
)
def test_a_file_that_the_script_changes_is_refused_by_name(tmp_path: Path, change: str, by: str) -> None:
    train = "llamafactory-cli train run.yaml"
    written = f"cat > run.yaml <<EOF\n{QWEN.format(rank=8, length=512)}EOF\n"
    with pytest.raises(RefusedError, match=rf"train\.sh:1\d: {by}.* changes run\.yaml before the command reads it"):
        read(tmp_path, f"{written}{change}\n{train}\n")
    (tmp_path / "run.yaml").write_text(QWEN.format(rank=8, length=512))
    with pytest.raises(RefusedError, match="changes run"):
        read(tmp_path, f"{change}\n{train}\n")
    assert read(tmp_path, f"{train}\n{change}\n").options["r"] == 8


def test_an_error_in_a_written_file_names_the_line_of_the_script(tmp_path: Path) -> None:
    with pytest.raises(peftplan.errors.InputError, match=r"train\.sh:4: lora_rank appears twice"):
        read(tmp_path, "R=1\ncat > run.yaml <<EOF\nlora_rank: 1\nlora_rank: 2\nEOF\nllamafactory-cli train run.yaml\n")

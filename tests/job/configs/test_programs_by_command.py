"""Programs that a shell script runs: what of the command reaches the trainer."""

from pathlib import Path

import pytest

from peftplan.job.configs.read import read_config
from tests.job.configs.test_commands import PROGRAM


@pytest.mark.parametrize("condition", ["[[ $# -gt 0 ]]", '[[ "$1" != "" ]]', '[ "$1" != "" ]', "getopts m: name", '[ -n "$1" ]'])
def test_a_loop_over_words_that_nobody_gives_does_not_run(tmp_path: Path, condition: str) -> None:
    loop = f'while {condition}; do\n  case $1 in\n    -m) MODEL="$2"; shift 2 ;;\n    *) exit 1 ;;\n  esac\ndone\n'
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "run.sh").write_text(f"MODEL=gpt2\n{loop}python train.py --model_name_or_path $MODEL --output_dir o\n")
    plan = read_config(tmp_path / "run.sh")
    assert plan.model == "gpt2"
    assert "condition" not in plan.assumed
    (tmp_path / "run.sh").write_text(f"MODEL=gpt2\n{loop.replace('$#', '$N').replace('$1', '$N').replace('getopts', 'read')}"
                                     "python train.py --model_name_or_path $MODEL --output_dir o\n")  # fmt: skip
    assert read_config(tmp_path / "run.sh").model != "gpt2"


def test_a_tokenizer_cuts_where_the_command_says(tmp_path: Path) -> None:
    cut = "    cut = lambda texts, tokenizer: tokenizer(texts, max_length=tokenizer.model_max_length, truncation=True)\n"
    program = PROGRAM.replace("    Trainer(", cut + "    Trainer(")
    (tmp_path / "train.py").write_text(program)
    (tmp_path / "run.sh").write_text("python train.py --output_dir o --model_max_length 2048\n")
    assert read_config(tmp_path / "run.sh").options["seq_len"] == 2048
    (tmp_path / "run.sh").write_text("python train.py --output_dir o\n")
    assert read_config(tmp_path / "run.sh").options["seq_len"] == 512


def test_words_that_a_program_leaves_decide_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(
        "python -m torch.distributed.launch --nproc_per_node=2 --use_env train.py --output_dir o --data_length 9 --bf16 True\n"
    )
    (tmp_path / "train.py").write_text(PROGRAM)
    assert "args.data_length" in read_config(tmp_path / "run.sh").unsupported
    (tmp_path / "train.py").write_text(
        PROGRAM.replace("model_args, training_args = parser.parse_args_into_dataclasses()",
                        "model_args, training_args, rest = parser.parse_args_into_dataclasses(return_remaining_strings=True)")
    )  # fmt: skip
    plan = read_config(tmp_path / "run.sh")
    assert plan.unsupported == {}
    assert plan.options["gpus"] == 2


def test_a_function_that_is_not_imported_is_no_part_of_a_program(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(PROGRAM.replace("def main", "def helper():\n    return 1\n\ndef main"))
    (tmp_path / "train.py").write_text("from base import ModelArguments, helper\n" + PROGRAM.replace("lora_r: int", "rank: int")
                                       .replace("model_args.lora_r", "model_args.rank") + "\nhelper()\n")  # fmt: skip
    (tmp_path / "run.sh").write_text("python train.py --output_dir o --rank 2\n")
    plan = read_config(tmp_path / "run.sh")
    assert plan.options["r"] == 2
    assert plan.unsupported == {}
    assert not [why for why in plan.assumed.values() if "several times" in why]


QLORA = """
import argparse, os
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments
from peft import LoraConfig, get_peft_model
import torch
args, = HfArgumentParser((Seq2SeqTrainingArguments,)).parse_args_into_dataclasses()
dtype = torch.float16 if args.fp16 else (torch.bfloat16 if args.bf16 else torch.float32)
memory = {i: "80000MB" for i in range(torch.cuda.device_count())}
model = AutoModelForCausalLM.from_pretrained(
    "huggyllama/llama-7b", load_in_4bit=True, max_memory=memory,
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
)
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj"]))
CASTS
data = dict(train_dataset=1, predict_dataset=2)
Seq2SeqTrainer(model=model, args=args, **{k: v for k, v in data.items() if k != "predict_dataset"}).train()
"""


def test_a_quantization_config_wins_over_an_argument(tmp_path: Path) -> None:
    """transformers 4.38 to 4.57 raise ValueError for both (4.57.1, modeling_utils.py:4815), and 5 knows no load_in_4bit."""
    (tmp_path / "run.sh").write_text("python train.py --output_dir o --bf16\n")
    (tmp_path / "train.py").write_text(QLORA.replace("CASTS", ""))
    plan = read_config(tmp_path / "run.sh")
    assert (plan.options["quant"], plan.options["compute_dtype"]) == ("nf4", "bf16")
    assert "load.load_in_4bit" not in plan.unsupported
    assert plan.refused["load.load_in_4bit"].instead == {"load.load_in_4bit": None}


@pytest.mark.parametrize(("switch", "is_known"), [("True", True), ("False", True), ("os.path.exists('x')", False)])
def test_a_switch_that_the_program_computes_quantizes_nothing_for_sure(tmp_path: Path, switch: str, *, is_known: bool) -> None:
    (tmp_path / "train.py").write_text(LIMITED.replace("ARGUMENTS", f"load_in_8bit={switch}"))
    assert ("load.load_in_8bit" not in read_config(tmp_path / "train.py").unsupported) is is_known
    program = LIMITED.replace("load_in_4bit=True", f"load_in_4bit={switch}").replace("ARGUMENTS", "quantization_config=quantized")
    (tmp_path / "train.py").write_text(program)
    assert ("quant.load_in_4bit" not in read_config(tmp_path / "train.py").unsupported) is is_known


LIMITED = """
import os
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from peft import LoraConfig, get_peft_model
n = torch.cuda.device_count()
quantized = BitsAndBytesConfig(load_in_4bit=True)
model = AutoModelForCausalLM.from_pretrained("huggyllama/llama-7b", ARGUMENTS)
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj"]))
Trainer(model=model, args=TrainingArguments("o")).train()
"""


@pytest.mark.parametrize(
    ("arguments", "holds"),
    [  # 6.74 G parameters: 13.5 GB in 16 bits, 27 GB in 32 (accelerate spreads them so: infer_auto_device_map)
        ("device_map='auto', max_memory={0: '80000MB', 'cpu': '99GB'}", True),
        ("device_map='auto', max_memory={0: 80000000000}", True),
        ("device_map='auto', max_memory={0: '29GiB'}", False),
        ("device_map='auto', max_memory={0: '29GiB'}, dtype=torch.bfloat16", True),
        ("device_map='auto', max_memory={0: '29Gb'}, dtype=torch.bfloat16", False),
        ("device_map='auto', max_memory={0: '1GB', 'cpu': '99GB'}", False),
        ("device_map='auto', max_memory={'cpu': '99GB'}", False),
        ("device_map='auto', max_memory={0: '40GB', 1: '40GB'}", False),
        ("device_map='auto', max_memory={i: '40GB' for i in range(n)}", True),
        ("device_map='auto', max_memory={i: '1GB' for i in range(n)}", False),
        ("device_map='auto', max_memory={i: '40GB' for i in range(2)}", False),
        ("device_map='auto', max_memory={i: '20GB' for i in range(n)}, quantization_config=quantized", True),
        ("device_map='auto', max_memory=limits()", False),
        ("max_memory=limits()", True),
        ("device_map={'': 0}, max_memory={0: '1GB'}", True),
    ],
)
def test_a_limit_that_may_not_hold_the_model_leaves_the_peak_unknown(tmp_path: Path, arguments: str, *, holds: bool) -> None:
    (tmp_path / "train.py").write_text(LIMITED.replace("ARGUMENTS", arguments))
    assert (not any(key.startswith("load.max_memory") for key in read_config(tmp_path / "train.py").unsupported)) is holds


def test_a_cast_of_every_module_of_a_kind_has_no_peak(tmp_path: Path) -> None:
    casts = "for name, module in model.named_modules():\n    if 'norm' in name:\n        module = module.to(torch.float32)\n"
    (tmp_path / "run.sh").write_text("python train.py --output_dir o --bf16\n")
    (tmp_path / "train.py").write_text(QLORA.replace("CASTS", casts))
    assert "parts.call" in read_config(tmp_path / "run.sh").unsupported


@pytest.mark.parametrize(
    ("change", "is_read"),
    [
        ("config.use_cache = False", True),
        ("if n:\n    config.rope_scaling = {'type': 'linear', 'factor': 2}", True),
        ("config.rope_scaling = {'type': 'linear', 'factor': 2}", False),
        ("config.rope_scaling = {'rope_type': 'linear', 'factor': 2, 'rope_theta': 10000}", True),
        ("if n:\n    config.rope_scaling['factor'] = 2", True),
        ("config.use_cache = True", False),
        ("config.num_hidden_layers = 2", False),
        ("if n:\n    config.num_hidden_layers = 2", False),
        ("config.text_config.vocab_size = 8", False),
        ("config.layer_types[0] = 'full_attention'", False),
        ("setattr(config, n, 2)", False),
        ("config.update({'vocab_size': 8})", False),
    ],
)
def test_the_config_of_the_model_itself(tmp_path: Path, change: str, *, is_read: bool) -> None:
    (tmp_path / "train.py").write_text(f"""
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments
config = AutoConfig.from_pretrained("gpt2", num_labels=7)
{change}
model = AutoModelForSequenceClassification.from_pretrained("gpt2", config=config)
Trainer(model=model, args=TrainingArguments("o")).train()
""")
    plan = read_config(tmp_path / "train.py")
    assert ("load.config" not in plan.unsupported) is is_read
    assert plan.options.get("num_labels") == (7 if is_read else None)


def test_the_config_of_another_model_is_not_the_model_s_own(tmp_path: Path) -> None:
    program = PROGRAM.replace(
        "    model = Auto", "    config = transformers.AutoConfig.from_pretrained('gpt2')\n    model = Auto"
    )
    (tmp_path / "train.py").write_text(program.replace("torch_dtype=torch.half", "config=config"))
    (tmp_path / "run.sh").write_text("python train.py --output_dir o\n")
    assert "load.config" in read_config(tmp_path / "run.sh").unsupported

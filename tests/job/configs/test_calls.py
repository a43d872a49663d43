"""What a program's syntax tree says: values behind names, the command line's defaults, and which trainer runs."""

import json
from pathlib import Path

import pytest

from peftplan.job.configs.detect import tool_of
from peftplan.job.configs.programs import of_notebook, of_script
from peftplan.job.configs.read import read_text

pytestmark = pytest.mark.quick

HEAD = "import argparse, os, torch\nfrom dataclasses import dataclass, field\n"


@pytest.mark.parametrize(
    ("before", "expression", "value"),
    [
        ("rank = 16", "rank * 2", 32),
        ("length = 2048\nprompt = 512", "length - prompt", 1536),
        ("CONFIG = {'lora': {'r': 8}}", "CONFIG['lora']['r']", 8),
        ("CONFIG = {'lora': {'r': 8}}", "CONFIG.get('lora', {}).get('alpha', 4)", 4),
        ("CONFIG = {'r': 8}\nCONFIG['r'] = 64", "CONFIG['r']", 64),
        ("class Config:\n    r: int = 8\ncfg = Config()", "cfg.r", 8),
        ("@dataclass\nclass Config:\n    r: int = field(default=8)\ncfg = Config(r=24)", "cfg.r", 24),
        ("class Config:\n    names: list = field(default_factory=lambda: ['q_proj'])", "Config().names", ["q_proj"]),
        ("", "int(os.environ.get('RANK_OF_LORA', '12'))", 12),
        ("", "getattr(torch, 'float16')", "<torch.float16>"),
        ("", "torch.bfloat16 if is_bfloat16_supported() else torch.float16", "<torch.bfloat16>"),
        ("device = 'cuda' if torch.cuda.is_available() else 'mps'", "device == 'mps'", False),
        ("size = 7", "f'unsloth/Qwen2.5-{size}B'", "unsloth/Qwen2.5-7B"),
        ("a, b = 1, 2", "b", 2),
        ("a = 1\na = load()", "a", "<a>"),
        ("for a in (1, 2):\n    pass", "a", "<a>"),
        ("", "args.r or 8", "<args.r or 8>"),
        ("a = [1] + [2]", "a", [1, 2]),
        ("", "{'v_proj', 'q_proj'}", ["q_proj", "v_proj"]),
    ],
)
def test_values_of_expressions(before: str, expression: str, value: object) -> None:
    (call,) = of_script(f"{HEAD}{before}\nLoraConfig(r={expression})\n", file="run.py").calls
    assert call["kwargs"] == {"r": value}


def test_a_command_line_s_defaults_are_assumed() -> None:
    program = """
def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-id", default="meta-llama/Llama-3.2-1B")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--needed", required=True)
    return parser.parse_args()

def train(model_id, rank, length=512):
    model = AutoModelForCausalLM.from_pretrained(model_id)
    SFTTrainer(model=model, peft_config=LoraConfig(r=rank), args=SFTConfig(max_length=length))

args = options()
train(args.model_id, rank=args.rank * 2)
"""
    plan = read_text(program, file="run.py")
    assert (plan.tool, plan.model) == ("trl-script", "meta-llama/Llama-3.2-1B")
    assert (plan.options["r"], plan.options["seq_len"]) == (8, 512)
    assert plan.assumed["model"] == "the program's default of --model-id"
    assert plan.assumed["r"] == "the program's default of --rank"
    assert "seq_len" not in plan.assumed


def test_what_stands_at_an_argument_that_must_be_given_is_unknown() -> None:
    program = 'p.add_argument("--r", required=True)\nLoraConfig(r=args.r)\n'
    assert of_script(program, file="run.py").calls[0]["kwargs"] == {"r": "<args.r>"}


def test_a_notebook_s_cells_are_one_program() -> None:
    cells = ["RANK = 8\n!pip install trl", "not python", "LoraConfig(r=RANK)"]
    notebook = {"cells": [{"cell_type": "code", "source": [cell]} for cell in cells]}
    assert of_notebook(json.dumps(notebook), file="run.ipynb").calls[0]["kwargs"] == {"r": 8}


def test_values_that_double_end(tmp_path: Path) -> None:
    """Each line holds twice what the one before held."""
    lines = ["a = [1, 2]", *["a = a + a"] * 200, "d = {'x': a}", *["d = {'x': d, 'y': d}"] * 200, "LoraConfig(r=d)"]
    (call,) = of_script("\n".join(lines), file="run.py").calls
    assert call["kwargs"] == {"r": "<d>"}


@pytest.mark.parametrize(
    ("calls", "tool"),
    [
        ("SFTTrainer(args=SFTConfig())", "trl-script"),
        ("GRPOTrainer(model='Qwen/Qwen2.5-0.5B', args=GRPOConfig())", "trl-script"),
        ("trl.DPOTrainer(args=trl.DPOConfig())", "trl-script"),
        ("Trainer(args=TrainingArguments())", "transformers-script"),
        ("transformers.Trainer(args=transformers.TrainingArguments())", "transformers-script"),
        ("Seq2SeqTrainer(args=Seq2SeqTrainingArguments())", "transformers-script"),
        ("FastLanguageModel.from_pretrained('unsloth/llama-3-8b')\nGRPOTrainer(args=GRPOConfig())", "unsloth"),
        ("Trainer(max_epochs=3)", "other"),
    ],
)
def test_the_tool_of_a_program(calls: str, tool: str) -> None:
    assert tool_of(of_script(calls, file="run.py"), file="run.py") == tool


LOADED = "model = AutoModelForCausalLM.from_pretrained('meta-llama/Llama-3.2-1B', dtype=torch.bfloat16)\n"


@pytest.mark.parametrize(
    ("program", "options"),
    [
        (
            LOADED + "DPOTrainer(model, args=DPOConfig(beta=0.2, max_length=512))",
            {"trainer": "trl-dpo", "beta": 0.2, "seq_len": 512},
        ),
        (LOADED + "SFTTrainer(model, max_seq_length=256, packing=True)", {"trainer": "trl", "seq_len": 256, "padding": False}),
        (
            "GRPOTrainer(model='Qwen/Qwen2.5-0.5B', args=GRPOConfig(max_prompt_length=128, max_completion_length=64))",
            {"trainer": "trl-grpo", "dtype": "fp32", "seq_len": 192, "max_completion_length": 64},
        ),
        (
            "SFTTrainer('Qwen/Qwen2.5-0.5B', args=SFTConfig(model_init_kwargs={'dtype': 'bfloat16'}))",
            {"trainer": "trl", "dtype": "bf16"},
        ),
        (
            LOADED + "tok(x, truncation=True, max_length=384)\nTrainer(model=model, args=TrainingArguments(fp16=True))",
            {"trainer": "transformers", "seq_len": 384, "autocast": "fp16", "gradient_checkpointing": False, "dtype": "bf16"},
        ),
        (
            LOADED + "model.gradient_checkpointing_enable()\nTrainer(model=model, args=TrainingArguments())",
            {"autocast": "none", "gradient_checkpointing": True},
        ),
        (
            "model = AutoModelForSequenceClassification.from_pretrained('bert-base-uncased', num_labels=3)\n"
            "Trainer(model=get_peft_model(model, LoraConfig(r=4)), args=TrainingArguments(bf16=True))",
            {"task_type": "SEQ_CLS", "num_labels": 3, "method": "lora", "r": 4, "autocast": "bf16"},
        ),
    ],
)
def test_trainers_of_programs(program: str, options: dict[str, object]) -> None:
    plan = read_text(program, file="run.py")
    assert plan.unsupported == {}
    assert {name: plan.options.get(name) for name in options} == options


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("/data/models/Qwen3-14B", "Qwen3-14B"),
        ("models/Qwen3-14B", "Qwen3-14B"),
        ("somebody/Qwen3-14B-bnb-4bit", "Qwen3-14B"),
        ("somebody/own-model", "somebody/own-model"),
    ],
)
def test_a_folder_holds_the_model_whose_name_it_has(text: str, model: str) -> None:
    plan = read_text(f"GRPOTrainer(model='{text}', args=GRPOConfig())", file="run.py")
    assert plan.model == model
    assert ("model" in plan.assumed) == (text != model)


UNSLOTH = "model = FastLanguageModel.from_pretrained('unsloth/Llama-3.2-1B', max_seq_length=2048)\n"


@pytest.mark.parametrize(
    ("length", "seq_len"), [("max_length=1024", 2048), ("max_length=512", 512), ("max_seq_length=1024", 1024)]
)
def test_unsloth_takes_trl_s_default_length_for_none(length: str, seq_len: int) -> None:
    """Rehearsed: 1,024 gave rows of 2,048 tokens."""
    plan = read_text(f"{UNSLOTH}SFTTrainer(model=model, args=SFTConfig({length}))", file="run.py")
    assert plan.options["seq_len"] == seq_len


def test_unsloth_adapts_layers_without_a_part_of_the_model_in_their_names() -> None:
    """Gemma 3 1B is text alone: no name says so. Unsloth prints 6,522,880 at rank 8."""
    import peftplan

    load = "model = FastModel.from_pretrained('unsloth/gemma-3-1b-it', load_in_4bit=False)\n"
    plan = read_text(
        load + "model = FastModel.get_peft_model(model, r=8)\nSFTTrainer(model=model, args=SFTConfig())", file="run.py"
    )
    options = {**plan.options, "kernels": None}
    assert peftplan.estimate(str(plan.model), **options).trainable_parameters == 6_522_880


def test_a_file_with_generations_trains_by_grpo() -> None:
    text = (
        "model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct\nnum_generations: 8\nmax_completion_length: 256\nsystem_prompt: Think.\n"
    )
    plan = read_text(text, file="grpo.yaml")
    assert (plan.options["trainer"], plan.options["seq_len"], plan.unsupported) == ("trl-grpo", 768, {})


@pytest.mark.parametrize("key", ["max_source_length", "task_name", "data_dir"])
def test_a_program_of_another_task_is_not_trl_s(key: str) -> None:
    text = f"python run.py --model_name_or_path bert-base-cased --output_dir out --{key} x\n"
    assert tool_of_text(text) == "other"


def tool_of_text(text: str) -> str:
    """The tool of a shell script."""
    return read_text(text, file="run.sh").tool


@pytest.mark.parametrize(
    "before",
    [
        "if known():\n    r = 1\nelse:\n    r = 2",
        "try:\n    import flash\n    r = 1\nexcept ImportError:\n    r = 2",
        "r = 1\nfor each in many:\n    r = r * 2",
        "r = 1\nr, *others = load()",
        "r = [1]\nr.append(two())",
        "r = 1\ndef other():\n    global r\n    r = 2\nother()",
        "r = 0x" + "f" * 100_000,
        "r = 'ab'\n" + "r = f'{r}{r}'\n" * 60,
        "r = 'x' * 10**9",
        "other = load()\nr = {**other}.get('r', 8)",
        "n = 1\nr = f'{n:03d}'",
        "def start(r=4):\n    pass\nr = start(*many)",
    ],
)
def test_what_depends_on_the_way_is_unknown(before: str) -> None:
    (call,) = of_script(f"{before}\nLoraConfig(r=r)\n", file="run.py").calls
    assert call["kwargs"] == {"r": "<r>"}


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("def f(r=4):\n    LoraConfig(r=r)\nf()\nf(r=8)", "<r>"),
        ("def f(*, r=4):\n    LoraConfig(r=r)\nf(r=8)", 8),
        ("def f(r):\n    LoraConfig(r=r)\nr = 4\nFire(f)", "<r>"),
        ("r = 4\ndef f():\n    LoraConfig(r=r)\nr = 8\nf()", "<r>"),
        ("class A:\n    r = 1\nclass B:\n    r = 2\nLoraConfig(r=load().r)", "<load().r>"),
        ("class A:\n    r = 1\nclass B:\n    r = 2\na = A()\nLoraConfig(r=a.r)", 1),
        ("class A:\n    r = 1\nt = AutoTokenizer.from_pretrained('t')\nLoraConfig(r=t.r)", "<t.r>"),
        ("p.add_argument('--r', default=1)\nq.add_argument('--r', default=2)\nLoraConfig(r=a.r)", "<a.r>"),
        ("p.add_argument('--r', default=1)\na.r = load()\nLoraConfig(r=a.r)", "<a.r>"),
        ("p.add_argument('--r', default=1)\nc = LoraConfig()\nc.r = a.r", 1),
        ("p.add_argument('--r', default=1)\nc = LoraConfig()\nc.r = a.r\nc.r = load()", "<call load>"),
        ("r = 4\nr *= 2\nLoraConfig(r=r)", 8),
        ("LoraConfig(r=(r := 8))\n", "<value (r := 8)>"),
    ],
)
def test_values_are_of_their_own_object_and_call(program: str, value: object) -> None:
    call = of_script(program, file="run.py").calls[-1]
    assert call["kwargs"]["r"] == value


OF_FLAG = "p.add_argument('--full', action='store_true')\n"
OTHER, ADAPTED = "LoraConfig(r=64)", "LoraConfig(r=4)"


@pytest.mark.parametrize(
    "program",
    [
        f"if args.full:\n    {OTHER}\nelse:\n    {ADAPTED}\n",
        f"{OTHER} if args.full else {ADAPTED}\n",
        f"if not args.full:\n    {ADAPTED}\nelif small:\n    {OTHER}\nelse:\n    {OTHER}\n",
        f"def whole():\n    {OTHER}\nif args.full:\n    whole()\nelse:\n    {ADAPTED}\n",
        "def adapt(rank):\n    LoraConfig(r=rank)\nif args.full:\n    adapt(64)\nelse:\n    adapt(4)\n",
    ],
)
def test_a_way_that_is_not_taken_does_not_count(program: str) -> None:
    plan = read_text(f"{OF_FLAG}{program}SFTTrainer()\n", file="run.py")
    assert plan.options["r"] == 4
    assert plan.assumed["r"] == "the program's default of --full"


def test_a_function_that_something_else_calls_counts() -> None:
    program = f"def whole():\n    {ADAPTED}\nif False:\n    whole()\nstart(whole)\nSFTTrainer()\n"
    assert read_text(program, file="run.py").options["r"] == 4


def test_a_way_that_alone_trains_counts() -> None:
    """With --do_train, since nothing trains without it."""
    flag = "p.add_argument('--do_train', action='store_true')\n"
    program = f"{flag}if args.do_train:\n    SFTTrainer(peft_config=LoraConfig(r=4))\nelse:\n    LoraConfig(r=8)\n"
    assert read_text(program, file="run.py").options["r"] == 4


def test_calls_of_ways_that_are_not_taken_are_listed() -> None:
    program = f"if False:\n    {OTHER}\n{ADAPTED}\nSFTTrainer()\n"
    plan = read_text(program, file="run.py")
    assert "later.untaken LoraConfig#1" in plan.ignored


ON_OFF = "p.add_argument('--mode', default='small')\np.add_argument('--rank', type=int, default=8)\nargs = p.parse_args()\n"


@pytest.mark.parametrize(
    "program",
    [
        f"def adapt(model):\n    if not args.full:\n        return {ADAPTED}\n    return {OTHER}\nadapt(model)\n",
        f"def adapt():\n    with open('x'):\n        return {ADAPTED}\n    {OTHER}\nadapt()\n",
        f"def adapt():\n    try:\n        return {ADAPTED}\n    finally:\n        pass\n    {OTHER}\nadapt()\n",
        f"while args.full:\n    {OTHER}\n{ADAPTED}\n",
        f"args.full and {OTHER}\nnot args.full or {OTHER}\n{ADAPTED}\n",
        f"{ON_OFF}match args.mode:\n    case 'large':\n        {OTHER}\n    case _:\n        {ADAPTED}\n",
        f"{ON_OFF}if args.rank > 16 or args.mode in ('large', 'huge'):\n    {OTHER}\nelse:\n    {ADAPTED}\n",
        f"def unused():\n    {OTHER}\n{ADAPTED}\n",
    ],
)
def test_what_python_would_not_run_does_not_count(program: str) -> None:
    assert read_text(f"{OF_FLAG}{program}SFTTrainer()\n", file="run.py").options["r"] == 4


def test_a_function_that_returns_before_its_adapter_trains_all_weights() -> None:
    program = (
        f"{OF_FLAG}{LOADED}def adapt(model):\n    if not args.full:\n        return model\n"
        f"    return get_peft_model(model, {OTHER})\nmodel = adapt(model)\nSFTTrainer(model=model)\n"
    )
    assert read_text(program, file="run.py").options["method"] == "full"


def test_functions_that_nothing_calls_count_where_no_other_trains() -> None:
    program = f"def main(rank=4):\n    {LOADED}    SFTTrainer(model=model, peft_config=LoraConfig(r=rank))\n"
    plan = read_text(program, file="run.py")
    assert (plan.model, plan.options["r"]) == ("meta-llama/Llama-3.2-1B", 4)


@pytest.mark.parametrize(
    "trained",
    [
        "SFTTrainer(student, peft_config=small)",
        "SFTTrainer(model=student, args=SFTConfig(), peft_config=small)",
        "SFTTrainer(model=get_peft_model(student, small))",
        "student = get_peft_model(prepare_model_for_kbit_training(student), small)\nSFTTrainer(model=student)",
        "def train(model, adapter):\n    SFTTrainer(model=model, peft_config=adapter)\ntrain(student, small)",
    ],
)
def test_of_several_models_and_adapters_those_that_are_trained_count(trained: str) -> None:
    program = (
        f"teacher = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-7B')\nlarge = {OTHER}\n"
        f"student = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B')\nsmall = {ADAPTED}\n{trained}\n"
    )
    plan = read_text(program, file="run.py")
    assert (plan.model, plan.options["r"]) == ("Qwen/Qwen2.5-0.5B", 4)


def test_a_model_loaded_below_a_trainer_that_loads_its_own_is_another() -> None:
    """As notebooks of TRL do to try what they trained: `model_name` is theirs by then."""
    program = (
        "from trl import SFTConfig, SFTTrainer\nfrom transformers import AutoModelForCausalLM\nname = 'Qwen/Qwen2.5-0.5B'\n"
        "SFTTrainer(model=name, args=SFTConfig(model_init_kwargs={'dtype': 'bfloat16'})).train()\nname = 'me/trained'\n"
        "AutoModelForCausalLM.from_pretrained(name, dtype='float32')\n"
    )
    plan = read_text(program, file="run.py")
    assert (plan.model, plan.options["dtype"]) == ("Qwen/Qwen2.5-0.5B", "bf16")


@pytest.mark.parametrize(
    ("written", "rank"),
    [
        ("config.r = 64", 64),
        ("setattr(config, 'r', 64)", 64),
        ("if known():\n    config.r = 64", "<r>"),
        ("SFTTrainer(peft_config=config)\nconfig.r = 64", 4),
    ],
)
def test_what_is_written_to_a_configuration_before_training_counts(written: str, rank: object) -> None:
    calls = of_script(f"config = {ADAPTED}\n{written}\nSFTTrainer(peft_config=config)\n", file="run.py").calls
    assert calls[0]["kwargs"] == {"r": rank}


@pytest.mark.parametrize(
    "program",
    [
        "r = 4\nfor each in many:\n    if each:\n        r = 8\n        break\n    r = 4",
        "r = 4\ntry:\n    r = 8\n    load()\n    r = 4\nexcept OSError:\n    pass",
        "class C:\n    r = 8\n    def __init__(self):\n        self.r = 64\nr = C().r",
        "class C:\n    r = 8\nC.r = 64\nr = C().r",
        "class C:\n    r = 8\ndef widen(c):\n    c.r = 64\nc = C()\nwiden(c)\nr = c.r",
        "class C:\n    r = 8\n    def widen(self):\n        self.r = 64\nc = C()\nc.widen()\nr = c.r",
        "d = {'r': 8}\ndef widen(d):\n    d['r'] = 64\nwiden(d)\nr = d['r']",
        "d = {'r': 8}\nother = d\nother['r'] = 64\nr = d['r']",
        "d = {'r': 8}\nother = d\nother.update(r=64)\nr = d['r']",
        f"{ON_OFF.replace('parse_args()', 'parse_args(LIST)').replace('LIST', repr(['--rank', '64']))}r = args.rank",
        "p.add_argument('--wide', type=truth, default='false')\nargs = p.parse_args()\nr = 64 if args.wide else 4",
        "os.environ['RANK_OF_LORA'] = '64'\nr = int(os.environ.get('RANK_OF_LORA', '12'))",
    ],
)
def test_what_the_text_does_not_tell_is_unknown(program: str) -> None:
    call = of_script(f"{program}\nLoraConfig(r=r)\n", file="run.py").calls[-1]
    assert call["kwargs"] == {"r": "<r>"}


def test_environment_that_a_notebook_sets_by_magics() -> None:
    """IPython takes the rest of the line for the value, with what looks like a comment."""
    source = "%env UNSLOTH_RETURN_LOGITS = 1 # for CPT\n%env UNSLOTH_COMPILE_DISABLE=1\n%set_env UNSLOTH_A 2\nLoraConfig(r=8)"
    calls = of_notebook(json.dumps({"cells": [{"cell_type": "code", "source": [source]}]}), file="run.ipynb").calls
    environment = next(call["kwargs"] for call in calls if call["call"] == "os.environ")
    assert environment == {"UNSLOTH_RETURN_LOGITS": "1 # for CPT", "UNSLOTH_COMPILE_DISABLE": "1", "UNSLOTH_A": "2"}

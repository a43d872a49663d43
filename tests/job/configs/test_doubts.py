"""What only a program knows: which of several calls counts, and what it writes where its text does not tell."""

from __future__ import annotations

import ast

import pytest

import peftplan
from peftplan.errors import PeftplanError
from peftplan.job.configs import flow
from peftplan.job.configs.bindings import own_names
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.programs import MOST_PARTS, of_script
from peftplan.job.configs.read import read_text
from peftplan.report.configs import summary

pytestmark = pytest.mark.quick

MODEL = "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B', dtype=torch.bfloat16)\n"
ARGS = "args = SFTConfig(max_length=512)\n"
LORA = "lora = LoraConfig(r=8)\n"
TRAINER = "\nSFTTrainer(model, args=args, peft_config=lora).train()\n"
EITHER = "if flag():\n    {}\nelse:\n    {}\n"
FUNCTION = "def make():\n    return LoraConfig(r={})\n"


def read(*parts: str) -> ConfigPlan:
    return read_text("".join((MODEL, *parts, TRAINER)), file="run.py")


@pytest.mark.parametrize(
    "program",
    [
        ARGS + EITHER.format("lora = LoraConfig(r=8)", "lora = LoraConfig(r=64)"),
        ARGS + LORA + "if flag():\n    lora = LoraConfig(r=64)\n",
        ARGS + "lora = LoraConfig(r=8) if flag() else LoraConfig(r=64)\n",
        ARGS + "lora = LoraConfig(r=8 if flag() else 64)\n",
        ARGS + "match mode():\n    case 1:\n        lora = LoraConfig(r=8)\n    case _:\n        lora = LoraConfig(r=64)\n",
        ARGS + "try:\n    lora = LoraConfig(r=8)\nexcept ValueError:\n    lora = LoraConfig(r=64)\n",
        ARGS + "def make():\n    if flag():\n        return LoraConfig(r=8)\n    return LoraConfig(r=64)\nlora = make()\n",
        ARGS + "if flag():\n    def make():\n        return LoraConfig(r=8)\n"
        "else:\n    def make():\n        return LoraConfig(r=64)\nlora = make()\n",
        ARGS + "lora = [LoraConfig(r=8), LoraConfig(r=64)][1]\n",
        ARGS + "r = 8\nmake = lambda: LoraConfig(r=r)\nr = 64\nlora = make()\n",
        ARGS + LORA + "setattr(lora, 'r', rank())\n",
        ARGS + LORA + "lora = dataclasses.replace(lora, r=64)\n",
        ARGS + LORA + "lora = copy.deepcopy(lora)\nlora.r = 64\n",
        ARGS + "def change(config):\n    config.r = 64\n" + LORA + "change(lora)\n",
        ARGS + "rank = 8\nglobals()['rank'] = 64\nlora = LoraConfig(r=rank)\n",
        ARGS + "rank = 8\nglobals().update(rank=64)\nlora = LoraConfig(r=rank)\n",
        ARGS + "rank = 8\nexec(open('overrides.py').read())\nlora = LoraConfig(r=rank)\n",
        ARGS + "rank = 8\nexec(code, globals())\nlora = LoraConfig(r=rank)\n",
        ARGS + "rank = 8\nif torch.cuda.device_count() > 1:\n    rank = 64\nlora = LoraConfig(r=rank)\n",
        ARGS + "rank = 8\nif not torch.version.hip:\n    rank = 64\nlora = LoraConfig(r=rank)\n",
        ARGS
        + "rank = 8\nif torch.version.hip and torch.backends.mps.is_available():\n    rank = 64\nlora = LoraConfig(r=rank)\n",
        ARGS + "rank = 8\nwith contextlib.suppress(ValueError):\n    check()\n    rank = 64\nlora = LoraConfig(r=rank)\n",
        ARGS + "rank = 8\nwith pytest.raises(ValueError):\n    check()\n    rank = 64\nlora = LoraConfig(r=rank)\n",
    ],
)
def test_a_rank_that_only_the_program_knows(program: str) -> None:
    plan = read(program)
    assert "lora.r" in plan.unsupported
    assert "r" not in plan.options


@pytest.mark.parametrize(
    "change",
    [
        "for name, value in overrides.items():\n    setattr({}, name, value)\n",
        "for name in ('r', 'max_length'):\n    setattr({}, name, 64)\n",
        "setattr({}, name, 64)\n",
        "vars({}).update(r=64)\n",
        "{}.__dict__['r'] = 64\n",
        "{}.update(r=64)\n",
        "{}.set_training(batch_size=4)\n",
        "def change(config):\n    setattr(config, name(), 64)\nchange({})\n",
        "{0} = dataclasses.replace({0}, **overrides)\n",
    ],
)
@pytest.mark.parametrize("settings", ["args", "lora"])
def test_settings_of_which_any_field_may_change(change: str, settings: str) -> None:
    assert f"{settings}.**" in read(ARGS, LORA, change.format(settings)).unsupported


@pytest.mark.parametrize(
    ("program", "rank"),
    [
        (EITHER.format("lora = LoraConfig(r=8, lora_alpha=8)", "lora = LoraConfig(r=8, lora_alpha=16)"), 8),
        (FUNCTION.format(8) + FUNCTION.format(64) + "lora = make()\n", 64),
        ("def make(r=8):\n    return LoraConfig(r=r)\ndef make(r=64):\n    return LoraConfig(r=r)\nlora = make()\n", 64),
        ("class A:\n    def make(self):\n        return LoraConfig(r=8)\n"
         "    def make(self):\n        return LoraConfig(r=64)\nlora = A().make()\n", 64),
        (FUNCTION.format(8) + "lora = make()\n" + FUNCTION.format(64), None),
        ("try:\n    raise ValueError\n    lora = LoraConfig(r=8)\nexcept ValueError:\n    lora = LoraConfig(r=64)\n", 64),
        ("from peft import LoraConfig as Adapter\nlora = Adapter(r=64)\n", 64),
        ("Adapter = LoraConfig\nlora = Adapter(r=64)\n", 64),
        ("rank = 64\nexec(code, {}, names)\nlora = LoraConfig(r=rank)\n", 64),
        ("dtype = torch.bfloat16\nrank = 8\nif dtype:\n    rank = 64\nlora = LoraConfig(r=rank)\n", 64),
        ("if torch.cuda.device_count() > 1 and flag():\n    raise ValueError\nlora = LoraConfig(r=64)\n", 64),
        (LORA + "object.__setattr__(lora, 'r', 64)\n", 64),
        (LORA + "other = lora\nother.r = 64\n", 64),
        ("a, b = LoraConfig(r=8), LoraConfig(r=64)\na, b = b, a\nlora = a\n", 64),
    ],
)  # fmt: skip
def test_a_rank_that_the_text_tells(program: str, rank: int | None) -> None:
    assert read(ARGS, program).options.get("r") == rank


@pytest.mark.parametrize(
    "adapter", ["functools.partial(LoraConfig, r=64)()", "LoraConfig.from_pretrained('a')", "get_peft_config(arguments)"]
)
def test_an_adapter_that_is_made_elsewhere_is_not_full_fine_tuning(adapter: str) -> None:
    assert read(ARGS, f"lora = {adapter}\n").unsupported["trainer.peft_config"].option == "method"


def test_settings_that_are_made_elsewhere_are_not_the_defaults() -> None:
    assert "trainer.args" in read("args = parser.parse_args_into_dataclasses()[0]\n", LORA).unsupported


def test_an_adapter_that_may_be_none_is_assumed() -> None:
    plan = read(ARGS, "lora = None\nif flag():\n    lora = LoraConfig(r=8)\n")
    assert (plan.options["method"], plan.options["r"]) == ("lora", 8)
    assert "only the program knows" in plan.assumed["method"]


def test_the_model_is_unknown_where_the_program_loads_one_of_two() -> None:
    plan = read(ARGS, LORA, "if flag():\n    model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-7B')\n")
    assert plan.model is None


def test_one_of_two_trainers_is_assumed() -> None:
    plan = read(ARGS, LORA, "if flag():\n    SFTTrainer(model, args=SFTConfig(max_length=4096), peft_config=lora)\n")
    assert "only the program knows" in plan.assumed["trainer"]


def test_settings_in_a_handler_are_unknown() -> None:
    program = "try:\n    check()\nexcept ValueError:\n    args.max_length = 64\n"
    assert "args.max_length" in read(ARGS, LORA, program).unsupported


@pytest.mark.parametrize(
    "loads",
    [
        "from transformers import AutoModelForCausalLM as Auto\nmodel = Auto",
        "import transformers as hf\nmodel = hf.AutoModelForCausalLM",
    ],
)
def test_a_model_loaded_under_another_name_of_its_class(loads: str) -> None:
    plan = read_text(f"{loads}.from_pretrained('gpt2')\n{ARGS}{LORA}{TRAINER}", file="run.py")
    assert (plan.model, plan.options["dtype"], plan.unsupported) == ("gpt2", "unstated", {})


@pytest.mark.parametrize("loads", ["load('gpt2')", "AutoLigerKernelForCausalLM.from_pretrained('a/b', load_in_8bit=True)"])
@pytest.mark.parametrize("trains", [ARGS + LORA + TRAINER, "Trainer(model=model, args=TrainingArguments('x'))"])
def test_a_model_whose_loading_is_not_read_is_unknown(loads: str, trains: str) -> None:
    plan = read_text(f"model = {loads}\n{trains}", file="run.py")
    assert {"trainer.0", "trainer.model"} & plan.unsupported.keys()


@pytest.mark.parametrize(
    "adapts", ["get_peft_model(model, IA3Config())", "PeftModel.from_pretrained(model, 'adapter', is_trainable=True)"]
)
@pytest.mark.parametrize(
    "trains",
    [ARGS + "SFTTrainer(model, args=args)", "Trainer(model=model, args=TrainingArguments('x'))"],
    ids=["trl", "transformers"],
)
def test_an_adapter_that_is_not_read_is_no_full_fine_tuning(adapts: str, trains: str) -> None:
    plan = read_text(f"{MODEL}model = {adapts}\n{trains}", file="run.py")
    assert [plan.unsupported[key].option for key in plan.unsupported] == ["method"]
    merged = read_text(f"{MODEL}model = get_peft_model(model, LoraConfig(r=8))\n{trains}\n{adapts}", file="run.py")
    assert (merged.options["method"], merged.unsupported) == ("lora", {})


@pytest.mark.parametrize("asks", ["is_bf16_supported()", "get_device_capability()[0] >= 8", "get_device_capability() >= (8, 0)"])
def test_a_program_that_asks_for_bf16_gets_it(asks: str) -> None:
    program = f"if torch.cuda.{asks}:\n    length = 64\nelse:\n    length = 32\nargs = SFTConfig(max_length=length)\n"
    assert read(program, LORA).options["seq_len"] == 64


@pytest.mark.parametrize(
    ("program", "parts"),
    [
        ("rows = []\n" + "rows.append(1)\n" * (MOST_PARTS // 2), "20,001"),
        (("x = " + "a[" * 80 + "1" + "]" * 80 + "\n") * (MOST_PARTS // 80), "36,250"),
    ],
)
def test_a_program_of_too_many_parts_is_refused_at_once(program: str, parts: str) -> None:
    what = "statements, calls and deep expressions"
    with pytest.raises(PeftplanError, match=f"{parts} {what}; accepted: a program of at most 20,000"):
        of_script(program, file="run.py")


def test_each_part_of_a_condition_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[ast.AST] = []

    def counted(node: ast.AST) -> set[str]:
        walked.append(node)
        return own_names(node)

    monkeypatch.setattr(flow, "own_names", counted)
    for condition in (" and ".join(["a"] * 100), "a if b else " * 50 + "c"):
        of_script(f"x = {condition}\nLoraConfig()", file="run.py")
    assert len(walked) < 5_000  # 26,865 where each was walked for all parts before it


def test_a_program_that_trains_twice_says_which_training_is_read() -> None:
    twice = read(ARGS, LORA, "DPOTrainer('Qwen/Qwen2.5-7B', args=DPOConfig()).train()\n")
    assert "several times" in twice.assumed["trainer"]
    assert "several times" in summary(peftplan.estimate(config=twice).config)  # type: ignore[arg-type]
    assert "trainer" not in read(ARGS, LORA).assumed

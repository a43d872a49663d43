"""What a program does to the weights of its model, and values that it changes in place."""

from __future__ import annotations

import pytest

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_text

pytestmark = pytest.mark.quick

MODEL = "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B')\n"
FREEZING = "def freeze(model):\n    for p in model.parameters():\n        p.requires_grad = False\n"
HOOK = "def hook(module, input, output):\n    output.requires_grad_(True)\nmodel.register_forward_hook(hook)\n"
FREEZE = "for p in model.parameters():\n    p.requires_grad = False\n"
ADAPT = "model = get_peft_model(model, LoraConfig(r=8))\n"
TRAIN = "trainer = SFTTrainer(model, args=SFTConfig(max_length=512))\ntrainer.train()\n"


def read(*parts: str) -> ConfigPlan:
    return read_text("".join(parts), file="run.py")


@pytest.mark.parametrize(
    "program",
    [
        MODEL + FREEZE + TRAIN,
        MODEL + "for n, p in model.named_parameters():\n    p.requires_grad = 'lm_head' in n\n" + TRAIN,
        MODEL + "for p in model.parameters():\n    setattr(p, 'requires_grad', False)\n" + TRAIN,
        MODEL + "model.model.embed_tokens.requires_grad_(False)\n" + TRAIN,
        MODEL + ADAPT + "for p in model.parameters():\n    p.requires_grad = True\n" + TRAIN,
        MODEL + ADAPT + FREEZE + TRAIN,
        MODEL
        + "def adapt(base):\n    return get_peft_model(base, LoraConfig(r=8))\nmodel = adapt(model)\n"
        + "for p in model.parameters():\n    p.requires_grad = True\n"
        + TRAIN,
        "def freeze(model):\n    for p in model.parameters():\n        p.requires_grad = False\n"
        + MODEL
        + "freeze(model)\n"
        + TRAIN,
        "def main():\n"
        + "".join(f"    {line}\n" for line in (MODEL + FREEZE + TRAIN).splitlines())
        + "if __name__ == '__main__':\n    main()\n",
        MODEL + FREEZE + "trainer = Trainer(model=model, args=TrainingArguments('x'))\ntrainer.train()\n",
        "model, tokenizer = FastLanguageModel.from_pretrained('unsloth/Qwen2.5-0.5B', load_in_4bit=False, full_finetuning=True)\n"
        + FREEZE
        + TRAIN,
    ],
)
def test_weights_that_the_program_freezes_itself(program: str) -> None:
    assert "weights.call" in read(program).unsupported


@pytest.mark.parametrize(
    "program",
    [
        MODEL + FREEZE + ADAPT + TRAIN,
        MODEL + FREEZE + "SFTTrainer(model, args=SFTConfig(max_length=512), peft_config=LoraConfig(r=8)).train()\n",
        MODEL
        + "def hook(module, input, output):\n    output.requires_grad_(True)\nmodel.register_forward_hook(hook)\n"
        + ADAPT
        + TRAIN,
        MODEL + TRAIN + FREEZE,
        MODEL + "def freeze():\n    model.requires_grad_(False)\nif False:\n    freeze()\n" + TRAIN,
        "def load():\n" + "".join(f"    {line}\n" for line in (MODEL + FREEZE).splitlines()) + "    return model\n"
        "model = load()\n" + ADAPT + TRAIN,
        MODEL + "for p in model.parameters():\n    p.requires_grad = True\n" + TRAIN,
    ],
)
def test_what_an_adapter_freezes_anyway(program: str) -> None:
    assert read(program).unsupported == {}


@pytest.mark.parametrize(
    ("load", "dtype"),
    [
        (MODEL.replace("\n", ".half()\n"), "fp16"),
        (MODEL + "model.half()\n", "fp16"),
        (MODEL + "model = model.to('cuda').bfloat16()\n", "bf16"),
        (MODEL + "model = model.cuda()\nmodel = model.float()\n", "fp32"),
        (MODEL + "model.to(dtype=torch.float16)\n", "fp16"),
        (MODEL + "model.to('cuda', torch.half)\n", "fp16"),
        (MODEL.replace("')", "', torch_dtype=torch.float32)") + "model = model.to(torch.float16)\n", "fp16"),
    ],
)
def test_a_model_that_is_cast_on_the_host(load: str, dtype: str) -> None:
    plan = read(load, TRAIN)
    assert (plan.options["dtype"], plan.unsupported) == (dtype, {})


@pytest.mark.parametrize(
    "load",
    [
        MODEL.replace("')", "', device_map='auto')") + "model.half()\n",
        MODEL.replace("')", "', load_in_8bit=True)") + "model.half()\n",
        MODEL + "if flag():\n    model.half()\n",
        MODEL + "for _ in range(n()):\n    model.half()\n",
        MODEL + ADAPT + "model.half()\n",
        MODEL + "model.to(dtype=dtype_of(model))\n",
    ],
)
def test_a_cast_whose_bytes_are_not_known(load: str) -> None:
    assert {"load.cast", "load.dtype", "peft.cast"} & read(load, TRAIN).unsupported.keys()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("names.append('k_proj')\n", ("q_proj", "k_proj")),
        ("names.extend(['k_proj', 'v_proj'])\nnames.remove('q_proj')\n", ("k_proj", "v_proj")),
        ("other = names\nother.append('k_proj')\n", ("q_proj", "k_proj")),
        ("if False:\n    names.append('k_proj')\n", ("q_proj",)),
        ("names.append(name())\n", None),
        ("for name in more():\n    names.append('k_proj')\n", None),
        ("if flag():\n    names.append('k_proj')\n", None),
        ("names.remove('k_proj')\n", None),
        ("names = {'q_proj'}\nnames.add('k_proj')\n", None),
        ("from settings import *\n", None),
        ("from .settings import *\n", None),
        ("from transformers import *\n", ("q_proj",)),
    ],
)
def test_target_modules_that_the_program_collects(change: str, names: tuple[str, ...] | None) -> None:
    plan = read(
        MODEL, "names = ['q_proj']\n", change, "model = get_peft_model(model, LoraConfig(r=8, target_modules=names))\n", TRAIN
    )
    assert plan.options.get("target_modules") == names
    assert plan.unsupported.keys() == (set() if names else {"lora.target_modules"})


@pytest.mark.parametrize("config", ["maybe() or LoraConfig(r=8)", "maybe() and LoraConfig(r=8)"])
def test_an_adapter_behind_a_part_that_only_the_program_knows(config: str) -> None:
    plan = read(MODEL, f"lora = {config}\nSFTTrainer(model, args=SFTConfig(max_length=512), peft_config=lora).train()\n")
    assert (plan.options["method"], plan.options["r"]) == ("lora", 8)
    assert "only the program knows" in plan.assumed["method"]

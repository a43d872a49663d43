"""Files that are not what they should be: one line with file, line and key; nothing in them runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import peftplan
from peftplan.errors import PeftplanError
from peftplan.job.configs.documents import read_yaml
from peftplan.job.configs.read import read_values

AXOLOTL = "base_model: gpt2\nadapter: lora\n"

SCRIPT = """from trl import SFTTrainer, SFTConfig
trainer = SFTTrainer(
    'gpt2',
    args=SFTConfig(per_device_train_batch_size='two'))
"""
NOTEBOOK = json.dumps({"cells": [{"cell_type": "markdown", "source": "x"}, {"cell_type": "code", "source": SCRIPT}]})
LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
"""Nine aliases of nine aliases, six times."""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yml", "base_model: [gpt2\nadapter: lora\n", r"a\.yml:2: not YAML"),
        ("a.yml", "- gpt2\n- lora\n", r"a\.yml:1: accepted: keys and values"),
        ("a.yml", AXOLOTL + "micro_batch_size: [1, 2]\n", r"a\.yml:3: micro_batch_size: \[1, 2\] is not valid.* a whole"),
        ("a.yml", AXOLOTL + "micro_batch_size: two\n", r"a\.yml:3: micro_batch_size: 'two'"),
        ("a.yml", AXOLOTL + "micro_batch_size: 0\n", r"a\.yml:3: micro_batch_size: 0"),
        ("a.yml", "base_model: [gpt2]\nadapter: lora\n", r"a\.yml:1: base_model: \['gpt2'\] is not .* a string"),
        ("a.yml", "base_model: {a: b}\nadapter: lora\n", r"a\.yml:1: base_model: \{'a': 'b'\} is not .* a string"),
        ("a.yml", AXOLOTL + "micro_batch_size: {a: 1}\n", r"a\.yml:3: micro_batch_size: \{'a': 1\} .* whole"),
        ("a.json", '{"base_model": "gpt2", "adapter": "lora",\n"x": {"}": 1},\n"micro_batch_size": "two"}', r"a\.json:3: micro"),
        ("a.json", '{"base_model": "gpt2", "adapter": "lora",\n"micro_batch_size": 1, "lora_dropout": 7}', r"a\.json:2: lora_d"),
        ("a.sh", "swift sft \\\n --model gpt2 \\\n --lora_rank two\n", r"a\.sh:3: lora_rank: 'two'"),
        ("a.py", SCRIPT, r"a\.py:4: args\.per_device_train_batch_size: 'two'"),
        ("a.ipynb", NOTEBOOK, r"a\.ipynb: cell 2, line 4: args\.per_device_train_batch_size: 'two'"),
        ("a.yml", AXOLOTL + "adapter: qlora\n", r"a\.yml:3: adapter appears twice"),
        ("a.yml", AXOLOTL + "x: !!python/object/apply:os.system ['true']\n", r"a\.yml:3: .*tag .*python"),
        ("a.yml", AXOLOTL + "x: !!binary aGk=\n", r"a\.yml:3: .*tag"),
        ("a.yml", AXOLOTL + "finetuning_type: lora\nmodel_name_or_path: x\n", r"a\.yml: .*axolotl"),
        ("a.yml", LAUGHS, r"at most 10,000 values"),
        ("a.yml", "a: &a {b: *a}\n", r"a\.yml:\d+: "),
        ("a.yml", "[" * 2000, r"a\.yml"),
        ("a.yml", "name: a workflow\non: push\n", r"a\.yml is not a training config"),
        ("a.json", "{", r"a\.json:1: not JSON"),
        ("a.json", '{"a": 1, "a": 2}', r"a\.json:1: 'a' appears twice"),
        ("a.json", "[1]", r"a\.json: accepted: a JSON object"),
        ("a.sh", "echo hello\n", r"a\.sh: accepted: a script with a training command"),
        ("a.py", "import torch (\n", r"a\.py:1: not Python"),
        ("a.py", f"x = {'-' * 100_000}1\n", r"a\.py: not Python: [a-z]"),
        ("a.yml", AXOLOTL + f"sequence_len: {10**22}\n", r"a\.yml:3: sequence_len: .*from 1 to 2,147,483,647"),
        ("a.py", "print(1)\n", r"a\.py: accepted: a program"),
        ("a.ipynb", "{}", r"a\.ipynb: not a notebook"),
        ("a.yml", "adapter: lora\nmicro_batch_size: 1\nbase_model:\n", r"a\.yml names no model"),
    ],
)  # fmt: skip
def test_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(PeftplanError, match=message) as caught:
        peftplan.estimate(config=name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_or_missing(tmp_path: Path) -> None:
    large = tmp_path / "large.yml"
    with large.open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(PeftplanError, match="at most 1,048,576 bytes"):
        peftplan.read_config(large)
    with pytest.raises(PeftplanError, match="cannot read"):
        peftplan.read_config(tmp_path / "none.yml")


def test_numbers_as_text_anchors_and_empty_keys() -> None:
    text = "a: 1e-5\nb: &b 3\nc: *b\nd:\ne: '1e-5'\nf: {<<: {x: 1, y: 2}, x: 3}\ng: 2e3\n"
    values = read_yaml(text, file="a.yml").values
    assert values == {"a": 1e-5, "b": 3, "c": 3, "d": None, "e": "1e-5", "f": {"x": 3, "y": 2}, "g": 2000}


def test_interpolation(tmp_path: Path) -> None:
    """What the file answers is filled in; what it does not answer is not supported."""
    path = tmp_path / "a.yml"
    path.write_text(
        "size: 4\nmodel: {_component_: torchtune.models.llama2.llama2_7b}\nbatch_size: ${size}\n"
        "checkpointer: {checkpoint_dir: /data/Llama-2-7b-hf}\ngradient_accumulation_steps: ${oc.env:STEPS}\n"
        "output_dir: ${x}/${y}\n"
    )
    plan = peftplan.read_config(path)
    assert (plan.options["batch_size"], plan.model) == (4, "Llama-2-7b-hf")
    assert "gradient_accumulation_steps" in plan.unsupported


def test_a_shell_script(tmp_path: Path) -> None:
    """Variables of the script and its arithmetic are filled in; nothing runs."""
    path = tmp_path / "train.sh"
    path.write_text(
        "#!/bin/bash\nnproc=2\nMODEL=Qwen/Qwen2.5-7B-Instruct\ntouch $(pwd)/ran\n"
        "NPROC_PER_NODE=$nproc \\\nswift sft \\\n    --model ${MODEL} \\\n    # a comment\n    --tuner_type lora \\\n"
        "    --per_device_train_batch_size ${BS:-4} --gradient_accumulation_steps $(expr 16 / $nproc) \\\n"
        "    --torch_dtype bfloat16 &> log\n"
    )
    plan = peftplan.read_config(path)
    assert (plan.tool, plan.model) == ("swift", "Qwen/Qwen2.5-7B-Instruct")
    assert (plan.options["batch_size"], plan.options["gradient_accumulation_steps"]) == (4, 8)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("assigned", ["A=$A$A", "A=($A $A)"])
def test_variables_that_double(tmp_path: Path, assigned: str) -> None:
    """Sixty lines of this were 2**60 times as long."""
    path = tmp_path / "train.sh"
    path.write_text("A=aaaaaaaaaa\n" + f"{assigned}\n" * 60 + "swift sft --model Qwen/Qwen2.5-7B-Instruct --tuner_type $A\n")
    with pytest.raises(PeftplanError, match=r"train\.sh:1[0-9]: accepted: a command of at most 65,536 characters"):
        peftplan.read_config(path)


def test_a_script_and_a_notebook(tmp_path: Path) -> None:
    source = (
        "from unsloth import FastLanguageModel\nlength = 1024\n"
        "model, tokenizer = FastLanguageModel.from_pretrained('unsloth/Llama-3.2-1B-Instruct', max_seq_length=length)\n"
        "model = FastLanguageModel.get_peft_model(model, r=8, target_modules=['q_proj'])\n"
        "trainer = SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=2))\nopen('ran', 'w')\n"
    )
    script = tmp_path / "train.py"
    script.write_text(source)
    notebook = tmp_path / "train.ipynb"
    cell = {"cell_type": "code", "source": ["%%capture\n", "!pip install unsloth\n", *source.splitlines(keepends=True)]}
    notebook.write_text(__import__("json").dumps({"cells": [{"cell_type": "markdown", "source": ["# x"]}, cell]}))
    for path in (script, notebook):
        plan = peftplan.read_config(path)
        assert (plan.tool, plan.model) == ("unsloth", "llama-3.2-1b")
        assert (plan.options["seq_len"], plan.options["r"], plan.options["batch_size"]) == (1024, 8, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.ipynb", "train.py"]


def test_the_config_of_a_model_is_no_training_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(PeftplanError, match=r"config\.json is the config of a model, .*; name it as MODEL"):
        peftplan.estimate(config=tmp_path / "config.json")


def test_names_of_modules_that_are_none() -> None:
    values = {"model._component_": "torchtune.models.qwen2.lora_qwen2_0_5b", "model.lora_attn_modules": [["q_proj"]]}
    with pytest.raises(PeftplanError, match=r"model\.lora_attn_modules: .* accepted: a list of names"):
        read_values(values, file="a.yml", tool="torchtune")


def test_a_model_whose_name_is_no_path() -> None:
    """A file system refuses so long a name."""
    assert read_values({"base_model": "x" * 5000, "adapter": "lora"}, file="a.yml", tool="axolotl").model == "x" * 5000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora_target_modules: '(((('", r"a\.yml:4: lora_target_modules: '\(\(\(\(' is not valid; not a regular expression"),
        ("lora_dropout: 7", r"a\.yml:4: lora_dropout must be below 1\.0 \(got 7\)"),
        ("lora_r: 999999999", r"a\.yml:4: lora_r must be at most 1,048,576"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_named_by_its_key(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.yml").write_text(f"{AXOLOTL}micro_batch_size: 1\n{line}\n")
    with pytest.raises(PeftplanError, match=message):
        peftplan.estimate(config=tmp_path / "a.yml")


@pytest.mark.parametrize("optimizer", ["nonsense", 5, ["adamw_torch"]])
def test_an_optimizer_that_no_rule_knows_cannot_be_said(optimizer: object) -> None:
    """It was read as the default, and the peak stood without a bound."""
    values = {"base_model": "gpt2", "adapter": "lora", "micro_batch_size": 1, "optimizer": optimizer}
    plan = read_values(values, file="a.yml", tool="axolotl")
    assert "is not known to peftplan" in plan.unsupported["optimizer"].why
    assert plan.without({"optim": "sgd"}).get("optimizer") is None


@pytest.mark.parametrize("name", ["attention", "mlp", "peft-default"])
def test_words_of_ours_are_names_to_a_tool(tmp_path: Path, name: str) -> None:
    """`lora_target_modules: attention` was read as our word for four projections; peft matches it with names, and finds none."""
    (tmp_path / "a.yml").write_text(f"{AXOLOTL}micro_batch_size: 1\nlora_r: 8\nlora_target_modules: {name}\n")
    with pytest.raises(PeftplanError, match=r"a\.yml:5: lora_target_modules: .*no module of gpt2 matches|not a layer"):
        peftplan.estimate(config=tmp_path / "a.yml")
    with pytest.raises(PeftplanError, match=r"no module of gpt2 matches|is not a layer that can be adapted"):
        peftplan.estimate("gpt2", peft_config={"peft_type": "LORA", "target_modules": name})


KEYS_OF_TOOLS = {
    "axolotl": ("base_model: gpt2\nadapter: lora\nlora_target_linear: true\n", "base_model", "micro_batch_size", "lora_r"),
    "llamafactory": (
        "stage: sft\nmodel_name_or_path: gpt2\nfinetuning_type: lora\n",
        "model_name_or_path",
        "per_device_train_batch_size",
        "lora_rank",
    ),
    "trl": ("model_name_or_path: gpt2\nuse_peft: true\n", "model_name_or_path", "per_device_train_batch_size", "lora_r"),
    "swift": ("model: gpt2\ntuner_type: lora\n", "model", "per_device_train_batch_size", "lora_rank"),
    "nemo-automodel": (
        "model: {pretrained_model_name_or_path: gpt2}\nstep_scheduler: {local_batch_size: 1}\n",
        "model.pretrained_model_name_or_path",
        "step_scheduler.local_batch_size",
        "peft.dim",
    ),
}
"""Tool → a file, and its keys for the model, the batch and the rank."""


@pytest.mark.parametrize("tool", KEYS_OF_TOOLS)
@pytest.mark.parametrize("value", [["a", "b"], {"a": "b"}, "eight", -1, 0, 1.5, 10**30, True, float("nan"), [[1]], "8 rows"])
def test_a_wrong_type_is_named_with_file_line_and_key(tmp_path: Path, tool: str, value: object) -> None:
    text, model, *whole = KEYS_OF_TOOLS[tool]
    for key in [*whole, *([] if isinstance(value, str) else [model])]:
        values = read_yaml(text, file="a.yml").values
        inner = values
        for name in key.split(".")[:-1]:
            inner = inner.setdefault(name, {})  # type: ignore[assignment]
        inner[key.rpartition(".")[2]] = value
        file = tmp_path / "a.json"
        file.write_text(json.dumps(values, indent=1))
        with pytest.raises(
            PeftplanError, match=rf"a\.json:\d+: {key}: .* is not valid; accepted: a (string|whole number)"
        ) as caught:
            peftplan.read_config(file, tool=tool)
        assert "\n" not in str(caught.value)

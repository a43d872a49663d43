"""Programs that read their settings from a YAML or JSON file beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftplan.job.configs.read import read_config

SETTINGS = "model: {name: Qwen/Qwen2.5-0.5B}\ntraining: {rows: 4}\n"
IMPORTS = (
    "import json, os, yaml\nfrom argparse import ArgumentParser\nfrom pathlib import Path\n"
    "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\n"
)
TRAINED = (
    "model = AutoModelForCausalLM.from_pretrained(settings['model']['name'])\n"
    "args = TrainingArguments('out', per_device_train_batch_size=settings['training']['rows'])\n"
    "Trainer(model=model, args=args).train()\n"
)


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "lines",
    [
        "with open('configs/run.yaml') as f:\n    settings = yaml.safe_load(f)\n",
        "settings = yaml.safe_load(Path('configs/run.yaml').read_text())\n",
        "settings = yaml.load(open(Path(__file__).resolve().parent / 'configs' / 'run.yaml'), Loader=yaml.SafeLoader)\n",
        "settings = yaml.safe_load(open(os.path.join(os.path.dirname(__file__), 'configs', 'run.yaml')).read())\n",
        "def read(path):\n    with open(path) as f:\n        values = yaml.safe_load(f)\n    return values\n"
        "settings = read('configs/run.yaml')\n",
        "def read(path):\n    with open(path) as f:\n        return yaml.safe_load(f)\n"
        "parser = ArgumentParser()\nparser.add_argument('--config', type=Path, default=Path('configs/run.yaml'))\n"
        "settings = read(parser.parse_args().config)\n",
    ],
)
def test_a_file_at_a_known_path_is_read(tmp_path: Path, lines: str) -> None:
    written(tmp_path / "configs" / "run.yaml", SETTINGS)
    plan = read_config(written(tmp_path / "train.py", IMPORTS + lines + TRAINED))
    assert (plan.model, plan.options["batch_size"]) == ("Qwen/Qwen2.5-0.5B", 4)


def test_settings_go_through_functions(tmp_path: Path) -> None:
    written(tmp_path / "run.json", '{"model": {"name": "Qwen/Qwen2.5-0.5B"}, "training": {"rows": 4}}')
    body = "".join(f"    {line}\n" for line in TRAINED.splitlines())
    read = "def read(path):\n    return json.load(open(path))\ndef check(settings):\n    assert settings['training']\n"
    program = f"{IMPORTS}{read}def run(settings):\n    check(settings)\n{body}def main():\n    run(read('run.json'))\nmain()\n"
    assert read_config(written(tmp_path / "train.py", program)).options["batch_size"] == 4
    changed = program.replace("    check(settings)\n", "    part = settings['training']\n    part['rows'] = count()\n")
    assert "args.per_device_train_batch_size" in read_config(written(tmp_path / "train.py", changed)).unsupported


@pytest.mark.parametrize(
    "lines",
    [
        "settings = yaml.safe_load(open('away.yaml'))\n",
        "settings = yaml.safe_load(open(name()))\n",
        "def read(path):\n    if os.path.exists(path):\n        return yaml.safe_load(open(path))\n    return {}\n"
        "settings = read('run.yaml')\n",
    ],
)
def test_a_file_that_only_the_program_knows_is_not_guessed(tmp_path: Path, lines: str) -> None:
    written(tmp_path / "run.yaml", SETTINGS)
    assert read_config(written(tmp_path / "train.py", IMPORTS + lines + TRAINED)).model is None


def test_a_path_that_two_files_answer_to_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, tmp_path / "scripts"):
        written(folder / "run.yaml", SETTINGS + f"# {folder}\n")
    written(tmp_path / "scripts" / "train.py", IMPORTS + "settings = yaml.safe_load(open('run.yaml'))\n" + TRAINED)
    monkeypatch.chdir(tmp_path)
    assert read_config("scripts/train.py").model is None


def test_a_placeholder_of_another_program_is_no_value(tmp_path: Path) -> None:
    written(tmp_path / "run.yaml", SETTINGS.replace("Qwen/Qwen2.5-0.5B", "${base}"))
    plan = read_config(written(tmp_path / "train.py", IMPORTS + "settings = yaml.safe_load(open('run.yaml'))\n" + TRAINED))
    assert plan.model is None


def test_modules_of_a_program_stand_in_folders_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "tuning" / "settings.py", "NAME = 'Qwen/Qwen2.5-0.5B'\n")
    program = IMPORTS + "from tuning.settings import NAME\nsettings = {'model': {'name': NAME}, 'training': {'rows': 4}}\n"
    written(tmp_path / "tuning" / "train.py", program + TRAINED)
    monkeypatch.chdir(tmp_path)
    assert read_config("tuning/train.py").model == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize(("dtype", "bf16"), [("'auto'", True), ("torch.bfloat16", True), ("torch.float16", False)])
def test_the_dtype_of_a_loaded_model(tmp_path: Path, dtype: str, *, bf16: bool) -> None:
    """transformers 5.24, modeling_utils.py:1306: `model.dtype` is that of its weights; Qwen2.5's config.json says bfloat16."""
    program = IMPORTS + f"import torch\nmodel = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B', torch_dtype={dtype})\n"
    program += "of = model.dtype\nargs = TrainingArguments('out', bf16=True if of == torch.bfloat16 else False)\n"
    plan = read_config(written(tmp_path / "train.py", program + "Trainer(model=model, args=args).train()\n"))
    assert plan.options["autocast"] == ("bf16" if bf16 else "none")
    quantized = program.replace("torch_dtype=", "load_in_4bit=True, torch_dtype=")
    plan = read_config(written(tmp_path / "train.py", quantized + "Trainer(model=model, args=args).train()\n"))
    assert "args.bf16" in plan.unsupported


def test_a_key_that_one_way_adds_leaves_the_others_known(tmp_path: Path) -> None:
    """Programs for several releases ask whether a trainer takes an argument."""
    program = IMPORTS + (
        "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B')\n"
        "words = dict(output_dir='out', per_device_train_batch_size=4)\n"
        "if known('dataset_text_field'):\n    words['logging_dir'] = 'logs'\n"
        "Trainer(model=model, args=TrainingArguments(**words)).train()\n"
    )
    plan = read_config(written(tmp_path / "train.py", program))
    assert (plan.options["batch_size"], plan.unsupported) == (4, {})
    plan = read_config(written(tmp_path / "train.py", program.replace("words['logging_dir'] = 'logs'", "words['optim'] = 'sgd'")))
    assert list(plan.unsupported) == ["args.optim"]


@pytest.mark.parametrize(
    "line",
    [
        "parse_yaml_file('run.yaml')",
        "parse_yaml_file(yaml_file=os.path.abspath('run.yaml'))",
        "parse_dict(yaml.safe_load(open('run.yaml')), allow_extra_keys=True)",
    ],
)
def test_a_parser_takes_settings_from_a_file(tmp_path: Path, line: str) -> None:
    """transformers 5.24, hf_argparser.py (`parse_yaml_file`, `parse_dict`)."""
    written(tmp_path / "run.yaml", "name: Qwen/Qwen2.5-0.5B\nper_device_train_batch_size: 4\noutput_dir: out\nbf16: true\n")
    program = IMPORTS + (
        "from dataclasses import dataclass\nfrom transformers import HfArgumentParser\n"
        "@dataclass\nclass Words:\n    name: str\n    rows: int = 1\n"
        f"words, args = HfArgumentParser((Words, TrainingArguments)).{line}\n"
        "model = AutoModelForCausalLM.from_pretrained(words.name)\nTrainer(model=model, args=args).train()\n"
    )
    plan = read_config(written(tmp_path / "train.py", program))
    assert (plan.model, plan.options["batch_size"], plan.options["autocast"]) == ("Qwen/Qwen2.5-0.5B", 4, "bf16")
    assert not plan.unsupported

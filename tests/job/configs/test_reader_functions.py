"""Programs that read their settings by functions of their own, each call for itself; Python, which runs them, is the witness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftplan.job.configs.read import read_config
from tests.job.configs.test_users_files import written

LOADERS = {
    "a file": "def load(path):\n    with open(path) as f:\n        return yaml.safe_load(f)",
    "a path": (
        "def load(path):\n    '''Read.'''\n    place = Path(path)\n"
        "    with place.open('r') as f:\n        return yaml.safe_load(f)"
    ),
    "a text": (
        "def load(path, encoding='utf-8'):\n    try:\n        value = yaml.safe_load(Path(path).read_text(encoding=encoding))\n"
        "    except OSError as error:\n        raise ValueError(path) from error\n"
        "    if not isinstance(value, dict):\n        raise ValueError(path)\n    return value"
    ),
    "two functions": (
        "def opened(path):\n    with open(path) as f:\n        return yaml.safe_load(f)\n"
        "def load(path):\n    print(path)\n    found = opened(path)\n    return found"
    ),
}
OTHERS = {
    "one that changes it": "def load(path):\n    value = yaml.safe_load(open(path))\n    value['batch'] = 16\n    return value",
    "one that returns early": (
        "def load(path):\n    if os.path.getsize(path) > 3:\n        return {'batch': 16}\n    return yaml.safe_load(open(path))"
    ),
}
HEAD = """import os, yaml
from pathlib import Path
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
"""
TAIL = """
ROOT = Path(__file__).resolve().parents[1]
settings, sizes = load(str(ROOT / 'a.yaml')), load(str(ROOT / 'b.yaml'))
rows = sizes['batch']
if isinstance(rows, str) and not isinstance(rows, int):
    rows = 1
model = AutoModelForCausalLM.from_pretrained(settings['model']['name'], dtype='bfloat16')
args = TrainingArguments('out', per_device_train_batch_size=rows, bf16=True)
Trainer(model=model, args=args, train_dataset=data).train()
"""


def folder(tmp_path: Path, text: str) -> Path:
    written(tmp_path / "a.yaml", "model:\n  name: Qwen/Qwen2.5-0.5B\n")
    written(tmp_path / "b.yaml", "batch: 4\n")
    return written(tmp_path / "src" / "train.py", HEAD + text + TAIL)


def really(text: str, path: Path) -> object:
    names: dict[str, Any] = {}
    exec("import os, yaml\nfrom pathlib import Path\n" + text, names)
    return names["load"](str(path))


@pytest.mark.parametrize("how", LOADERS)
def test_each_call_reads_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    program = folder(tmp_path, LOADERS[how])
    assert really(LOADERS[how], tmp_path / "b.yaml") == {"batch": 4}
    monkeypatch.chdir(tmp_path)
    plan = read_config(program)
    assert (plan.model, plan.options["batch_size"], dict(plan.unsupported)) == ("Qwen/Qwen2.5-0.5B", 4, {})


@pytest.mark.parametrize("how", OTHERS)
def test_what_a_function_does_besides_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    program = folder(tmp_path, OTHERS[how])
    assert really(OTHERS[how], tmp_path / "b.yaml") == {"batch": 16}
    monkeypatch.chdir(tmp_path)
    assert "args.per_device_train_batch_size" in read_config(program).unsupported


GROWS = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(
    ("line", "grows"),
    [
        (f"os.environ['{GROWS}'] = 'expandable_segments:True'\n", True),
        (f"os.environ.setdefault('{GROWS}', 'max_split_size_mb:64,expandable_segments:True')\n", True),
        (f"os.environ['{GROWS}'] = 'expandable_segments:False'\n", False),
        ("", None),
    ],
)
def test_a_program_lets_segments_grow(tmp_path: Path, line: str, grows: bool | None) -> None:
    text = HEAD + line + "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B')\n"
    text += "Trainer(model=model, args=TrainingArguments('out')).train()\n"
    assert read_config(written(tmp_path / "a.py", text)).options.get("expandable_segments") is grows


def test_a_script_lets_segments_of_its_program_grow(tmp_path: Path) -> None:
    written(tmp_path / "sft.yaml", "model_name_or_path: Qwen/Qwen2.5-0.5B\nper_device_train_batch_size: 4\noutput_dir: out\n")
    run = written(tmp_path / "run.sh", f"export {GROWS}=expandable_segments:True\ntrl sft --config sft.yaml\n")
    assert read_config(run).options["expandable_segments"] is True

"""CONTRIBUTING.md and docs/design.md say what is there, and the worked examples, taken from the page, do what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import peftplan
from peftplan import datafiles, methods
from peftplan.arch import catalogue, llama, readers
from peftplan.hardware import gpus
from peftplan.hardware.usable import usable_bytes
from peftplan.job.script import Script
from peftplan.memory import models
from peftplan.methods import METHODS, Method
from peftplan.optim import OPTIMIZERS, names, torch_optim
from tests.test_imports import LEVELS

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(
    r"^<!-- not run: tests/test_contributing.py applies it: (?P<name>\w+) -->\n```\w+\n(?P<body>.*?)^```$", re.M | re.S
)
PATH = re.compile(r"`((?:[\w.]+/)+[\w.]*|\w+\.(?:md|toml|py))`")
EXAMPLES = {match["name"]: match["body"] for match in EXAMPLE.finditer(CONTRIBUTING)}


def row(text: str) -> str:
    """A row of a registry that the page gives in its text, as code: it has to stand there."""
    prose = " ".join(CONTRIBUTING.split())
    assert f"`{text}`" in prose
    return text


def test_every_example_is_applied_here() -> None:
    assert EXAMPLES.keys() == {"card", "alias", "family", "method", "optimizer", "trainer"}


@pytest.mark.parametrize(
    ("page", "bases"), [(CONTRIBUTING, (ROOT,)), (DESIGN, (ROOT / "peftplan", ROOT))], ids=("contributing", "design")
)
def test_every_path_is_there(page: str, bases: tuple[Path, ...]) -> None:
    # `methods/NAME.py` is to be filled in, `targets.py` and `saved.py` lie beside the file named before them
    paths = {path for path in PATH.findall(EXAMPLE.sub("", page)) if "NAME" not in path and "OWNER" not in path}
    beside = (*bases, ROOT / "peftplan" / "methods")
    assert len(paths) > 20
    assert sorted(path for path in paths if not any((base / path).exists() for base in beside)) == []


def test_the_table_of_rooms_is_that_of_the_import_test() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", DESIGN, re.M)
    rooms = [
        [room for level, cell in rows if int(level) == number for room in re.findall(r"`([\w.]+)`", cell)]
        for number in range(1, len(LEVELS) + 1)
    ]
    assert [sorted(level) for level in rooms] == [sorted(level) for level in LEVELS]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the files that an example changes, which peftplan reads instead of its own; the other folders are linked."""
    for path in datafiles.DATA.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
        else:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    of_gpus = (gpus.gpus, gpus._ids_by_key, gpus._rows_by_id, gpus._gpu)
    cached = (datafiles.parsed, *of_gpus, catalogue._entries, catalogue._by_key, catalogue._by_alias)
    monkeypatch.setattr(datafiles, "DATA", tmp_path)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


def test_a_card(data: Path) -> None:
    path = data / "gpus.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["gpus"].append(json.loads(EXAMPLES["card"]))
    path.write_text(json.dumps(content), encoding="utf-8")
    assert gpus.find_gpu("NVIDIA GeForce RTX 9090").id == gpus.find_gpu("9090").id == "rtx-9090"
    assert usable_bytes(gpus.find_gpu("rtx-9090")).bytes == 31_500 * 2**20
    (verdict,) = peftplan.estimate("gpt2", gpu="rtx-9090").gpus
    assert (verdict.gpu, verdict.verdict, verdict.usable_bytes) == ("rtx-9090", "fits", 31_500 * 2**20)


def test_an_alias(data: Path) -> None:
    path = data / "model_aliases.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["aliases"] |= (rows := json.loads(EXAMPLES["alias"]))
    path.write_text(json.dumps(content), encoding="utf-8")
    ((alias, entry),) = rows.items()
    assert entry["source"] in content["sources"]
    model = catalogue.find(alias)
    assert model is not None
    assert (model.name, model.repo_id) == (entry["model"], entry["original"])
    assert peftplan.estimate(alias).model["num_parameters"] == 8_030_261_248  # as its publisher prints it


CONFIG: dict[str, Any] = {
    "model_type": "ministral",
    "architectures": ["MinistralForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "tie_word_embeddings": False,
}


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's reader and forward, registered."""
    namespace = dict(vars(llama))
    exec(EXAMPLES["family"], namespace)
    monkeypatch.setattr(llama, "ministral", namespace["ministral"], raising=False)
    for registry, text in (
        (readers.READERS, '"ministral": ("llama", "ministral", "CAUSAL_LM")'),
        (models.FORWARDS, '"ministral": ("llama", "llama")'),
    ):
        for name, value in eval(f"{{{row(text)}}}").items():
            monkeypatch.setitem(registry, name, value)


@pytest.mark.usefixtures("family")
def test_a_family_is_the_real_model() -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import assert_same, build

    assert_same(readers.read_config(CONFIG, name="test"), build(CONFIG, "MinistralForCausalLM"))


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("seq_len", [48, 128])
def test_a_family_peaks_where_the_trace_does(seq_len: int) -> None:
    """Within the window, and beyond it."""
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    from tests.memory.engines import TOLERANCE, phases

    ours, traced = (phases(CONFIG, engine, method="qlora", seq_len=seq_len) for engine in ("analytic", "trace"))
    assert ours == pytest.approx(traced, rel=TOLERANCE)


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's module and its row."""
    module = ModuleType("peftplan.methods.hra")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(EXAMPLES["method"], vars(module))
    text = (
        'Method("hra", "HRA", "hra", "HRAConfig", "hra", "Householder reflections of the input",'
        ' "Yuan et al. 2024, arXiv 2405.17484")'
    )
    monkeypatch.setitem(METHODS, "hra", eval(row(text), {"Method": Method}))
    monkeypatch.setattr(methods, "OTHER_PEFT_TYPES", tuple(name for name in methods.OTHER_PEFT_TYPES if name != "HRA"))


@pytest.mark.usefixtures("method")
def test_a_method() -> None:
    result = peftplan.estimate("llama-2-7b", method="hra", r=4, target_modules=["q_proj", "down_proj"])
    # 32 layers: q reads 4,096 features, down 11,008; r of each
    assert result.trainable_parameters == 32 * 4 * (4_096 + 11_008)
    assert result.peaks is None
    assert "activations of method hra" in result.not_modelled[0]


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize(
    "options", [{}, {"r": 5, "target_modules": ["q_proj", "down_proj"]}, {"r": 4, "layers_to_transform": [1]}]
)
def test_a_method_has_pefts_tensors(options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    from tests.methods.tiny import assert_like_peft

    assert_like_peft("llama", "hra", **options)


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's states and its row."""
    namespace = dict(vars(torch_optim))
    exec(EXAMPLES["optimizer"], namespace)
    made_by = {"_torch": names._torch, "adamax": namespace["adamax"]}
    monkeypatch.setitem(OPTIMIZERS, "adamax", eval(row('_torch("adamax", "Adamax", adamax, {})'), made_by))


@pytest.mark.usefixtures("optimizer")
def test_an_optimizer() -> None:
    result = peftplan.estimate("gpt2", optim="adamax", r=8, target_modules=["c_attn"])
    lines = [line for line in result.static if line.category == "optimizer_states" and line.place == "device"]
    # per layer A (8, 768) and B (2304, 8), two fp32 states of each; all are multiples of 512 B
    assert sum(line.bytes() for line in lines) == 12 * 2 * 4 * (8 * 768 + 2304 * 8)
    assert result.peaks is None
    assert "a step of optim adamax" in result.not_modelled[0]


@pytest.mark.usefixtures("optimizer")
def test_an_optimizer_has_torchs_states() -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    real = torch.optim.Adamax([parameter])
    real.step()
    ours = names.parse_optim("adamax").param_states(torch_optim.Param((6, 4), "bf16", False, False), {})
    assert {state.name: (state.dims, state.nbytes) for state in ours} == {
        name: (tuple(value.shape), value.nbytes) for name, value in real.state[parameter].items()
    }


UNCLIPPED = """
import peftplan
from peftplan.cli import main
steps = [
    peftplan.estimate("gpt2", trainer=trainer, r=8, target_modules=["c_attn"], seq_len=1).peaks.requested["step"]
    for trainer in ("transformers", "unclipped")
]
print(*steps)
main(["estimate", "--help"])
"""


def test_a_trainer(tmp_path: Path) -> None:
    """The name and the record alone, in a copy of the package."""
    copied = shutil.copytree(ROOT / "peftplan", tmp_path / "peftplan", ignore=shutil.ignore_patterns("__pycache__", "data"))
    (tmp_path / "data").symlink_to(ROOT / "data")
    names = copied / "job" / "trainer_words.py"
    text = names.read_text(encoding="utf-8")
    names.write_text(text.replace("TrainerName = Literal[", 'TrainerName = Literal["unclipped", '), encoding="utf-8")
    file = copied / "job" / "trainers.py"
    text = file.read_text(encoding="utf-8")
    start = text.index("    for trainer in (\n") + len("    for trainer in (\n")
    file.write_text(text[:start] + f"{EXAMPLES['trainer'].strip()},\n" + text[start:], encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-c", UNCLIPPED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    clipped, unclipped = map(int, run.stdout.splitlines()[0].split())
    # the norms of A and B in 12 layers, the stack of the 24, and the norm of that: scalars of fp32 and 96 B, 512 B each
    assert clipped - unclipped == (24 + 1 + 1) * 512
    assert "unclipped" in run.stdout.partition("--trainer")[2].splitlines()[0]


def test_a_release_of_transformers() -> None:
    """When a workspace is taken moves what is reserved."""
    scripts = [Script(transformers=version) for version in ("5.18.0", "5.19.0")]
    assert [script.rotary_by_product for script in scripts] == [True, False]
    before, after = (peftplan.estimate("qwen2.5-0.5b", script=script, quant="nf4").peaks for script in scripts)
    assert before is not None
    assert after is not None
    assert before.reserved != after.reserved

"""The options that type checkers know are those that are accepted, and a program with a wrong keyword does not pass mypy."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import peftplan
from peftplan.distributed.strategy import Distributed
from peftplan.job import options
from peftplan.job.launch import FILES
from peftplan.job.setup import Setup
from peftplan.job.words import MEANINGS
from peftplan.methods import METHODS

ROOT = Path(peftplan.__file__).parents[1]


def test_every_option_of_the_setup_has_its_type() -> None:
    assert options.SetupOptions.__annotations__.keys() == Setup.model_fields.keys()


def test_every_option_of_a_strategy_has_its_type() -> None:
    assert options.StrategyOptions.__annotations__.keys() == Distributed.model_fields.keys() | FILES.keys()


def test_every_field_of_a_method_has_its_type() -> None:
    configs = [getattr(import_module(f"peftplan.methods.{method.module}"), method.config) for method in METHODS.values()]
    fields = {name for config in configs for name in (*config.model_fields, *config.no_effect)}
    assert options.MethodOptions.__annotations__.keys() == fields - Setup.model_fields.keys()


def test_every_word_of_other_tools_is_known() -> None:
    known = (
        options.SetupOptions.__annotations__.keys()
        | options.StrategyOptions.__annotations__.keys()
        | options.MethodOptions.__annotations__.keys()
    )
    assert options.OtherWords.__annotations__.keys() == MEANINGS.keys() - known - {"method"}


def checked(code: str, folder: Path) -> str:
    """What mypy says of a program that uses the package."""
    pytest.importorskip("mypy")
    (folder / "program.py").write_text(f"import peftplan\n{code}\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(ROOT / ".mypy_cache")]
    return subprocess.run([*command, str(folder / "program.py")], cwd=ROOT, capture_output=True, text=True).stdout


def test_a_wrong_keyword_is_a_type_error(tmp_path: Path) -> None:
    """Right ones pass: options of the setup, of a method, and another tool's word; also those that others hand to `estimate`."""
    text = checked(
        """
result = peftplan.estimate("gpt2", method="lora", r=8, target_modules=["c_attn"], batch_size=4, load_in_4bit=True, gpu="t4")
print(result.peaks, peftplan.fit("gpt2", gpu="t4", r=8, method="lora"), peftplan.compare("gpt2", methods="lora", dtype="bf16"))
peftplan.estimate("gpt2", bach_size=4)
peftplan.estimate("gpt2", batch_size="four")
peftplan.estimate("gpt2", trainer="trainer")
peftplan.fit("gpt2", gpu="t4", seqlen=4)
peftplan.compare("gpt2", methods="lora", optimiser="adamw")
peftplan.serving("gpt2", method="lora", r=8, batch_size=4, context=512)
peftplan.serving("gpt2", method="lora", rr=8)
""",
        tmp_path,
    )
    lines = [line for line in text.splitlines() if ": error:" in line]
    assert sorted({int(line.split(":")[1]) for line in lines}) == [5, 6, 7, 8, 9, 11], text
    assert 'Unexpected keyword argument "bach_size"' in lines[0]
    assert 'Argument "batch_size" to "estimate" has incompatible type "str"; expected "int"' in lines[1]

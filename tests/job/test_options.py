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
from peftplan.job.grid_options import GridOptions
from peftplan.job.launch import FILES
from peftplan.job.setup import Setup
from peftplan.job.words import MEANINGS
from peftplan.methods import METHODS
from tools import grid_options

ROOT = Path(peftplan.__file__).parents[1]


SIZES = options.SizeOptions.__annotations__.keys()


def test_every_option_of_the_setup_has_its_type() -> None:
    assert options.SetupOptions.__annotations__.keys() == Setup.model_fields.keys() - SIZES


def test_every_option_of_a_strategy_has_its_type() -> None:
    assert options.StrategyOptions.__annotations__.keys() == Distributed.model_fields.keys() | FILES.keys()


def test_every_field_of_a_method_has_its_type() -> None:
    configs = [getattr(import_module(f"peftplan.methods.{method.module}"), method.config) for method in METHODS.values()]
    fields = {name for config in configs for name in (*config.model_fields, *config.no_effect)}
    assert options.MethodOptions.__annotations__.keys() == fields - Setup.model_fields.keys() - SIZES
    assert {*Setup.model_fields, *fields} >= SIZES


def test_every_word_of_other_tools_is_known() -> None:
    known = (
        SIZES
        | options.SetupOptions.__annotations__.keys()
        | options.StrategyOptions.__annotations__.keys()
        | options.MethodOptions.__annotations__.keys()
    )
    assert options.OtherWords.__annotations__.keys() == MEANINGS.keys() - known - {"method"}


def test_a_sweep_takes_every_option_of_a_job() -> None:
    pytest.importorskip("ruff")
    assert grid_options.FILE.read_text(encoding="utf-8") == grid_options.written(), "run `python -m tools.grid_options`"
    assert GridOptions.__annotations__.keys() == options.JobOptions.__annotations__.keys() - {*grid_options.OWN}


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


def test_keywords_of_a_sweep_are_typed(tmp_path: Path) -> None:
    """A value, a list, a range, an array and text pass; a wrong name and a value of another kind do not."""
    pytest.importorskip("numpy")
    text = checked(
        """
import numpy as np
peftplan.sweep("gpt2", batch_size=[1, 2], seq_len=range(512, 8192, 512), r=np.array([8, 16]), padding=[True, False])
peftplan.sweep(["gpt2"], batch_size="1:16", trainer=["trl", "plain"], lora_rank=[8, 16], target_modules=[["c_attn"], None])
peftplan.sweep("gpt2", batchsize=[1, 2])
peftplan.sweep("gpt2", batch_size=1.5)
peftplan.sweep("gpt2", trainer=["trainer"])
""",
        tmp_path,
    )
    lines = [line for line in text.splitlines() if ": error:" in line]
    assert sorted({int(line.split(":")[1]) for line in lines}) == [6, 7, 8], text


def test_rows_are_typed_by_column(tmp_path: Path) -> None:
    """An option of the grid is a column of a sweep, and a misspelt column of any result is a type error."""
    text = checked(
        """
row = next(iter(peftplan.sweep("gpt2", seq_len=[64, 128], quant=["nf4", None])))
tokens: int | None = row["seq_len"]
quant: str | None = row["quant"]
room: int = peftplan.fit("gpt2", gpu="t4").to_dict()["plans"][0]["headroom_bytes"]
needed: int | None = peftplan.compare("gpt2", methods="lora").records()[0]["needed_bytes"]
row["needs"]
peftplan.fit("gpt2", gpu="t4").to_dict()["plan"]
peftplan.compare("gpt2", methods="lora").to_dict()["rows"][0]["need"]
""",
        tmp_path,
    )
    lines = [line for line in text.splitlines() if ": error:" in line]
    assert sorted({int(line.split(":")[1]) for line in lines}) == [8, 9, 10], text

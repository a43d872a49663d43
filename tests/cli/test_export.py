"""`peftplan export`: a config on stdout or in a file, notes and one-line errors on stderr."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import run

JOB = ("llama-3.1-8b", "--r", "16")


def test_stdout_is_the_config_and_stderr_the_notes() -> None:
    done = run("export", *JOB, "--method", "qlora", "--to", "axolotl", "--gpu", "rtx-4090")
    assert done.code == 0
    assert done.out.startswith("# llama-3.1-8b, qlora r=16: written by peftplan ")
    assert "\nadapter: qlora\n" in done.out
    changed = (
        "quant_storage bf16 (instead of uint8)",
        "trainer axolotl (instead of transformers)",
        "kbit_prepare off (instead of on)",
    )
    assert done.err == f"note: axolotl's defaults for what you did not set: {', '.join(changed)}\n"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """The same peak, and every key said."""
    file = tmp_path / "lora.yml"
    assert run("export", *JOB, "--to", "llamafactory", "-o", str(file)).code == 0
    direct = run("estimate", *JOB, "--format", "csv").out
    read = run("estimate", "--config", str(file), "--format", "csv", "--strict").out
    assert read == direct


def test_a_file_stays_unless_forced(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text("mine")
    done = run("export", *JOB, "--to", "trl", "--output", str(file))
    assert (done.code, done.out) == (2, "")
    assert "the file exists; accepted: another name, or force (--force)" in done.err
    assert file.read_text() == "mine"
    assert run("export", *JOB, "--to", "trl", "-o", str(file), "--force").code == 0
    assert "use_peft: true" in file.read_text()


def test_translates_a_config(tmp_path: Path) -> None:
    first, second = tmp_path / "axolotl.yml", tmp_path / "trl.yml"
    assert run("export", *JOB, "--seq-len", "1024", "--to", "axolotl", "-o", str(first)).code == 0
    assert run("export", "--config", str(first), "--to", "trl", "-o", str(second)).code == 0
    assert "max_length: 1024\n" in second.read_text()
    assert "lora_r: 16\n" in second.read_text()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((*JOB,), "--to is missing: name a tool; accepted: axolotl, llamafactory, trl, "),
        ((*JOB, "--to", "axolotle"), "--to: 'axolotle' is not valid; did you mean axolotl? accepted: "),
        (("--to", "trl"), "MODEL is missing: name a model, or a --config that names one"),
        ((*JOB, "--to", "trl", "--force"), "--force needs a FILE to replace (--output)"),
        ((*JOB, "--to", "trl", "-o", "/nowhere/at/all.yml"), "/nowhere/at/all.yml"),
        ((*JOB, "--to", "trl", "--loss", "liger"), "--loss"),
        ((*JOB, "--to", "torchtune", "--attn-implementation", "eager"), "--attn-implementation: a config of torchtune"),
        ((str(Path(__file__).parent / "tiny.json"), "--to", "trl"), "MODEL: the repository of "),
        (("bert-base-uncased", "--to", "trl"), "--task-type: trl trains CAUSAL_LM; "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(options: tuple[str, ...], line: str) -> None:
    done = run("export", *options)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("peftplan: ")
    assert line in done.err
    assert done.err.count("\n") == 1

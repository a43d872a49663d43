"""Completion: the scripts, what they are answered, and a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from peftplan.cli import COMMANDS
from peftplan.cli.texts import METAVARS
from peftplan.job.trainer_words import Autocast, Loss, TrainerName
from peftplan.optim.names import OPTIMIZERS
from peftplan.storage.config import FORMATS
from tests.cli.run import run

CASES: list[tuple[str, set[str], set[str]]] = [
    ("es", {"estimate"}, {"serve"}),
    ("estimate llama-2-", {"llama-2-7b", "llama-2-70b"}, {"gpt2"}),
    ("estimate llama-2-7b --met", {"--method"}, set()),
    ("estimate llama-2-7b --method q", {"qlora"}, {"lora"}),
    ("estimate llama-2-7b --method qlora --optim paged", {"paged_adamw_8bit"}, {"adamw_torch"}),
    ("estimate llama-2-7b --gpu t4 --gpu h2", {"h200"}, {"t4"}),
    ("estimate llama-2-7b --trainer t", {"transformers", "trl"}, {"plain"}),
    ("estimate llama-2-7b --load-in-4bit --lora_r 4 --task-type SEQ", {"SEQ_CLS"}, {"CAUSAL_LM"}),
    ("sweep llama-2-7b --method lora --optim paged", {"paged_adamw_8bit"}, {"adamw_torch"}),
    ("sweep qwen3-0", {"qwen3-0.6b"}, {"gpt2"}),
    ("methods do", {"dora"}, {"lora"}),
    ("completion z", {"zsh"}, {"bash"}),
]
"""Words so far, what is offered among others, and what is not."""


def program(folder: Path) -> dict[str, str]:
    """An environment in which `peftplan` is this checkout's."""
    script = folder / "peftplan"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from peftplan.cli import run; run()" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": root}


@pytest.mark.parametrize(("words", "offered", "not_offered"), CASES)
def test_what_click_answers(words: str, offered: set[str], not_offered: set[str], tmp_path: Path) -> None:
    line = ["peftplan", *words.split()]
    environment = {"_PEFTPLAN_COMPLETE": "zsh_complete", "COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(line) - 1)}
    done = subprocess.run(["peftplan"], env=program(tmp_path) | environment, capture_output=True, text=True, check=True)
    answered = set(done.stdout.splitlines()[1::3])
    assert offered <= answered
    assert not_offered.isdisjoint(answered)


def test_a_file_is_left_to_the_shell(tmp_path: Path) -> None:
    for words in ("estimate ./", "estimate gpt2 --peft-config a"):
        line = ["peftplan", *words.split()]
        environment = {"_PEFTPLAN_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(line) - 1)}
        done = subprocess.run(["peftplan"], env=program(tmp_path) | environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("file,")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_in_bash(tmp_path: Path) -> None:
    script = """eval "$(peftplan completion bash)"
    COMP_WORDS=(peftplan estimate llama-2-7b --method ql); COMP_CWORD=4; COMPREPLY=()
    _peftplan_completion peftplan; echo "${COMPREPLY[@]}"; complete -p peftplan"""
    done = subprocess.run(["bash", "-c", script], env=program(tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["qlora", "complete -o nosort -F _peftplan_completion peftplan"]


def test_every_shell_has_a_script() -> None:
    for shell in ("bash", "zsh", "fish"):
        done = run("completion", shell)
        assert done.code == 0
        assert f"_PEFTPLAN_COMPLETE={shell}_complete" in done.out
    assert run("completion", "tcsh").err.startswith("peftplan: SHELL: 'tcsh' is not valid")


def test_choices_are_those_of_the_library() -> None:
    def choices(option: str) -> set[str]:
        return set(METAVARS[option].strip("[]").split("|"))

    assert choices("--trainer") == set(get_args(TrainerName))
    assert choices("--loss") == set(get_args(Loss))
    assert choices("--autocast") == set(get_args(Autocast))
    assert choices("--quant") == {"none", *FORMATS}


def test_every_command_and_optimizer_is_offered(tmp_path: Path) -> None:
    for words, names in ((["peftplan", ""], set(COMMANDS)), (["peftplan", "estimate", "gpt2", "--optim", ""], set(OPTIMIZERS))):
        environment = {
            "_PEFTPLAN_COMPLETE": "zsh_complete",
            "COMP_WORDS": " ".join(words[:-1]) + " ",
            "COMP_CWORD": str(len(words) - 1),
        }
        done = subprocess.run(["peftplan"], env=program(tmp_path) | environment, capture_output=True, text=True, check=True)
        assert names <= set(done.stdout.splitlines()[1::3])

"""The generated matrix: every method of peft on small models of many types, and two methods on every type at its real size.

Both sides must give the same tensors, by name, shape and what trains, and the same two counts, or both must refuse. Two
differences are meant, and have no case: peft ignores a name in `modules_to_save` that no module ends with, where peftplan refuses
what reads like a typing error; and AdaLoRA's `total_step`, which peft asks for and which changes no tensor, may be left out.

LoRA is tried with all of its options on every type; of most other methods' options each type gets a quarter, in turn, so that
each option meets a quarter of the types. `PEFTPLAN_FULL_MATRIX=1` tries them all, 30,000 cases.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

from peftplan import datafiles
from peftplan.arch.readers import READERS
from peftplan.errors import InputError, PeftplanError
from peftplan.methods import METHODS
from tests.methods import matrix
from tests.methods.cases import Options, cases, task_cases
from tests.methods.matrix import MODELS, NOT_BUILT_IN, Case

TYPES = [*MODELS, *NOT_BUILT_IN]
if peft.__version__ != datafiles.load("peft_targets.json")["peft"]:
    pytest.skip("peft's default targets are of another version: run tools/peft_targets.py", allow_module_level=True)

OF_PEFT = [name for name, method in METHODS.items() if method.peft_type is not None]
TURNS = 1 if os.environ.get("PEFTPLAN_FULL_MATRIX") else 4
WHOLE = ("lora", "adalora", "ln-tuning", "prefix-tuning", "prompt-tuning", "p-tuning")
"""Methods whose options are few or cheap, or whose rules are many: never in turns."""


def _cases(model_type: str, method: str) -> list[Case]:
    """The cases of one type and method: of the usual task, and some of every other task that the type has."""
    usual = [Case(model_type, method, options) for options in cases(method, matrix.architecture(model_type))]
    others = [
        Case(model_type, method, options, task)
        for task in matrix.tasks_of(model_type)
        for options in task_cases(method, matrix.architecture(model_type, task))
    ]
    turn = TYPES.index(model_type) % TURNS
    return [*(usual if method in WHOLE else usual[turn::TURNS]), *(others if method == "lora" else others[turn::TURNS])]


@pytest.mark.parametrize("method", OF_PEFT)
@pytest.mark.parametrize("model_type", TYPES)
def test_equal_to_peft(model_type: str, method: str) -> None:
    wrong = [line for case in _cases(model_type, method) if (line := matrix.difference(case)) is not None]
    assert not wrong, "\n".join(wrong)


CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "IMAGE_CLS")


def _head(model: Any, names: Iterable[str]) -> set[str]:
    """Parameters outside the bare model; T5's question answering has no bare model inside."""
    if model.base_model is model:
        return {name for name in names if name.startswith("qa_outputs.")}
    return {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}


@pytest.mark.parametrize("model_type", TYPES)
def test_full_and_bitfit(model_type: str) -> None:
    """The methods that peft does not have: what the real model has, by name, for every task of the type."""
    for task in (None, *matrix.tasks_of(model_type)):
        model, arch = matrix.real(model_type, task), matrix.architecture(model_type, task)
        every = {name: p.numel() for name, p in model.named_parameters()}  # once loaded, all of them train: see test_full.py
        assert matrix.trained(Case(model_type, "full", task=task)) == (every.keys(), sum(every.values()))
        biases = {name for name in every if name.rpartition(".")[2].endswith("bias")}
        if not biases:
            with pytest.raises(InputError, match="no biases"):
                matrix.trained(Case(model_type, "bitfit", task=task))
            continue
        expected = biases | (_head(model, every) if arch.task_type in CLASSIFICATION else set())
        assert matrix.trained(Case(model_type, "bitfit", task=task)) == (expected, sum(every[n] for n in expected)), (
            arch.model_class
        )


def test_how_many_cases() -> None:
    """The matrix is not empty where one looks: every type with an adapter, every method, and more than ten thousand cases."""
    assert set(TYPES) > set(READERS)
    counts = {method: sum(len(_cases(model_type, method)) for model_type in TYPES) for method in OF_PEFT}
    assert sum(counts.values()) >= 10_000, counts
    assert min(counts.values()) >= 250, counts


def test_a_wrong_count_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself can fail: with another rank on our side it names the case and both numbers."""
    real = matrix._ours
    monkeypatch.setattr(matrix, "_ours", lambda arch, case: real(arch, Case(case.model_type, case.method, {"r": 9})))
    told = matrix.difference(Case("llama", "lora", {"target_modules": "all-linear", "r": 8}))
    # 3 layers, heads of 24: q 96 → 144, k and v 96 → 48, o 144 → 96, gate and up 96 → 172, down 172 → 96
    per_rank = 3 * ((96 + 144) + 2 * (96 + 48) + (144 + 96) + 3 * (96 + 172))
    assert told is not None
    assert told.startswith("llama lora(target_modules='all-linear', r=8): peftplan ")
    assert f"peftplan {9 * per_rank} of" in told
    assert f"peft {8 * per_rank} of" in told


OTHERS: tuple[tuple[str, Options], ...] = (
    ("dora", {"target_modules": "all-linear", "r": 16}),
    ("loha", {"target_modules": "all-linear"}),
    ("vera", {"target_modules": "all-linear"}),
    ("ia3", {"target_modules": "all-linear", "feedforward_modules": []}),
    ("lokr", {"target_modules": "all-linear", "r": 4}),
    ("fourierft", {"target_modules": "all-linear", "n_frequency": 100}),
    ("prompt-tuning", {"num_virtual_tokens": 20}),
)


@pytest.mark.parametrize("model_type", list(MODELS))
def test_at_real_size(model_type: str) -> None:
    """LoRA on all linear layers with r 16, and one other method in turn, on the built-in model itself."""
    for method, options in (("lora", {"target_modules": "all-linear", "r": 16}), OTHERS[TYPES.index(model_type) % len(OTHERS)]):
        case = Case(model_type, method, options)
        ours, pefts = matrix.counts_at_real_size(case)
        told = f"{MODELS[model_type]}, {case}: peftplan {ours!r}, peft {pefts!r}"
        if isinstance(pefts, Exception):
            assert isinstance(ours, PeftplanError), told
        else:
            assert ours == pefts, told

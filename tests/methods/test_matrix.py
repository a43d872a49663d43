"""The generated matrix: every method of peft on small models of many types, and two methods on every type at its real widths.

Both sides must give the same tensors, by name, shape and what trains, and the same two counts, or both must refuse. Two
differences are meant, and have no case: peft ignores a name in `modules_to_save` that no module ends with, where peftplan refuses
what reads like a typing error; and AdaLoRA's `total_step`, which peft asks for and which changes no tensor, may be left out.

Of 39,000 combinations about 4,000 run: every method meets every type with its plainest options, any two of task, method and
options meet in some case, and type and options do where a method is drawn for the type, as one in five is; each combination of
options runs on one type at least. `pytest --full-matrix` runs them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any
from zlib import crc32

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
from tests.methods.cases import Names, Options, cases, task_cases
from tests.methods.matrix import MODELS, NOT_BUILT_IN, Case
from tests.pairwise import covering

TYPES = [*MODELS, *NOT_BUILT_IN]
if peft.__version__ != datafiles.load("peft_targets.json", dict)["peft"]:
    pytest.skip("peft's default targets are of another version: run tools/peft_targets.py", allow_module_level=True)

SHARE = 96
ONE_IN = 5
"""Of the methods of a type so many are drawn, whose options all meet it."""
OF_PEFT = [name for name, method in METHODS.items() if method.peft_type is not None]


@cache
def _matrix() -> dict[tuple[str, str], list[Case]]:
    """All cases of each type and method: of the usual task, and some of every other task that the type has."""
    return {
        (model_type, method): [
            *(Case(model_type, method, options) for options in cases(method, matrix.architecture(model_type))),
            *(
                Case(model_type, method, options, task)
                for task in matrix.tasks_of(model_type)
                for options in task_cases(method, matrix.architecture(model_type, task))
            ),
        ]
        for model_type in TYPES
        for method in OF_PEFT
    }


def _factors(case: Case) -> dict[str, Hashable]:
    """What a case varies: method, task, each option, and the type where the method is drawn for it."""
    names = _names(case.model_type, case.task)
    options = {option: names.without_names(value) for option, value in case.options.items()}
    is_drawn = crc32(f"{case.model_type} {case.method}".encode()) % ONE_IN == 0
    return {**({"type": case.model_type} if is_drawn else {}), "method": case.method, "task": case.task, **options}


@cache
def _names(model_type: str, task: str | None) -> Names:
    return Names(matrix.architecture(model_type, task))


@cache
def _pairwise() -> dict[tuple[str, str], list[Case]]:
    """Of each type and method the plain case, which comes first, those in which every two values meet, and a share in turn.

    Both sides may refuse the case in which two values meet, so each combination of options also runs on one of `SHARE` types.
    """
    chosen = set(map(id, covering([case for part in _matrix().values() for case in part], _factors)))
    return {
        (model_type, method): [
            case
            for number, case in enumerate(part)
            if number == 0 or id(case) in chosen or (number + TYPES.index(model_type)) % SHARE == 0
        ]
        for (model_type, method), part in _matrix().items()
    }


@pytest.mark.parametrize("method", OF_PEFT)
@pytest.mark.parametrize("model_type", TYPES)
def test_equal_to_peft(model_type: str, method: str, pytestconfig: pytest.Config) -> None:
    cells = _matrix() if pytestconfig.option.full_matrix else _pairwise()
    wrong = [line for case in cells[model_type, method] if (line := matrix.difference(case)) is not None]
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
    """The matrix is not empty where one looks: every type with an adapter, and every method."""
    assert set(TYPES) > set(READERS)
    every, some = ([case for cell in part.values() for case in cell] for part in (_matrix(), _pairwise()))
    assert len(every) >= 30_000
    assert len(some) >= 4_000
    assert min(Counter(case.method for case in every).values()) >= 350
    assert min(Counter(case.method for case in some).values()) >= len(TYPES)


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
    """LoRA on all linear layers with r 16, and one other method in turn, at the built-in model's own widths."""
    for method, options in (("lora", {"target_modules": "all-linear", "r": 16}), OTHERS[TYPES.index(model_type) % len(OTHERS)]):
        case = Case(model_type, method, options)
        ours, pefts = matrix.counts_at_real_size(case)
        told = f"{MODELS[model_type]}, {case}: peftplan {ours!r}, peft {pefts!r}"
        if isinstance(pefts, Exception):
            assert isinstance(ours, PeftplanError), told
        else:
            assert ours == pefts, told

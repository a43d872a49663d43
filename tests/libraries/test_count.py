"""Counting with peft: its published benchmark, our formulas, and the stand-ins against peft on a real model."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import torch

from peftplan.datafiles import DATA, load
from peftplan.errors import MissingExtraError, RefusedError, UnknownNameError
from peftplan.libraries.count import count_with_peft
from peftplan.libraries.stand_ins import STAND_INS
from tests.methods import tiny, witness


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "published" / name).read_text().splitlines()]


def llama() -> dict[str, Any]:
    return dict(load("models/llama-3.2-3b.json", dict)["config"])


BASE = 3_212_749_824
"""Parameters of Llama-3.2-3B."""


@pytest.mark.parametrize("row", [r for r in rows("peft_metamath.jsonl") if r["adapter_config"]], ids=lambda r: r["experiment"])
def test_published_counts(row: dict[str, Any]) -> None:
    raw = row["adapter_config"] | ({"freeze_a": True} if "lorafa" in row["experiment"] else {})
    adaptation = count_with_peft(llama(), raw, task_type=None)
    assert (adaptation.num_trainable, BASE + adaptation.num_added) == (row["num_trainable_params"], row["num_total_params"])


@pytest.mark.parametrize("row", rows("peft_metamath_unscored.jsonl"), ids=lambda r: r["experiment"])
def test_unscored_configurations_count_too(row: dict[str, Any]) -> None:
    assert 0 < count_with_peft(llama(), row["adapter_config"], task_type="CAUSAL_LM").num_trainable < BASE


FOR_STAND_INS: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 6, "num_subspaces": 4, "subspace_rank": 1, "target_modules": ["q_proj", "v_proj"]},
    "BOFT": {"target_modules": ["q_proj", "down_proj"]},
    "LORA": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "FROD": {"sparse_rate": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "UNILORA": {"r": 4, "theta_d_length": 32, "target_modules": ["q_proj", "v_proj"]},
    "SHIRA": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("peft_type", list(FOR_STAND_INS))
def test_stand_ins_change_no_tensor(peft_type: str) -> None:
    """The same names, shapes and flags as peft gives on a model with weights."""
    if peft_type == "ADAMSS":
        pytest.importorskip("sklearn")
    raw = {"peft_type": peft_type, "task_type": "CAUSAL_LM", **FOR_STAND_INS[peft_type]}
    adaptation = count_with_peft(tiny.config_of("llama"), raw, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    base = tiny.real("llama", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = witness.peft_model(base, peft.PeftConfig.from_peft_type(**raw), device="cpu")
    assert adaptation.num_trainable == adapted.get_nb_trainable_parameters()[0]
    if peft_type == "ADAMSS":  # the clusters' sizes are those of the weights, their sum is not
        real = witness.split(base, adapted)[0]
        assert {n for t in adaptation.added for n in t.names()} == set(real)
    else:
        witness.assert_same(tiny.architecture("llama"), adaptation, base, adapted)


def test_every_stand_in_is_tested() -> None:
    assert STAND_INS.keys() <= FOR_STAND_INS.keys()


@pytest.mark.parametrize(
    ("model", "task", "method", "options"),
    [
        ("llama", None, "lora", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.1.mlp.up_proj": 2}}),
        ("qwen2", None, "dora", {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["embed_tokens"]}),
        ("bert", "SEQ_CLS", "vera", {}),
        ("t5", None, "prompt-tuning", {"num_virtual_tokens": 5}),
        ("gpt2", None, "ln-tuning", {"target_modules": ["ln_f"]}),
    ],
)
def test_equal_to_the_formulas(model: str, task: str | None, method: str, options: dict[str, Any]) -> None:
    ours = tiny.ours(model, method, task, **options)
    entry = tiny.METHODS[method]
    raw = {"peft_type": entry.peft_type, **entry.defaults, **options}
    arch = tiny.architecture(model, task)
    by_peft = count_with_peft(tiny.config_of(model), raw, task_type=arch.task_type)

    def key(tensor: Any) -> tuple[Any, ...]:
        return (tensor.name, tensor.shape, tensor.layers or (), tensor.trainable, tensor.dtype, tensor.in_embedding)

    assert sorted(map(key, by_peft.added)) == sorted(map(key, ours.added))
    assert sorted(map(str, by_peft.trained)) == sorted(map(str, ours.trained))


def test_a_config_object_is_left_as_it_was() -> None:
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    count_with_peft(tiny.config_of("llama"), config, task_type="CAUSAL_LM")
    assert config.target_modules == "all-linear"


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"peftplan\[trace\]"):
        count_with_peft(tiny.config_of("llama"), {"peft_type": "LORA"}, task_type=None)


def test_errors() -> None:
    with pytest.raises(UnknownNameError, match="peft_type"):
        count_with_peft(tiny.config_of("llama"), {"peft_type": "FOO"}, task_type=None)
    with pytest.raises(RefusedError, match="refuses it: NoMatchingPeftModuleError"):
        count_with_peft(tiny.config_of("llama"), {"peft_type": "LORA", "target_modules": ["nope"]}, task_type=None)
    with pytest.raises(RefusedError, match="how it clusters the weights"):
        count_with_peft(tiny.config_of("llama"), {"peft_type": "ADAMSS", "subspace_rank": 2}, task_type=None)

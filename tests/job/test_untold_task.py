"""An adapter config on a classification model, with its task and without: peft itself counts on meta tensors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
import transformers

import peftplan
from peftplan.errors import RefusedError
from peftplan.methods import METHODS

BERT = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 48, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "num_labels": 3,
    "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "hidden_size": 48, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "num_labels": 3,
    "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {"bert": (BERT, "query"), "llama": (LLAMA, "q_proj")}

VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
WITH_FORMULAS = sorted({m.peft_type for m in METHODS.values() if m.peft_type} - {*VIRTUAL})
COUNTED_BY_PEFT = ["C3A", "DELORA", "GRALORA", "HRA", "MISS", "RANDLORA", "ROAD"]
FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 12},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["LayerNorm", "norm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 12, "r": 0},
    "ROAD": {"group_size": 8},
}


def adapter(peft_type: str, target: str, **fields: Any) -> dict[str, Any]:
    every = {"peft_type": peft_type, "target_modules": [target], **FIELDS.get(peft_type, {}), **fields}
    return {name: value for name, value in every.items() if value is not None}


def by_peft(model: str, raw: dict[str, Any]) -> tuple[int, int]:
    config = MODELS[model][0]
    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    hf_config = transformers.AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = getattr(transformers, config["architectures"][0])(hf_config)
        counts: tuple[int, int] = peft.get_peft_model(base, peft.PeftConfig.from_peft_type(**raw)).get_nb_trainable_parameters()
    return counts


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@pytest.mark.parametrize("peft_type", [*WITH_FORMULAS, *COUNTED_BY_PEFT])
@pytest.mark.parametrize("model", MODELS)
def test_the_head_trains_where_the_adapter_config_states_the_task(model: str, peft_type: str, task: str | None) -> None:
    config, target = MODELS[model]
    raw = adapter(peft_type, target, task_type=task)
    estimate = peftplan.estimate(config, peft_config=raw)
    counts = estimate.trainable_parameters, estimate.total_parameters
    if peft_type in (
        "ADALORA",
        "BOFT",
        "LOHA",
        "LOKR",
        "VBLORA",
    ):  # peft needs values, which meta has not
        told = peftplan.estimate(config, peft_config=adapter(peft_type, target, task_type="SEQ_CLS"))
        head = 3 * 48 + 3 * (model == "bert")
        assert told.trainable_parameters - counts[0] == (0 if task else head)
    else:
        assert counts == by_peft(model, raw)
    notes = str(estimate.assumptions.get("notes", ""))
    assert ("peft does not train the head" in notes) is (task is None)


def test_all_linear_takes_the_head_of_a_task_that_is_not_stated() -> None:
    """`_maybe_include_all_linear_layers` leaves out the classifier of SEQ_CLS alone."""
    for task in (None, "SEQ_CLS"):
        raw = adapter("LORA", "", target_modules="all-linear", task_type=task)
        estimate = peftplan.estimate(BERT, peft_config=raw)
        assert (estimate.trainable_parameters, estimate.total_parameters) == by_peft("bert", raw)


@pytest.mark.parametrize("peft_type", VIRTUAL)
def test_virtual_tokens_need_the_task(peft_type: str) -> None:
    raw = {"peft_type": peft_type, "num_virtual_tokens": 4}
    with pytest.raises(KeyError, match="None"):
        by_peft("llama", raw)
    with pytest.raises(RefusedError, match=r"task_type: the adapter config states none.*accepted: SEQ_CLS"):
        peftplan.estimate(LLAMA, peft_config=raw)


def test_a_named_method_trains_the_head() -> None:
    """The task is the model's where no adapter config says otherwise."""
    named = peftplan.estimate(BERT, method="lora", target_modules=("query",))
    stated = by_peft("bert", adapter("LORA", "query", task_type="SEQ_CLS"))
    assert (named.trainable_parameters, named.total_parameters) == stated
    other = peftplan.estimate(BERT, method="miss", target_modules=("query",), r=4)
    assert (other.trainable_parameters, other.total_parameters) == by_peft("bert", adapter("MISS", "query", task_type="SEQ_CLS"))


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_files_and_config_objects_count_alike(tmp_path: Path, task: str | None) -> None:
    raw = adapter("LORA", "query", task_type=task)
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    expected = by_peft("bert", raw)[0]
    for source in (raw, tmp_path, peft.PeftConfig.from_peft_type(**raw)):
        assert peftplan.estimate(BERT, peft_config=source).trainable_parameters == expected


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_the_trace_counts_the_same(task: str | None) -> None:
    raw = adapter("LORA", "query", task_type=task)
    ours, theirs = (peftplan.estimate(BERT, peft_config=raw, seq_len=16, engine=engine) for engine in ("analytic", "trace"))
    assert ours.trainable_parameters == theirs.trainable_parameters == by_peft("bert", raw)[0]
    assert ours.peaks.by_phase == pytest.approx(theirs.peaks.by_phase, rel=0.01)

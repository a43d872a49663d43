"""A loaded model as the model of a job: counts are its own, sizes those of the same job by its config."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peftplan
from tests.cli.run import run

pytest.importorskip("peft")
torch = pytest.importorskip("torch")

CONFIG = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 1000, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
JOB = {"seq_len": 128, "trainer": "plain"}


def model(*, dtype: Any = torch.bfloat16, kind: str = "AutoModelForCausalLM", layers: int = 4) -> Any:
    """A Qwen3 on the meta device."""
    import transformers

    config = transformers.AutoConfig.for_model("qwen3", **{**CONFIG, "num_hidden_layers": layers})
    with torch.device("meta"):
        return getattr(transformers, kind).from_config(config, dtype=dtype)


def wrapped(base: Any, **fields: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}))


def own_count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_a_model_without_adapter_trains_in_full() -> None:
    loaded = model(dtype=torch.float32)
    result = peftplan.estimate(loaded, **JOB)
    assert (result.method["name"], result.trainable_parameters) == ("full", own_count(loaded))
    assert (result.assumptions["dtype"], result.assumptions["model"]) == ("fp32", "a loaded Qwen3ForCausalLM")
    assert result.warnings == ()


def test_a_method_takes_a_loaded_model_as_its_base() -> None:
    by_config = peftplan.estimate({"model_type": "qwen3", **CONFIG}, r=4, **JOB)
    assert peftplan.estimate(model(), method="lora", r=4, **JOB).peaks == by_config.peaks


def test_peft_s_wrapper_brings_its_config() -> None:
    adapted = wrapped(model(), r=4)
    result = peftplan.estimate(adapted, **JOB)
    assert (result.trainable_parameters, result.total_parameters) == adapted.get_nb_trainable_parameters()
    assert result.assumptions["adapter_dtype"] == "fp32"
    assert result.warnings == ()
    assert result.peaks == peftplan.estimate({"model_type": "qwen3", **CONFIG}, r=4, **JOB).peaks


def test_an_adapter_in_16_bits_is_read_from_its_tensors() -> None:
    adapted = wrapped(model())
    for parameter in adapted.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert peftplan.estimate(adapted, **JOB).assumptions["adapter_dtype"] == "bf16"


def test_other_methods_are_compared_on_the_base_of_an_adapted_model() -> None:
    (lora, full) = peftplan.compare(wrapped(model()), methods=("lora", "full")).rows
    assert (lora.error, full.error) == (None, None)


FROZEN: dict[str, Callable[[str], bool]] = {
    "last layers": lambda name: "layers.2." in name or "layers.3." in name,
    "first layers": lambda name: "layers.0." in name,
    "head": lambda name: "lm_head" in name,
    "norms": lambda name: "norm" in name,
}


@pytest.mark.parametrize("kept", FROZEN)
def test_what_requires_gradients_trains(kept: str) -> None:
    loaded = model()
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_(FROZEN[kept](name))
    by_formula, traced = (peftplan.estimate(loaded, engine=engine, **JOB) for engine in ("analytic", "trace"))
    assert by_formula.trainable_parameters == own_count(loaded)
    for phase, size in traced.peaks.by_phase.items():
        assert abs(by_formula.peaks.by_phase[phase] - size) <= 0.01 * size, phase


@pytest.mark.parametrize("layers", [range(6), range(5, 12), range(11, 12)], ids=str)
def test_of_many_layers_those_that_train_are_traced(layers: range) -> None:
    """Fewer layers do not say which of twelve train, so the trace runs them all."""
    loaded = model(layers=12)
    for name, parameter in loaded.named_parameters():
        number = re.search(r"layers\.(\d+)\.", name)
        parameter.requires_grad_(number is not None and int(number[1]) in layers)
    by_formula, traced = (peftplan.estimate(loaded, engine=engine, **JOB) for engine in ("analytic", "trace"))
    assert traced.trainable_parameters == own_count(loaded)
    for phase, size in traced.peaks.by_phase.items():
        assert by_formula.peaks.by_phase[phase] == pytest.approx(size, rel=0.002), phase


def test_a_difference_between_model_and_adapter_is_a_warning() -> None:
    adapted = wrapped(model())
    adapted.base_model.model.lm_head.weight.requires_grad_(True)
    (warning,) = peftplan.estimate(adapted, **JOB).warnings
    assert f"{own_count(adapted):,} trainable parameters" in warning


def test_a_head_of_a_task_is_read_from_the_class() -> None:
    assert peftplan.estimate(model(kind="AutoModelForSequenceClassification"), **JOB).model["model_class"] == (
        "Qwen3ForSequenceClassification"
    )


def test_checkpointing_that_is_on_counts() -> None:
    loaded = model()
    loaded.gradient_checkpointing_enable()
    assert peftplan.estimate(loaded, **JOB).assumptions["gradient_checkpointing"] is True


def frozen() -> Any:
    return model().requires_grad_(False)


def with_two_adapters() -> Any:
    from peft import LoraConfig

    adapted = wrapped(model())
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    return adapted


@pytest.mark.parametrize(
    ("unusable", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "model: <Linear object> is not valid; accepted: a built-in name"),
        (lambda: object(), "model: <object object> is not valid; accepted: a built-in name"),
        (frozen, "no parameter of it requires gradients"),
        (with_two_adapters, "accepted: one adapter on a loaded model"),
    ],
)
def test_an_unknown_object_is_one_line(unusable: Callable[[], Any], message: str) -> None:
    with pytest.raises(peftplan.InputError, match=message) as raised:
        peftplan.estimate(unusable(), **JOB)
    assert "\n" not in str(raised.value)


def test_modules_of_a_loaded_model_are_inspected() -> None:
    assert peftplan.inspect(wrapped(model())).architecture.num_parameters == own_count(model())


def test_a_sweep_takes_a_config_or_a_module_as_one_model() -> None:
    """Both can be iterated: a config over its fields, a Sequential over its layers."""
    pytest.importorskip("numpy")
    for one in (model().config, model()):
        rows = peftplan.sweep(one, seq_len=[64, 128], trainer="plain", r=4).records()
        assert [row["error"] for row in rows] == [None, None]
        assert [row["seq_len"] for row in rows] == [64, 128]
    with pytest.raises(peftplan.InputError, match="model: <Sequential object> is not valid"):
        peftplan.sweep(torch.nn.Sequential(torch.nn.Linear(2, 2)), seq_len=[64, 128]).records()


@pytest.mark.parametrize("ask", [peftplan.estimate, peftplan.inspect, peftplan.serving, peftplan.sweep])
def test_an_unknown_object_is_one_line_of_every_question(ask: Callable[..., Any]) -> None:
    with pytest.raises(peftplan.InputError, match="model: <object object> is not valid; accepted: a built-in name"):
        list(ask(object()).records())


def test_an_adapter_config_names_its_base(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    fields = {"peft_type": "LORA", "base_model_name_or_path": "gpt2", "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    file.write_text(json.dumps(fields))
    assert "gpt2" in run("estimate", "--peft-config", str(file)).out
    assert peftplan.serving(peft_config=file).model["name"] == "gpt2"
    file.write_text('{"peft_type": "LORA"}')
    done = run("estimate", "--peft-config", str(file))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "base_model_name_or_path" in done.err
    assert "MODEL" in run("estimate").err

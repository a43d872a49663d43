"""Whatever a config or an option says, `estimate` answers or refuses in one line, and in bounded time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any, get_args

import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

import peftplan
from peftplan.arch import catalogue
from peftplan.arch.heads import TASK_TYPES
from peftplan.arch.readers import READERS
from peftplan.job.setup import Setup
from peftplan.job.trainers import TRAINERS
from peftplan.methods import METHODS, config_class
from peftplan.optim.names import OPTIMIZERS, REFUSED
from peftplan.storage import FORMATS

MOST_SECONDS = 5.0
"""An estimate takes milliseconds; 4,096 layers of a mixture of experts (the most that a config may state) take under a second."""
LONGEST_MESSAGE = 1000
LOOSE = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def smallest(model_type: str) -> dict[str, Any]:
    """The config of the smallest built-in model of a type."""
    entries = [entry for entry in catalogue.models() if entry.model_type == model_type]
    return dict(min(entries, key=lambda entry: entry.num_parameters).facts()["config"])


@pytest.fixture(autouse=True, scope="module")
def base_install() -> Iterator[None]:
    """Without torch, as `pip install peftplan` leaves it: what only the trace extra can count ends in MissingExtraError."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        yield


MODELS = ["gpt2", "llama-2-7b", "mixtral-8x7b", "t5-small", "bert-base-uncased"]
BUILT_IN = {entry.model_type for entry in catalogue.models()}
CONFIGS = {model_type: smallest(model_type) for model_type in sorted(READERS) if model_type in BUILT_IN}
KEPT = ("model_type",)  # another type is another reader; tests/job/test_sources.py has the unknown ones

ODD_NUMBERS = [2**12, 2**24, 2**31, 2**63, 10**30, -(10**30), 1e308, -0.5]
ODD_TEXTS = ["", "all-linear", "gelu", "(", "*", "a,b", "\x00", "1", "none", "{}", "{0}"]
NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from(ODD_NUMBERS), st.floats())
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(ODD_TEXTS))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6)


@st.composite
def damaged_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A real config with some fields dropped, some replaced by any JSON value, some moved to another field."""
    config = dict(CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))])
    fields = st.sampled_from(sorted(set(config) - set(KEPT)))
    for _ in range(draw(st.integers(1, 4))):
        field = draw(fields)
        change = draw(st.sampled_from(["drop", "replace", "replace", "copy"]))
        if change == "drop":
            config.pop(field, None)
        elif change == "copy" and (other := draw(fields)) in config:
            config[field] = config[other]
        else:
            config[field] = draw(VALUES)
    return config


TARGETS = ["all-linear", "attention", "mlp", "peft-default", "q_proj,v_proj", "c_attn", ".*1.*", "model", "lm_head", "wte", "q,v"]
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "optim": st.sampled_from([*OPTIMIZERS, *REFUSED]),
    "quant": st.sampled_from([*FORMATS, "none"]),
    "trainer": st.sampled_from(sorted(TRAINERS)),
    "target_modules": st.sampled_from(TARGETS),
    "task_type": st.sampled_from(sorted(TASK_TYPES)),
    "bias": st.sampled_from(["all", "none", "lora_only"]),
    "modules_to_save": st.sampled_from(["lm_head", "wte", "q_proj", "shared", "1", "layers"]),
}
"""Values that some option accepts, so that a combination gets past the first check."""


def literals(annotation: Any) -> list[str]:
    """The texts of a `Literal`, also inside an optional one."""
    return [text for part in get_args(annotation) for text in ([part] if isinstance(part, str) else literals(part))]


def fitting(field: FieldInfo, name: str) -> st.SearchStrategy[Any]:
    """Values of the type that a field asks for, or those known to be accepted."""
    wanted = str(field.annotation)
    if name in FITTING:
        return FITTING[name]
    if texts := literals(field.annotation):
        return st.sampled_from(texts)
    if "bool" in wanted or "int" in wanted:
        return st.booleans() if "bool" in wanted else st.integers(1, 64)
    return st.floats(0, 1) if "float" in wanted else st.sampled_from(["bf16", "k_proj"])


def working(method: str) -> dict[str, Any]:
    """What a method needs at least to work on most models."""
    needs = {"target_modules": "all-linear", "num_virtual_tokens": 4}
    return {name: value for name, value in needs.items() if name in config_class(METHODS[method]).model_fields}


@st.composite
def options(draw: st.DrawFn, method: str) -> dict[str, Any]:
    """Some options of the setup and of the method, most with a value that fits."""
    fields = {**Setup.model_fields, **config_class(METHODS[method]).model_fields}
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True))
    odd = draw(st.sampled_from([None, None, *chosen]))
    return working(method) | {name: draw(VALUES if name == odd else fitting(fields[name], name)) for name in chosen}


def faults(model: Any, **options: Any) -> list[str]:
    """What is wrong with one answer, or with our error; an error that is not ours raises."""
    started = time.perf_counter()
    try:
        result = peftplan.estimate(model, **options)
    except peftplan.PeftplanError as error:
        seconds, message = time.perf_counter() - started, str(error)
        wrong = {
            "no message": not message,
            "a message of several lines": "\n" in message,
            "a long message": len(message) >= LONGEST_MESSAGE,
        }
    else:
        seconds = time.perf_counter() - started
        json.dumps(result.to_dict())
        wrong = {
            "trainable parameters": not 0 <= result.trainable_parameters <= result.total_parameters,
            "persistent bytes": result.persistent_bytes <= 0,
        }
    wrong[f"{seconds:.1f} s"] = seconds >= MOST_SECONDS
    return [name for name, is_wrong in wrong.items() if is_wrong]


@LOOSE
@given(config=damaged_configs(), method=st.sampled_from(sorted(METHODS)))
def test_damaged_configs(config: dict[str, Any], method: str) -> None:
    assert faults(config, method=method, **working(method)) == []


@LOOSE
@given(data=st.data(), method=st.sampled_from(sorted(METHODS)), model=st.sampled_from(MODELS))
def test_any_option(data: st.DataObject, method: str, model: str) -> None:
    assert faults(model, method=method, **data.draw(options(method))) == []


@LOOSE
@given(data=st.data(), method=st.sampled_from([name for name in METHODS if METHODS[name].peft_type]))
def test_any_adapter_config(data: st.DataObject, method: str) -> None:
    known = {name: value for name, value in data.draw(options(method)).items() if name not in Setup.model_fields}
    assert faults("gpt2", peft_config={"peft_type": METHODS[method].peft_type, **known}) == []


@LOOSE
@given(value=VALUES)
@pytest.mark.parametrize("argument", ["model", "method", "peft_config", "quantization_config", "training_args", "gpu", "engine"])
def test_any_argument(argument: str, value: Any) -> None:
    assert faults(**{"model": "gpt2", argument: value}) == []

"""The registry: names, options, peft's adapter configs, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from peftplan.datafiles import DATA
from peftplan.errors import InputError, UnknownNameError
from peftplan.job.sources import load
from peftplan.methods import METHODS, adapt, config_class, configure, from_peft_config, method_named
from peftplan.methods.adaptation import NeedsPeftError

ROWS = [json.loads(line) for line in (DATA / "published" / "peft_metamath.jsonl").read_text().splitlines()]
OURS = {m.peft_type for m in METHODS.values()}


def test_importing_it_loads_no_method() -> None:
    code = "import sys, peftplan.methods; print([m for m in sys.modules if m.startswith(('pydantic', 'peftplan.methods.'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", list(METHODS))
def test_every_entry_resolves(name: str) -> None:
    method = METHODS[name]
    cls = config_class(method)
    assert method.defaults.keys() <= cls.model_fields.keys()
    assert not cls.no_effect & cls.model_fields.keys()
    options = {"num_virtual_tokens": 4} if "num_virtual_tokens" in cls.model_fields else {}
    if name == "bitfit":
        assert adapt(load("gpt2"), *configure(name, options)).num_trainable > 0
    else:
        assert adapt(load("llama-2-7b"), *configure(name, options)).num_trainable > 0


@pytest.mark.parametrize("name", ["LoRA", "lora_fa", "P_TUNING", " ia3 ", "Prefix-Tuning"])
def test_spellings(name: str) -> None:
    assert method_named(name).name == name.strip().lower().replace("_", "-")


@pytest.mark.parametrize("name", [m for m in METHODS if METHODS[m].peft_type])
def test_fields_are_pefts(name: str) -> None:
    """Our fields and those without effect are fields of peft's class, and equal defaults."""
    peft = pytest.importorskip("peft")
    cls = config_class(METHODS[name])
    pefts = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(METHODS[name].peft_type)].__dataclass_fields__
    additions = (
        {"freeze_a", "freeze_adapter"}
        | ({"exclude_modules"} if name == "vera" else set())
        | ({"encoder_hidden_size"} if "prompt" in name else set())
    )
    assert (set(cls.model_fields) | cls.no_effect) - pefts.keys() <= additions
    for field, info in cls.model_fields.items():
        if field in pefts and not info.is_required() and field != "lora_alpha":
            default = pefts[field].default_factory() if callable(pefts[field].default_factory) else pefts[field].default
            assert info.get_default(call_default_factory=True) == getattr(default, "value", default), field


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("lorra", {}, UnknownNameError, "did you mean lora"),
        ("lora", {"rank_patern": {}}, UnknownNameError, "did you mean rank_pattern"),
        ("lora", {"r": 0}, InputError, "r must be at least 1 (got 0)"),
        ("lora", {"bias": "some"}, InputError, "bias: 'some' is not valid; accepted: all, lora_only, none"),
        ("prefix-tuning", {}, InputError, "num_virtual_tokens is missing: peft has no default for it"),
        ("loha", {"rank_pattern": {"(": 1}}, InputError, "not a regular expression"),
        ("full", {"r": 8}, UnknownNameError, "r is not an option of full"),
    ],
)
def test_one_line_errors(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        configure(name, options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_without_effect_are_taken() -> None:
    assert configure("lora", {"fan_in_fan_out": True})[1] == configure("lora", {})[1]


@pytest.mark.parametrize("row", [r for r in ROWS if r["peft_type"] in OURS], ids=lambda r: r["experiment"])
def test_published_counts(row: dict[str, Any]) -> None:
    """peft's benchmark on Llama-3.2-3B: trainable and total parameters as it recorded them."""
    raw = row["adapter_config"] | ({"freeze_a": True} if "lorafa" in row["experiment"] else {})
    arch = load("meta-llama/Llama-3.2-3B")
    adaptation = adapt(arch, *from_peft_config(raw))
    assert (adaptation.num_trainable, arch.num_parameters + adaptation.num_added) == (
        row["num_trainable_params"],
        row["num_total_params"],
    )


def test_published_full_fine_tuning() -> None:
    row = next(r for r in ROWS if r["peft_type"] == "FULL_FINETUNING")
    assert adapt(load("meta-llama/Llama-3.2-3B"), *configure("full", {})).num_trainable == row["num_trainable_params"]


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r["peft_type"] not in OURS | {"FULL_FINETUNING"}], ids=lambda r: r["experiment"]
)
def test_other_peft_types_are_named(row: dict[str, Any]) -> None:
    with pytest.raises(NeedsPeftError, match=row["peft_type"]):
        from_peft_config(row["adapter_config"])


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"peft_type": "LORA"}, "lora"),
        ({"peft_type": "LORA", "use_dora": True}, "dora"),
        ({"peft_type": "LORA", "use_rslora": True}, "rslora"),
        ({"peft_type": "VERA", "inference_mode": False, "save_projection": False, "unheard_of": None}, "vera"),
    ],
)
def test_names_from_peft_configs(raw: dict[str, Any], name: str) -> None:
    method, config = from_peft_config(raw)
    assert method.name == name
    assert getattr(config, "target_modules") == "peft-default"  # noqa: B009 not every config has targets


def test_unknown_features_are_left_to_peft() -> None:
    with pytest.raises(NeedsPeftError, match="LORA with layer_replication, use_qalora"):
        from_peft_config({"peft_type": "LORA", "use_qalora": True, "layer_replication": [[0, 2]], "arrow_config": None})
    with pytest.raises(InputError, match="peft_type"):
        from_peft_config({"r": 8})

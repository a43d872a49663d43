"""data/peft_targets.json against the installed peft: its constants, and what its tuner classes and IA3 really use."""

from __future__ import annotations

import re

import pytest

from peftplan.datafiles import load

peft = pytest.importorskip("peft")
DATA = load("peft_targets.json", dict)

if peft.__version__ != DATA["peft"]:
    pytest.skip(f"the file is of peft {DATA['peft']}: run tools/peft_targets.py", allow_module_level=True)

OWN_DEFAULTS = {"SHADOW"}
"""Finds its targets in the model (tuners/shadow/model.py), so its mapping is an empty placeholder."""


def test_every_constant_is_in_the_file() -> None:
    from peft.utils import constants

    pattern = re.compile(r"TRANSFORMERS_MODELS_TO_(\w+)_TARGET_MODULES_MAPPING")
    names = {m[1]: m[0] for m in map(pattern.fullmatch, vars(constants)) if m}
    assert {key.replace("_", ""): value for key, value in DATA["target_modules"].items()} == {
        method: getattr(constants, name) for method, name in names.items()
    }
    assert DATA["feedforward_modules"] == {"IA3": constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING}


def test_keys_are_peft_types_and_values_what_the_tuner_classes_use() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    used = {
        peft_type.value: mapping
        for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if (mapping := getattr(tuner, "target_module_mapping", None)) is not None
    }
    for own in OWN_DEFAULTS:
        assert used.pop(own) == {}
    ia3 = DATA["target_modules"]["IA3"]  # IA3's class looks the constant up inside a method
    assert {**used, "IA3": ia3} == DATA["target_modules"]


def test_peft_adapts_the_listed_modules_of_a_real_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32
    )
    for config_class, key in ((peft.LoraConfig, "LORA"), (peft.IA3Config, "IA3"), (peft.LNTuningConfig, "LN_TUNING")):
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), config_class(task_type="CAUSAL_LM"))
        chosen = model.peft_config["default"]
        assert chosen.target_modules == set(DATA["target_modules"][key]["llama"])
        if key == "IA3":
            assert chosen.feedforward_modules == set(DATA["feedforward_modules"]["IA3"]["llama"])


def test_known_by_hand() -> None:
    targets = DATA["target_modules"]
    assert targets["LORA"]["llama"] == ["q_proj", "v_proj"]
    assert targets["IA3"]["llama"] == ["k_proj", "v_proj", "down_proj"]  # the paper: keys, values, feed-forward
    assert DATA["feedforward_modules"]["IA3"]["llama"] == ["down_proj"]
    assert targets["FOURIERFT"]["gpt2"] == ["mlp.c_proj"] != targets["LORA"]["gpt2"]
    assert isinstance(targets["LORA"]["gemma4"], str)  # a regular expression, kept as one

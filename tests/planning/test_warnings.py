"""What was asked for and has no effect is said: in Python, in JSON and in every text; `strict` makes it an error."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

import peftplan
from tests.cli.run import run

PHI3: dict[str, Any] = {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 48, "intermediate_size": 80, "vocab_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def adapted_by_peft(targets: list[str]) -> set[str]:
    """The last names of the modules that peft adapts in a small Phi-3."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**PHI3)
    adapter = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # peft says nothing of a name that matches nothing
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(config), adapter)
    return {name.rpartition(".")[2] for name in model.targeted_module_names}


def test_names_of_separate_projections_in_a_model_that_fuses_them() -> None:
    pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    result = peftplan.estimate(PHI3, target_modules=targets)
    assert adapted_by_peft(targets) == {"o_proj"}
    assert {module.leaf for module in result.adaptation.matched} == {"o_proj"}
    (warning,) = result.warnings
    assert warning.startswith("target_modules: 'q_proj', 'k_proj', 'v_proj' adapt nothing")
    assert warning.endswith("near: qkv_proj")
    assert result.to_dict()["warnings"] == [warning]


def test_experts_that_are_parameters_are_named_as_such() -> None:
    """gpt-oss: attention alone trains, 3,981,312 parameters with rank 8, where Unsloth of today trains 92,454,912."""
    projections = ["gate_proj", "up_proj", "down_proj"]
    (warning,) = peftplan.estimate("gpt-oss-20b", r=8, target_modules=["q_proj", *projections]).warnings
    assert "its experts are parameters, which target_parameters mlp.experts.gate_up_proj,mlp.experts.down_proj adapts" in warning
    assert "Unsloth" in warning
    adapted = peftplan.estimate(
        "gpt-oss-20b", r=8, target_modules=["q_proj"], target_parameters="mlp.experts.gate_up_proj,mlp.experts.down_proj"
    )
    assert adapted.warnings == ()
    experts = 24 * 32 * 8 * ((2880 + 5760) + (2880 + 2880))
    assert adapted.trainable_parameters == experts + 24 * 8 * (2880 + 4096)


def test_a_word_in_a_list_is_a_name_to_peft() -> None:
    pytest.importorskip("peft")
    targets = ["all-linear", "embed_tokens"]
    result = peftplan.estimate(PHI3, target_modules=",".join(targets))
    assert adapted_by_peft(targets) == {"embed_tokens"}
    assert [module.leaf for module in result.adaptation.matched] == ["embed_tokens"]
    assert "all-linear is a keyword that is used alone" in result.warnings[0]


@pytest.mark.parametrize("targets", ["all-linear", "qkv_proj,o_proj", ".*qkv_proj", "layers.0.mlp.down_proj"])
def test_nothing_is_said_where_every_name_matches(targets: str) -> None:
    assert peftplan.estimate(PHI3, target_modules=targets, strict=True).warnings == ()


def test_names_in_an_adapter_config_and_in_a_method_that_peft_counts() -> None:
    pytest.importorskip("peft")
    listed = {"target_modules": ["o_proj", "query"], "r": 8}
    for config in ({"peft_type": "LORA", **listed}, {"peft_type": "DELORA", **listed}):
        (warning,) = peftplan.estimate(PHI3, peft_config=config).warnings
        assert "'query' adapts nothing" in warning
        assert "it has" in warning  # nothing is near


def test_a_field_that_peft_does_not_know_is_named() -> None:
    pytest.importorskip("peft")
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["o_proj"], "lora_bais": True}
    assert peftplan.estimate(PHI3, peft_config=config).warnings == (
        "peft_config: 'lora_bais' is ignored: the installed peft has no such field of LORA",
    )
    assert peftplan.estimate(PHI3, peft_config=config | {"lora_bais": False}).warnings == ()


def test_strict_makes_it_an_error() -> None:
    with pytest.raises(peftplan.PeftplanError, match="target_modules: 'q_proj' adapts nothing"):
        peftplan.estimate(PHI3, target_modules="q_proj,o_proj", strict=True)
    done = run("estimate", "phi-4", "--target-modules", "q_proj,o_proj", "--strict")
    assert (done.code, done.out) == (2, "")
    assert "near: qkv_proj" in done.err


@pytest.mark.parametrize("fmt", ["table", "json", "csv", "markdown"])
def test_every_format_says_it_without_verbose(fmt: str) -> None:
    done = run("estimate", "phi-4", "--target-modules", "q_proj,o_proj", "--format", fmt)
    assert done.code == 0
    assert "'q_proj' adapts nothing" in done.out
    if fmt == "json":
        assert len(json.loads(done.out)["warnings"]) == 1


def test_serving_says_it_too() -> None:
    notes = peftplan.serving(PHI3, target_modules="q_proj,o_proj").assumptions["notes"]
    assert any("'q_proj' adapts nothing" in note for note in notes)


@pytest.mark.parametrize("model", ["llama-2-7b", "llama-2-13b", "llama-2-70b"])
def test_a_length_beyond_the_positions_of_the_config_is_noted(model: str) -> None:
    """Llama 2 was trained on 4,096 tokens (Touvron et al. 2023, table 1). Positions are rotary: a longer sequence runs."""
    noted = peftplan.estimate(model, seq_len=4097).assumptions.get("notes", [])
    assert any("seq_len 4,097 is beyond the config's max_position_embeddings, 4,096" in note for note in noted)
    noted = peftplan.estimate(model, seq_len=4096).assumptions.get("notes", [])
    assert not any("max_position_embeddings" in note for note in noted)

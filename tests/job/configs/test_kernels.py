"""Kernels that a file turns on: which they are, and what is said of a model for which they have no formula."""

from __future__ import annotations

from typing import Any

from peftplan import estimate
from peftplan.job.configs.read import read_values

AXOLOTL: dict[str, Any] = {
    "base_model": "meta-llama/Llama-3.2-1B",
    "adapter": "lora",
    "micro_batch_size": 1,
    "sequence_len": 512,
    "lora_target_linear": True,
    "lora_r": 8,
    "bf16": True,
}
LIGER = {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True, "liger_rms_norm": True}


def kernels(**keys: Any) -> Any:
    return read_values({**AXOLOTL, **keys}, file="a.yml").options.get("kernels")


def test_axolotl_turns_its_own_on() -> None:
    assert kernels() == ("axolotl",)
    assert kernels(lora_mlp_kernel=False) is None
    assert kernels(lora_mlp_kernel=True) == ("axolotl.lora_mlp",)
    assert kernels(load_in_8bit=True) is None
    assert kernels(adapter=None) is None


def test_those_of_plugins_are_added() -> None:
    assert kernels(**LIGER) == ("liger.rms_norm", "liger.rope", "axolotl")
    plan = read_values({**AXOLOTL, **LIGER}, file="a.yml")
    assert plan.read["liger_rope"].option == "kernels"


def test_a_file_without_a_formula_for_them_is_a_bound() -> None:
    """Gemma's layers have none: the true peak is at most the one without the kernels, and the result says so."""
    result = estimate(config=read_values({**AXOLOTL, "base_model": "google/gemma-2b", **LIGER}, file="a.yml"))
    assert result.config is not None
    assert result.config["bound"] == "at_most"
    assert result.config["unsupported"]["liger_rope"]["effect"] == "lowers"
    assert "kernels" not in result.assumptions


def test_with_one_it_is_exact() -> None:
    result = estimate(config=read_values({**AXOLOTL, **LIGER}, file="a.yml"))
    assert result.config is not None
    assert (result.config["bound"], result.config["unsupported"]) == (None, {})
    assert result.assumptions["kernels"][:2] == ["axolotl.lora_mlp", "axolotl.lora_qkv"]

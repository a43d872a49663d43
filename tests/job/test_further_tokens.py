"""Layers of Nemotron 3 that predict further tokens, as NeMo Automodel builds them."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import OptionError
from peftplan.job.sources import load_config

SUPER: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 32, "ep_size": 32}
PUBLISHED = 123_611_012_096
"""Tensors of the repository of Nemotron 3 Super, which has them; transformers' class leaves them out."""


def test_all_tensors_of_the_repository_are_counted() -> None:
    """Embeddings and hidden states of 4,096 numbers are joined; then attention, and 512 experts in a latent space of 1,024."""
    own = peftplan.estimate("nvidia-nemotron-3-super-120b-a12b-bf16", **SUPER)
    without = peftplan.estimate("nvidia-nemotron-3-super-120b-a12b-bf16", **SUPER, mtp_depths=0)
    assert (own.total_parameters, without.total_parameters) == (PUBLISHED, 120_668_687_360)
    joined = 2 * 4096 * 4096 + 3 * 4096  # and two norms before, one behind
    attention = 4096 + 2 * 4096 * 4096 + 2 * 4096 * 256
    experts = 4096 + 512 * 4096 + 2 * 4096 * 5376 + 2 * 4096 * 1024 + 512 * 2 * 1024 * 2688
    assert own.total_parameters - without.total_parameters == joined + attention + experts


def test_depths_share_their_layers() -> None:
    job: dict[str, Any] = {"method": "lora", "trainer": "automodel", "gradient_checkpointing": True, "kernels": "mamba-ssm"}
    one, two = (peftplan.estimate("nvidia-nemotron-3.5-lightning-30b-a3b-bf16", **job, mtp_depths=each) for each in (1, 2))
    assert one.total_parameters == two.total_parameters
    assert one.peaks is not None
    assert two.peaks is not None
    assert two.peaks.allocated > one.peaks.allocated


@pytest.mark.parametrize("trainer", ["transformers", "automodel-hf"])
def test_other_programs_predict_one_token(trainer: Any) -> None:
    with pytest.raises(OptionError, match="mtp_depths"):
        peftplan.estimate("nvidia-nemotron-3.5-lightning-30b-a3b-bf16", trainer=trainer, mtp_depths=1)


def test_what_was_not_rehearsed_has_no_peak() -> None:
    job: dict[str, Any] = {"method": "lora", "trainer": "automodel", "gradient_checkpointing": True, "kernels": "mamba-ssm"}
    for other in ({"mtp_depths": 3}, {"gradient_checkpointing": False}, {"method": "full"}):
        assert peftplan.estimate("nvidia-nemotron-3.5-lightning-30b-a3b-bf16", **{**job, **other}).peaks is None, other


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"mtp_depths": 0}, True),
        ({"mtp_depths": 3}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"method": "full"}, False),
        ({"kernels": "mamba-ssm,deepep,te-linear", "gradient_accumulation_steps": 2}, True),
        ({"kernels": "mamba-ssm,deepep,te-linear", "method": "full"}, False),
        ({"kernels": "mamba-ssm,deepep,te-linear", "method": "full", "seq_len": 2048}, True),
        ({"kernels": "te,mamba-ssm,deepep,te-linear", "gradient_accumulation_steps": 2}, False),
        ({"kernels": "te,mamba-ssm,deepep,te-linear", "gradient_accumulation_steps": 2, "mtp_depths": 0}, True),
    ],
)
def test_what_was_rehearsed_beside_divided_experts(options: dict[str, Any], known: bool) -> None:
    job: dict[str, Any] = {"method": "lora", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "ep_size": 8, "seq_len": 512}
    job |= {"kernels": "te-norm,mamba-ssm,deepep,te-linear", "mtp_depths": 2}
    peaks = peftplan.estimate("nvidia-nemotron-3.5-lightning-30b-a3b-bf16", **job | options).peaks
    assert (peaks is not None) is known
    assert peaks is None or (peaks.reserved is None) is (options.get("method") == "full")


def test_depths_of_a_config_have_layers_of_their_own() -> None:
    """nemo_automodel, components/models/common/mtp/mtp.py (`MTPConfig.num_physical_depths`), without `use_repeated_layer`."""
    config = {**load_config("nvidia-nemotron-3.5-lightning-30b-a3b-bf16")}
    job: dict[str, Any] = {"method": "full", "trainer": "automodel"}
    none, one, two = (
        peftplan.estimate({**config, "num_nextn_predict_layers": depths}, **job).total_parameters for depths in (0, 1, 2)
    )
    assert two - none == 2 * (one - none)


@pytest.mark.parametrize("kinds", [["mamba", "moe"], ["attention"], ["moe", "attention"], ["attention", "mlp"]])
def test_a_depth_of_other_layers_has_no_peak(kinds: list[str]) -> None:
    config = {**load_config("nvidia-nemotron-3.5-lightning-30b-a3b-bf16"), "mtp_layers_block_type": kinds}
    job: dict[str, Any] = {"method": "lora", "trainer": "automodel", "gradient_checkpointing": True, "kernels": "mamba-ssm"}
    result = peftplan.estimate(config, **job)
    assert result.peaks is None
    assert any("further tokens" in line for line in result.not_modelled)


@pytest.mark.parametrize(
    ("model", "quant"), [("nvidia-nemotron-3.5-lightning-30b-a3b-bf16", "nf4"), ("nvidia-nemotron-3-nano-30b-a3b-bf16", None)]
)
def test_models_without_such_layers_say_so(model: str, quant: Any) -> None:
    """Over a base in 4 bits the recipe runs transformers' model (_transformers/model_init.py:1239)."""
    result = peftplan.estimate(model, method="lora", trainer="automodel", quant=quant, mtp_depths=1)
    assert result.total_parameters == 31_584_865_216
    assert any("mtp_depths changes nothing" in note for note in result.assumptions["notes"])

"""4-bit weights that are packed on the host, of which FSDP2 moves a unit at a time to the card (`device_map="cpu"`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import PeftplanError
from peftplan.job.script import Script
from tools.rank_jobs import compared, rows

PACKED: dict[str, Any] = {"method": "qlora", "gpus": 2, "strategy": "fsdp2", "quant_storage": "bf16", "device_map": "cpu"}
REHEARSED = [row for row in rows() if row["program"].get("device_map") == "cpu"]


@pytest.mark.parametrize("row", REHEARSED, ids=lambda row: row["name"])
def test_a_rank_loads_one_unit_at_a_time(row: dict[str, Any]) -> None:
    shares = compared(row)
    assert shares is not None
    assert (shares["load"], shares["reserved"]) == (0, 0)
    assert max(map(abs, shares.values())) < 0.0003


def test_ranks_of_a_node_pack_a_model_each() -> None:
    host = peftplan.estimate("llama-3.2-1b", **PACKED).to_dict()["host"]
    assert host["per_node"]["loading"] == 2 * host["loading"]["bytes"] > 1.5e9
    assert "quantized there" in host["loading"]["how"]


def test_70b_on_two_small_cards_is_proposed_with_its_weights_on_the_host() -> None:
    job = {"method": "qlora", "gpu": "2xrtx-4090", "strategy": "fsdp2"}
    first = peftplan.estimate("llama-3-70b", advice="best", **job).advice["rtx-4090"].changes[0]
    assert first.options == {"offload_params": "cpu", "quant_storage": "bf16", "device_map": "cpu"}
    assert first.verdict == "fits"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"strategy": "fsdp1"}, "device_map: accelerate .* refuses a quantized model on the host under FSDP1"),
        ({"quant_storage": "uint8"}, "stored as whole numbers on the host; add --quant-storage bf16"),
        ({"strategy": "ddp"}, "accepted: none under a strategy, cpu for 4-bit weights under fsdp2"),
        ({"method": "lora", "quant_storage": None}, "accepted: none under a strategy, cpu for 4-bit weights under fsdp2"),
        ({"trainer": "automodel"}, "NeMo Automodel's recipe loads the model itself, not on the host"),
        ({"trainer": "axolotl"}, "Trainer of axolotl loads the model itself, not on the host"),
        ({"gpus": None, "strategy": None, "quant_storage": None}, "accepted on one GPU: none, auto, cuda"),
    ],
)
def test_other_jobs_refuse_it(options: dict[str, Any], line: str) -> None:
    with pytest.raises(PeftplanError, match=line):
        peftplan.estimate("llama-3.2-1b", **{**PACKED, **options})


def test_ranks_that_wait_for_the_first_one_load_as_others_do() -> None:
    """accelerate skips `cpu_ram_efficient_loading` beside `Params4bit`; rehearsed: equal in every phase, and reserved."""
    plain, efficient = (
        peftplan.estimate("llama-3.2-1b", **PACKED, cpu_ram_efficient_loading=value).peaks for value in (None, True)
    )
    assert plain is not None
    assert efficient is not None
    assert (plain.by_phase, plain.reserved) == (efficient.by_phase, efficient.reserved)


def test_dora_has_no_peak() -> None:
    """A rehearsal reserved 7.7 % more than the replay."""
    assert "4-bit weights on the host" in peftplan.estimate("llama-3.2-1b", **PACKED | {"method": "qdora"}).not_modelled[0]


@pytest.mark.parametrize("tool", ["axolotl", "trl", "trl-script", "ms-swift"])
def test_no_file_of_a_tool_says_it(tool: Any) -> None:
    with pytest.raises(PeftplanError, match=r"device_map: a config of .* has no setting for 'cpu'"):
        peftplan.export(peftplan.estimate("llama-3.2-1b", **PACKED), to=tool)


def test_a_file_whose_tool_loads_the_model_refuses_it_and_is_not_advised_to_use_it(tmp_path: Path) -> None:
    file = tmp_path / "trl.yml"
    fsdp = "fsdp: true\nfsdp_config: {version: 2, auto_wrap_policy: TRANSFORMER_BASED_WRAP}\nnum_processes: 2\n"
    file.write_text(
        "model_name_or_path: meta-llama/Meta-Llama-3-70B\nuse_peft: true\nload_in_4bit: true\ndtype: bfloat16\nbf16: true\n"
        f"max_length: 2048\nlora_target_modules: all-linear\ndataset_name: x\noutput_dir: y\n{fsdp}",
        encoding="utf-8",
    )
    advice = peftplan.estimate(config=file, gpu="2xrtx-4090", advice="best").advice["rtx-4090"]
    assert advice.changes
    assert not any("device_map" in change.options for change in advice.changes)
    with pytest.raises(PeftplanError, match="trl loads the model itself, not on the host"):
        peftplan.estimate(config=file, device_map="cpu")


@pytest.mark.parametrize("model", ["glm-4.5-air", "deepseek-v3"])
def test_fsdp1_refuses_routers_in_fp32(model: str) -> None:
    with pytest.raises(PeftplanError, match=r"gate\.weight stays in fp32 beside bf16, which FSDP1 refuses"):
        peftplan.estimate(model, method="lora", target_modules=["o_proj"], strategy="fsdp1", gpus=8)


def test_an_older_release_that_loads_through_the_host_is_named() -> None:
    """Llama 2 70B on two cards of 24 GB, which peft's documentation measures at 19.6 GB each (docs/source/accelerate/fsdp.md)."""
    job: dict[str, Any] = {"model": "llama-2-70b", "method": "qlora", "r": 8, "seq_len": 2048, "trainer": "trl"}
    job |= {"strategy": "fsdp1", "gpu": "2xrtx-4090", "offload_params": "cpu", "quant_storage": "bf16"}
    today = peftplan.estimate(**job, cpu_ram_efficient_loading=True)
    older = peftplan.estimate(**job, cpu_ram_efficient_loading=True, script=Script.on(transformers="4.57"))
    assert [verdict.verdict for estimate in (today, older) for verdict in estimate.gpus] == ["does_not_fit", "fits"]
    told = [any("--transformers 4.57" in note for note in estimate.assumptions.get("notes", ())) for estimate in (today, older)]
    assert told == [True, False]
    plain = peftplan.estimate(**job)
    assert not any("--transformers" in note for note in plain.assumptions.get("notes", ()))

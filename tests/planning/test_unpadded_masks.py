"""The mask that transformers 4.54 to 4.57 makes for a batch without one. Witness: runs measured on an RTX A6000 with 4.57.6.

Their records say `padding` in its place; here they run without, and with the versions that ran.
"""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.accuracy.engines import ask, read_cases, record_files
from peftplan.job.prepare import prepare
from peftplan.job.script import Script
from tests.memory.engines import LLAMA as OF_FIVE_LAYERS
from tests.memory.engines import by_phase

MEASURED = {
    case.record.id: case.record
    for case in read_cases([path for path in record_files() if path.name == "vramcalc_a6000.jsonl"])
    if case.record.run.options["attn_implementation"] == "sdpa"
}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
BLOOM = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "hidden_size": 64,
    "n_layer": 1,
    "n_head": 2,
    "vocab_size": 100,
}
BIGCODE = {**BLOOM, "model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "n_embd": 64, "n_positions": 256}
PLAIN: dict[str, Any] = {"trainer": "plain", "use_cache": False, "seq_len": 128, "batch_size": 2, "padding": False}

CACHED: dict[str, Any] = {"use_cache": True, "gradient_checkpointing": True}
"""Checkpointing turns the cache off before masks are made."""


def phases(config: dict[str, Any], transformers: str | None, engine: Any = "analytic", **options: Any) -> dict[str, int]:
    script = Script.on(transformers=transformers)
    peaks = peftplan.estimate(config, engine=engine, script=script, **{**PLAIN, **options}).peaks
    assert peaks is not None
    return peaks.by_phase


@pytest.mark.parametrize("name", MEASURED)
def test_runs_of_4_57_without_a_mask_take_what_was_measured(name: str) -> None:
    """Within 32 KiB of 9 to 32 GB; without the mask vramcalc/6 would take 335 MB less."""
    record = MEASURED[name]
    unpadded = record.run.model_copy(update={"options": {**record.run.options, "padding": False}})
    measured = record.peaks.overall.allocated
    assert ask(record.model_copy(update={"run": unpadded}), "analytic").figures["allocated"] == pytest.approx(measured, abs=2**15)


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize(
    "options", [{}, {"autocast": "bf16", "gradient_checkpointing": True}, {"batch_size": 1}, CACHED], ids=str
)
def test_both_engines_make_the_mask(config: dict[str, Any], options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    ours, theirs = (phases(config, "4.57.6", engine, **options) for engine in ("analytic", "trace"))
    assert ours == {phase: pytest.approx(nbytes, rel=0.001) for phase, nbytes in theirs.items()}


def test_checkpointing_turns_the_cache_off_before_the_mask_is_made() -> None:
    """Traced with transformers 4.55.4, 4.56.2 and 4.57.6 themselves; without the mask forward would take 92,059,648 bytes."""
    traced = {"load": 9_680_896, "forward": 98_821_632, "backward": 178_689_536, "step": 43_506_688}
    job: dict[str, Any] = {**PLAIN, **CACHED, "method": "lora", "batch_size": 3, "seq_len": 1500}
    counted = by_phase(peftplan.estimate(OF_FIVE_LAYERS, script=Script.on(transformers="4.57.6"), **job))
    assert counted == {phase: pytest.approx(nbytes, abs=2**14) for phase, nbytes in traced.items()}


@pytest.mark.parametrize("version", ["4.54.1", "4.55.4", "4.56.2", "4.57.6"])
def test_a_mask_costs_what_a_padded_batch_costs(version: str) -> None:
    """But the mask of the batch itself, 8 bytes a token."""
    padded, bare = (phases(LLAMA, version, padding=padding)["forward"] for padding in (True, False))
    assert padded - bare == 8 * 2 * 128
    assert bare > phases(LLAMA, "5.0.0")["forward"]


@pytest.mark.parametrize(
    ("config", "version", "options"),
    [
        (LLAMA, "4.52.4", {}),
        (LLAMA, "5.0.0", {}),
        (BIGCODE, "4.57.6", CACHED),  # `GPTBigCodeModel.forward` makes its mask with the cache
        (LLAMA, "4.57.6", {"use_cache": True}),  # `past_key_values is None` no longer holds
        (LLAMA, "4.57.6", {"trainer": "transformers"}),  # whose collators give a mask of ones
        (LLAMA, "4.57.6", {"attn_implementation": "eager"}),  # which has a mask anyway
        (BLOOM, "4.57.6", {}),  # `_update_causal_mask` of its own
    ],
)
def test_elsewhere_there_is_none(config: dict[str, Any], version: str, options: dict[str, Any]) -> None:

    setup = prepare(config, **{**PLAIN, **options}).setup
    assert not Script.on(transformers=version).masks_unpadded(config["model_type"], setup)

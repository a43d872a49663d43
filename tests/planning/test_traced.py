"""`estimate(engine="trace")`: the same `Estimate`, with peaks; its static bytes are the witness of what a trace finds alive."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peftplan
from peftplan.results.peaks import PHASES

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SHORT = {"batch_size": 2, "seq_len": 64, "trainer": "plain", "engine": "trace"}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "r": 4},
        {"method": "lora", "r": 4, "target_modules": "attention", "gradient_checkpointing": True},
        {"method": "qlora", "r": 4},
        {"method": "ia3"},
        {"method": "full"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_trace_holds_what_the_ledger_says_and_more(options: dict[str, Any]) -> None:
    traced = peftplan.estimate(TINY, **options, **SHORT)
    static = peftplan.estimate(TINY, **options, **{**SHORT, "engine": "analytic"})
    memory = traced.to_dict()["memory"]
    assert traced.trainable_parameters == static.trainable_parameters
    assert set(memory["peak_by_phase"]) == set(PHASES)
    assert memory["peak_allocated"] == max(memory["peak_by_phase"].values()) == sum(memory["by_category"].values())
    assert memory["peak_allocated"] == sum(line["bytes"] for line in memory["lines"])
    assert memory["peak_reserved"] >= memory["peak_allocated"]
    assert memory["peak_allocated"] > static.persistent_bytes > 0
    lasting = static.static.by_category()
    for category in ("adapter_weights", "quant_state", "optimizer_states"):
        assert memory["by_category"][category] == lasting[category], category
    assert memory["by_category"]["logits"] >= 2 * 64 * 512 * 2  # the outputs, kept: a bf16 logit per token and vocabulary entry
    at_step = {line["name"]: line["bytes_by_phase"] for line in memory["lines"]}
    assert any("step" in phases and "backward" in phases for phases in at_step.values())


def test_a_traced_job_gets_a_verdict() -> None:
    sizes = ("2GiB", "1MiB")  # 828 MiB of CUDA context are assumed
    enough, too_little = (peftplan.estimate(TINY, method="lora", gpu=size, **SHORT).gpus[0].verdict for size in sizes)
    assert (enough, too_little) == ("fits", "does_not_fit")


@pytest.mark.parametrize(
    ("card", "context", "word", "mib", "releases"),
    [
        ("70MiB", 0, "fits", 4, False),  # 5 % of 70 MiB are 3.5
        ("69MiB", 0, "tight", 3, False),
        ("66MiB", 0, "tight", 0, False),
        ("63MiB", 0, "tight", -3, True),
        ("63MiB", 1, "tight", -4, True),
        ("63MiB", 3, "does_not_fit", -6, False),
        ("60MiB", 0, "does_not_fit", -6, False),
    ],
)
def test_a_traced_job_is_judged_by_what_it_reserves(card: str, context: int, word: str, mib: int, releases: bool) -> None:
    """The job reserves 66 MiB, and runs within 62: what it allocates, 46.8 MiB, decides nothing."""
    job = {**SHORT, "batch_size": 8, "seq_len": 200, "method": "full"}
    (on_card,) = peftplan.estimate(TINY, gpu=card, context=context, **job).gpus
    assert (on_card.verdict, on_card.headroom_bytes, on_card.runs_by_releasing_cache) == (word, mib * 2**20, releases)
    assert on_card.needed_bytes == (66 + context) * 2**20


def test_a_trace_without_pictures_says_text_only(tmp_path: Path) -> None:
    from tests.cli.run import run
    from tests.trace.family_configs import FAMILIES

    small = FAMILIES["qwen2_vl"]
    (on_card,) = peftplan.estimate(small.config, method="lora", gpu="4GiB", **SHORT).gpus
    assert (on_card.verdict, on_card.scope, on_card.words) == ("fits", "text", "fits, text only")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small.config), encoding="utf-8")
    job = ("estimate", str(config), "--gpu", "h100", "--engine", "trace", "--seq-len", "64", "--require-fit")
    assert run(*job).code == 1
    assert run(*job, "--text-only").code == 0
    axolotl = tmp_path / "lora.yml"
    axolotl.write_text(
        f"base_model: {config}\nadapter: lora\nlora_r: 8\nlora_target_linear: true\nlora_mlp_kernel: false\n"
        "micro_batch_size: 1\nsequence_len: 64\n",
        encoding="utf-8",
    )
    many = run("configs", str(axolotl), "--engine", "trace", columns=140).out
    assert "text only: images are not counted" in many
    assert "1 training config: 1 counted, 1 with a peak, 0 exact, 1 of text only" in many


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_methods_that_peft_lacks_are_traced(method: str) -> None:
    traced = peftplan.estimate(TINY, method=method, **SHORT)
    assert traced.peaks is not None
    assert traced.peaks.allocated > traced.persistent_bytes


def test_a_model_of_pictures_and_text_is_wrapped_for_no_task() -> None:
    """peft's wrapper for features hands on `inputs_embeds`, which CLIP's forward passes to its encoder a second time."""
    clip = {"model_type": "clip", "architectures": ["CLIPModel"], **dict.fromkeys(("text_config", "vision_config"), TOWER)}
    traced = peftplan.estimate(clip, **{**SHORT, "batch_size": 3}, target_modules=["q_proj"], r=4)
    assert traced.trainable_parameters == 2 * 2 * 4 * (64 + 64)  # A and B of one module in two layers of either tower
    assert traced.assumptions["images_per_sample"] == 1


def test_without_torch_the_extra_is_named() -> None:
    hidden = {name: None for name in sys.modules if name.startswith("peftplan.trace.engine")} | {"peftplan.trace.engine": None}
    with patch.dict(sys.modules, hidden), pytest.raises(peftplan.MissingExtraError, match=r"pip install 'peftplan\[trace\]'"):
        peftplan.estimate(TINY, method="lora", **SHORT)


def test_a_model_that_fails_says_so_in_one_line() -> None:
    fails = patch("transformers.models.llama.modeling_llama.LlamaMLP.forward", side_effect=ValueError("no\nmemory"))
    with fails, pytest.raises(peftplan.RefusedError, match=r"^trace: forward fails in model.layers.0.\w+: ValueError: no$"):
        peftplan.estimate(TINY, method="lora", **SHORT)


def test_segments_grow_under_a_trainer_whose_command_line_sets_it() -> None:
    """`axolotl train` (axolotl/utils/__init__.py, `set_pytorch_cuda_alloc_conf`)."""
    job: dict[str, Any] = {"method": "qlora", "r": 8, "batch_size": 2, "seq_len": 512}
    grown, fixed = (peftplan.estimate("smollm2-135m", trainer=name, engine="trace", **job).peaks for name in ("axolotl", None))
    assert grown is not None
    assert fixed is not None
    assert grown.reserved == peftplan.estimate("smollm2-135m", trainer="axolotl", **job).peaks.reserved != fixed.reserved
    assert grown.reserved_source is not None
    assert "expandable_segments:True" in grown.reserved_source

"""Names of kernels: packages, their parts, and what is refused in one line."""

from __future__ import annotations

import re
from typing import Any

import pytest

from peftplan import estimate
from peftplan.cli.texts import TRAINING
from peftplan.errors import InputError, RefusedError
from peftplan.job.kernels import KERNELS, PACKAGES, kernels_of, named_kernels, packages_of


def test_a_package_stands_for_all_its_parts() -> None:
    assert named_kernels("axolotl") == ("axolotl.lora_mlp", "axolotl.lora_qkv", "axolotl.lora_o")
    assert named_kernels("liger.rope, axolotl.lora_o") == ("axolotl.lora_o", "liger.rope")
    assert named_kernels("none") == named_kernels(None) == ()
    assert packages_of(named_kernels("axolotl,liger.rope")) == "axolotl, liger.rope"
    assert packages_of(()) == "none"


def test_every_part_has_a_place() -> None:
    for package in PACKAGES:
        own = [name for name in KERNELS if name.startswith(f"{package}.")]
        assert [kernel for kernel in kernels_of(own) if kernel is not None]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("unslot", "kernels: 'unslot' is not valid; did you mean unsloth"),
        (
            "nonsense",
            "kernels: 'nonsense' is not valid; accepted: axolotl, axolotl-fused, axolotl-offload, balanced, deepep, deepep-again",
        ),
        ("liger,unsloth.rope", "accepted: one kernel of each part, not unsloth.rope and liger.rope"),
        (3, "kernels: 3 is not valid"),
        ([{"liger": None}], "kernels: {'liger': None} is not valid; accepted: axolotl"),
        ([["liger"]], r"kernels: \['liger'\] is not valid; did you mean liger\? accepted: axolotl"),
    ],
)
def test_bad_names_are_one_line(names: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        estimate("llama-3.2-1b", method="lora", kernels=names)
    assert "\n" not in str(error.value)


def test_the_help_names_every_package() -> None:
    short = TRAINING["--kernels"].replace("int4|int8-int4|lora", "int4, unsloth-qat-int8-int4, unsloth-qat-lora")
    assert [package for package in PACKAGES if not re.search(rf"[ ,]{package}[ ,]", short)] == []


def test_the_trace_refuses_them() -> None:
    with pytest.raises(RefusedError, match="the trace engine runs the model's own, not liger; leave out --engine trace"):
        estimate("smollm-135m", method="lora", kernels="liger", engine="trace")


def test_a_model_without_formulas_is_named() -> None:
    result = estimate("gpt2", method="lora", kernels="liger")
    assert result.peaks is None
    assert result.not_modelled[0] == "liger's kernels in gpt2 for CAUSAL_LM (no formula yet)"


@pytest.mark.parametrize(
    ("model", "kernels", "has_formula"),
    [
        ("smollm3-3b", "liger", True),
        ("smollm3-3b", "axolotl", True),
        ("smollm3-3b", "unsloth", False),
        ("gemma-2b", "axolotl", True),
        ("gemma-2b", "liger", False),
    ],
)
def test_models_that_have_formulas_with_some_packages(model: str, kernels: str, has_formula: bool) -> None:
    assert (estimate(model, method="lora", kernels=kernels).peaks is not None) is has_formula


def test_none_leaves_the_estimate_as_it_is() -> None:
    def shown(**options: object) -> dict[str, object]:
        return estimate("llama-3.2-1b", method="lora", **options).to_dict()  # type: ignore[arg-type]

    assert shown() == shown(kernels="none")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kernels": "axolotl", "quant": "int8"}, "LoRA kernels over int8"),
        ({"kernels": "axolotl", "dtype": "fp32"}, "LoRA kernels in fp32 with autocast bf16"),
        ({"kernels": "unsloth", "use_dora": True}, "LoRA kernels with dropout or DoRA"),
        ({"kernels": "axolotl", "use_dora": True}, "LoRA kernels with dropout or DoRA"),
        ({"kernels": "liger", "attn_implementation": "eager"}, "kernels with eager attention"),
        ({"kernels": "axolotl", "gpus": 2, "strategy": "fsdp2"}, "kernels with FSDP2"),
        ({"kernels": "axolotl", "gpus": 2, "strategy": "zero3"}, "kernels with ZeRO-3"),
    ],
)
def test_jobs_without_a_formula_say_why(options: dict[str, object], why: str) -> None:
    result = estimate("llama-3.2-1b", method="lora", **options)  # type: ignore[arg-type]
    assert result.peaks is None
    assert result.not_modelled[0].startswith(why)


def test_a_sequence_above_the_window_has_none() -> None:
    result = estimate("mistral-7b-v0.1", method="lora", kernels="unsloth", seq_len=8192)
    assert result.not_modelled[0] == "unsloth's kernels with a sequence above the window of 4,096 tokens (no formula yet)"


def test_liger_scores_completions_without_a_reference() -> None:
    """Rehearsed on one GPU (tests/rehearse/preferences.jsonl): TRL's GRPO takes Liger's layers alone (grpo_trainer.py:1051)."""
    job: dict[str, Any] = {"trainer": "trl-grpo", "method": "lora", "kernels": "liger", "batch_size": 4, "num_generations": 4}
    assert estimate("qwen2.5-0.5b", seq_len=256, **job).peaks is not None
    for other in ({"beta": 0.04}, {"gpus": 2, "strategy": "ddp"}):
        assert estimate("qwen2.5-0.5b", seq_len=256, **job | other).peaks is None

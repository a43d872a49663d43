"""Virtual tokens before encoder-decoders, prefixes of families with caches of their own, and what peft refuses of either."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import RefusedError
from tests.memory.engines import OFF, PLAIN, TOLERANCE, TRAINER, phases, shallow

TOKENS = {"num_virtual_tokens": 20}
EAGER = {"attn_implementation": "eager", "padding": True}


@pytest.mark.parametrize(
    ("method", "model", "options"),
    [
        ("prompt-tuning", "bart-base", PLAIN),
        ("p-tuning", "mt0-small", {**TRAINER, **EAGER}),
        ("prefix-tuning", "bart-base", {**OFF, "dtype": "fp32"}),
        ("prefix-tuning", "t5-small", {**OFF, **EAGER}),
        ("prefix-tuning", "t5-small", {**PLAIN, "dtype": "fp32"}),
        ("prefix-tuning", "bloom-560m", {**OFF, **EAGER}),
        ("prefix-tuning", "gemma-3-270m", PLAIN),
        ("prefix-tuning", "gpt2", {**OFF, **EAGER}),
    ],
)
def test_each_phase_peaks_where_the_trace_does(method: str, model: str, options: dict[str, Any]) -> None:
    """Load, forward, backward and step."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    config = shallow(model)
    analytic, traced = (phases(config, engine, method=method, **TOKENS, **options) for engine in ("analytic", "trace"))
    assert analytic == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.items()}


@pytest.mark.parametrize(
    ("model", "method", "reason"),
    [
        ("bert-base-cased", "prompt-tuning", "KeyError: None"),
        ("whisper-tiny", "prompt-tuning", "KeyError: None"),
        ("mt0-small", "prefix-tuning", r"shape '\[1, 20, 4, 6, 85\]' is invalid for input of size 40960"),
        ("falcon-7b", "prefix-tuning", "izes.* must match"),
    ],
)
def test_both_engines_refuse_what_peft_does(model: str, method: str, reason: str) -> None:
    """A task type that peft has no class for, heads that do not divide the width, keys of another shape."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    for engine in ("analytic", "trace"):
        with pytest.raises(RefusedError, match=reason):
            estimate(shallow(model, 2), method=method, engine=engine, seq_len=32, **TOKENS, **OFF)  # type: ignore[arg-type]


def test_whisper_with_a_stated_task_is_counted_and_does_not_run() -> None:
    """20 tokens for each of two stacks, 384 wide; peft's class passes `input_ids`, of which there are none."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    adapter = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", **TOKENS}
    reason = "You have to provide either input_ids or inputs_embeds"
    counted = estimate("whisper-tiny", peft_config=adapter, seq_len=32, **OFF)  # type: ignore[arg-type]
    assert counted.trainable_parameters == 20 * 2 * 384
    assert reason in counted.not_modelled[0]
    with pytest.raises(RefusedError, match=reason):
        estimate("whisper-tiny", peft_config=adapter, engine="trace", seq_len=32, **OFF)  # type: ignore[arg-type]


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "P_TUNING"])
def test_virtual_tokens_of_a_masked_language_model_meet_too_few_labels(peft_type: str) -> None:
    """peft wraps it as FEATURE_EXTRACTION, and both engines meet the loss that has no labels for the virtual tokens."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    adapter = {"peft_type": peft_type, "task_type": "FEATURE_EXTRACTION", **TOKENS}
    for engine in ("analytic", "trace"):
        with pytest.raises(RefusedError, match=r"input batch_size \(52\) to match target batch_size \(32\)"):
            estimate(shallow("bert-base-cased", 2), peft_config=adapter, engine=engine, seq_len=32, **OFF)  # type: ignore[arg-type]


def test_a_prefix_of_a_masked_language_model_is_traced() -> None:
    """2 layers · 2 (key and value) · 768 for each virtual token."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    adapter = {"peft_type": "PREFIX_TUNING", "task_type": "FEATURE_EXTRACTION", **TOKENS}
    config = shallow("bert-base-cased", 2)
    assert "add --engine trace" in estimate(config, peft_config=adapter, seq_len=32, **OFF).not_modelled[0]  # type: ignore[arg-type]
    traced = estimate(config, peft_config=adapter, engine="trace", seq_len=32, **OFF)  # type: ignore[arg-type]
    assert traced.trainable_parameters == 20 * 2 * 2 * 768
    assert traced.peaks is not None

"""Logits of the last tokens only (`logits_to_keep`) in the analytic engine: by hand, against the trace, at other sizes."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import InputError, RefusedError
from tests.memory.engines import LLAMA, TOLERANCE, by_phase, phases, shallow

B, S, N, V = 3, 256, 40, 32_000
MODEL = {**LLAMA, "vocab_size": V}
TIED = {**MODEL, "tie_word_embeddings": True}
SIZES = {"batch_size": B, "seq_len": S}
PLAIN: dict[str, Any] = {"trainer": "plain", "use_cache": False}


def logits(phase: str, **options: Any) -> int:
    peaks = estimate(MODEL, **{**SIZES, **PLAIN, **options}).peaks
    assert peaks is not None
    return sum(line.bytes() for line in peaks.ledgers[phase] if line.category == "logits")


@pytest.mark.parametrize("count", [N, S])
def test_there_are_so_many_rows_of_logits(count: int) -> None:
    """bf16 logits, their fp32 copy and fp32 log probabilities; in backward the copy is gone, and two gradients are there."""
    assert logits("forward", logits_to_keep=count) == (2 + 4 + 4) * B * count * V
    assert logits("backward", logits_to_keep=count) == (2 + 4 + 4 + 4) * B * count * V


def test_the_trained_head_keeps_a_copy_of_the_last_hidden_states_of_several_sequences() -> None:
    """Rows of a slice do not follow each other: `linear` copies them where it must keep them (b × n × h in bf16)."""
    bytes_of = {"full": 2 * B * N * 256, "lora": 0}
    for method, expected in bytes_of.items():
        several = estimate(MODEL, **SIZES, **PLAIN, method=method, logits_to_keep=N).peaks
        assert several is not None
        assert sum(line.bytes() for line in several.ledgers["forward"] if line.name == "lm_head clone") == expected
        one = estimate(MODEL, seq_len=S, **PLAIN, method=method, logits_to_keep=N).peaks
        assert one is not None
        assert not [line for line in one.ledgers["forward"] if line.name == "lm_head clone"]


@pytest.mark.parametrize("options", [{"method": "full"}, {"method": "lora"}, {**PLAIN, "method": "qlora"}])
@pytest.mark.parametrize("batch_size", [1, B])
def test_more_logits_need_no_less(options: dict[str, Any], batch_size: int) -> None:
    """Of all tokens there may be less: then the trained head needs no copy."""
    job = {"batch_size": batch_size, "seq_len": S, **options}
    by_kept = [phases(MODEL, "analytic", logits_to_keep=n, **job) for n in (1, 2, 7, 64, S - 1)]
    for phase in by_kept[0]:
        of_phase = [peaks[phase] for peaks in by_kept]
        assert of_phase == sorted(of_phase)
    assert by_kept[0]["forward"] < by_kept[-1]["forward"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_all_tokens_are_a_slice_too(method: str) -> None:
    """`hidden_states[:, -s:, :]`: its gradient is a new tensor as large as the hidden states, beside that of the head."""
    kept, every = (estimate(MODEL, **SIZES, **PLAIN, method=method, logits_to_keep=n).peaks for n in (S, None))
    assert kept is not None
    assert every is not None
    assert {phase: kept.requested[phase] - every.requested[phase] for phase in ("load", "forward", "step")} == {
        "load": 0,
        "forward": 0,
        "step": 0,
    }
    assert 0 <= kept.requested["backward"] - every.requested["backward"] <= 2 * B * S * 256


def test_other_sizes_keep_the_count() -> None:
    numpy = pytest.importorskip("numpy")
    base = estimate(MODEL, **SIZES, **PLAIN, method="full", logits_to_keep=N)
    sizes = [(b, s) for b in (1, 2, 5) for s in (N, N + 1, S)]
    grid = base.at(batch_size=numpy.array([b for b, _ in sizes]), seq_len=numpy.array([s for _, s in sizes]))
    for number, (b, s) in enumerate(sizes):
        direct = by_phase(estimate(MODEL, batch_size=b, seq_len=s, **PLAIN, method="full", logits_to_keep=N))
        assert by_phase(base.at(batch_size=b, seq_len=s)) == direct
        assert {phase: int(values[number]) for phase, values in grid.requested_by_phase.items()} == direct
    for shorter in (N - 1, numpy.array([S, N - 1])):
        with pytest.raises(InputError, match=rf"logits_to_keep: {N} is not valid; accepted: up to {N - 1}, the to"):
            base.at(seq_len=shorter)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {"method": "full", "trainer": "plain"}),
        (MODEL, {"method": "full", "batch_size": 1}),
        (MODEL, {"method": "full", "logits_to_keep": S, "dtype": "fp32"}),
        (TIED, {"method": "full", "trainer": "plain", "gradient_checkpointing": True}),
        (TIED, {"method": "lora", "gradient_checkpointing": False, "logits_to_keep": S - 1}),
        (MODEL, {"method": "lora", "trainer": "plain", "batch_size": 1, "logits_to_keep": 1}),
        (MODEL, {"method": "lora", "modules_to_save": ["lm_head"]}),
        (TIED, {"method": "lora", "modules_to_save": ["lm_head"], "trainer": "plain"}),
        (MODEL, {"method": "lora", "target_modules": ["q_proj", "lm_head"], "trainer": "plain", "dtype": "fp32"}),
        (MODEL, {"method": "dora", "target_modules": ["lm_head"], "adapter_dtype": "bf16"}),
        (MODEL, {"method": "lora", "trainable_token_indices": [1, 2, 3], "trainer": "plain"}),
        (MODEL, {"method": "qlora"}),
        (MODEL, {"method": "qlora", "trainer": "plain", "quant_skip_modules": ["q_proj"], "gradient_accumulation_steps": 2}),
        (MODEL, {"method": "lora", "quant": "int8", "trainer": "plain", "quant_skip_modules": ["q_proj"]}),
        (MODEL, {"method": "prefix-tuning", "num_virtual_tokens": 7, "trainer": "plain"}),
        ("gpt2", {"method": "full", "trainer": "plain"}),
        ("gpt2", {"method": "lora", "autocast": "fp16", "dtype": "fp32"}),
        ("gemma-2-2b", {"method": "lora"}),
        ("gemma-2-2b", {"method": "full", "trainer": "plain", "gradient_checkpointing": True}),
        ("mixtral-8x7b", {"method": "qlora", "trainer": "plain"}),
        ("phi-2", {"method": "full", "trainer": "plain"}),
        ("bert-base-uncased", {"method": "full", "task_type": "CAUSAL_LM", "padding": True}),
    ],
)
def test_both_engines_agree(model: Any, options: dict[str, Any]) -> None:
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    config = shallow(model, 2) if isinstance(model, str) else model
    job = {**SIZES, "logits_to_keep": N, **options}
    analytic, traced = (phases(config, engine, **job) for engine in ("analytic", "trace"))
    assert analytic == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.items()}


def test_labels_of_virtual_tokens_are_too_many() -> None:
    """peft puts theirs before the batch's: b (n + p) labels for b n logits."""
    with pytest.raises(RefusedError, match=r"Expected input batch_size \(120\) to match target batch_size \(180\)"):
        estimate(MODEL, **SIZES, method="prompt-tuning", num_virtual_tokens=20, logits_to_keep=N)


def test_the_assumptions_say_so() -> None:
    assert estimate(MODEL, logits_to_keep=N).assumptions["logits_to_keep"] == N
    assert "logits_to_keep" not in estimate(MODEL).assumptions

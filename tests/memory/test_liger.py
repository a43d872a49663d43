"""Liger's fused linear cross entropy in the analytic engine: by hand, against the trace, at other sizes."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import InputError, RefusedError
from tests.memory.engines import LLAMA, by_phase, shallow

B, S, H, V = 2, 251, 256, 32_000
ROWS = 8
"""⌈v / h⌉ = 125; ⌈502 / 125⌉ = 5 → 8"""
MODEL = {**LLAMA, "vocab_size": V, "num_hidden_layers": 2}
TIED = {**MODEL, "tie_word_embeddings": True}
SIZES: dict[str, Any] = {"batch_size": B, "seq_len": S, "loss": "liger"}
PLAIN: dict[str, Any] = {"trainer": "plain"}
MIXED: dict[str, Any] = {"dtype": "fp32", "autocast": "bf16"}
WITHIN = 1e-4
"""The lists of small integers (positions) that only the trace has."""
RESERVED = 0.02
RANKNUM = 2 * 2 * 5 * 512
"""Gradient, norm and states of AdaLoRA's `ranknum` in two modules of two layers, which trains by accident and is left out."""
SEGMENT = 2 * 2**20
"""Bytes that the allocator takes at a time for small tensors."""


def alive(phase: str, **options: Any) -> dict[str, int]:
    peaks = estimate(MODEL, **{**SIZES, **options}).peaks
    assert peaks is not None
    lines: dict[str, int] = {}
    for line in peaks.ledgers[phase]:
        lines[line.name] = lines.get(line.name, 0) + line.bytes()
    return lines


def test_only_a_chunk_has_logits() -> None:
    """In 16 bits all goes into one buffer and two gradients, which last until backward has passed them."""
    lines = alive("forward", **PLAIN, method="full", use_cache=False)
    assert lines["logits, in chunks"] == 2 * ROWS * V
    assert lines["lm_head.weight.grad"] == 2 * V * H
    assert lines["grad_input"] == 2 * B * S * H


def test_a_frozen_head_gets_no_gradient() -> None:
    """kbit preparation makes the head and hidden states fp32: each chunk casts its own."""
    lines = alive("forward", method="qlora")
    assert lines["grad_input"] == 4 * B * S * H
    assert lines["to"] == 2 * V * H + 2 * ROWS * H
    assert lines["logits of a chunk mm"] == 2 * ROWS * V
    assert not lines.keys() & {"grad_weight", "lm_head.weight.grad"}


def test_autocast_casts_an_fp32_head_for_each_product() -> None:
    """From the second chunk on there are two copies of the weight: what autocast keeps of it, and the cast of its transpose."""
    lines = alive("forward", method="full", **MIXED)
    assert lines["to"] == 2 * 2 * V * H + 2 * ROWS * H


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {"method": "lora"}),
        (MODEL, {"method": "full", "batch_size": 1, "seq_len": 1}),
        (TIED, {"method": "full", **PLAIN, "keep_outputs": True, "gradient_accumulation_steps": 3}),
        (TIED, {"method": "full", **MIXED}),
        (TIED, {"method": "full", "dtype": "fp32", "autocast": "fp16", "gpu": "t4"}),
        (MODEL, {"method": "full", **PLAIN, "dtype": "fp32", "keep_gradients": True}),
        (MODEL, {"method": "qlora", "gradient_accumulation_steps": 2}),
        (MODEL, {"method": "lora", "quant": "int8", "modules_to_save": ["lm_head"], **PLAIN}),
        (MODEL, {"method": "lora", "target_modules": ["q_proj", "lm_head"], "batch_size": 1}),
        (TIED, {"method": "lora", "trainable_token_indices": [1, 2, 3]}),
        (MODEL, {"method": "prompt-tuning", "num_virtual_tokens": 9}),
        (MODEL, {"method": "prefix-tuning", "num_virtual_tokens": 7, **PLAIN}),
        (MODEL, {"method": "adalora"}),
        (MODEL, {"method": "full", "logits_to_keep": 40, "batch_size": 1}),
        ("llama-3.2-1b", {"method": "lora", **PLAIN, "seq_len": 333}),
        ("qwen3-0.6b", {"method": "full", "gradient_checkpointing": False}),
        ("gemma-2-2b", {"method": "qlora", "seq_len": 1023, "batch_size": 1}),
        ("mistral-7b", {"method": "lora", "dtype": "fp16", "gpu": "t4", "modules_to_save": ["lm_head"]}),
    ],
)
def test_both_engines_agree(model: Any, options: dict[str, Any]) -> None:
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    config = shallow(model, 2) if isinstance(model, str) else model
    analytic, traced = (estimate(config, engine=engine, **{**SIZES, **options}) for engine in ("analytic", "trace"))
    of_trace = by_phase(traced)
    left_out = 5 * S * 8 + (RANKNUM if options["method"] == "adalora" else 0)
    assert by_phase(analytic) == {phase: pytest.approx(size, rel=WITHIN, abs=left_out) for phase, size in of_trace.items()}
    assert analytic.peaks is not None
    assert traced.peaks is not None
    assert analytic.peaks.reserved == pytest.approx(traced.peaks.reserved, rel=RESERVED, abs=SEGMENT)


@pytest.mark.parametrize("options", [{"method": "full", **MIXED}, {"method": "full", **PLAIN}, {"method": "lora"}])
def test_other_sizes_keep_the_count(options: dict[str, Any]) -> None:
    """With one chunk, two, and more: the weight is cast once more from the second one on."""
    numpy = pytest.importorskip("numpy")
    base = estimate(MODEL, **{**SIZES, **options})
    sizes = [(b, s) for b in (1, 2, 5) for s in (1, 2, 3, 63, S, 1024)]
    grid = base.at(batch_size=numpy.array([b for b, _ in sizes]), seq_len=numpy.array([s for _, s in sizes]))
    for number, (b, s) in enumerate(sizes):
        direct = by_phase(estimate(MODEL, **{**SIZES, **options, "batch_size": b, "seq_len": s}))
        assert by_phase(base.at(batch_size=b, seq_len=s)) == direct
        assert {phase: int(values[number]) for phase, values in grid.requested_by_phase.items()} == direct


def test_a_slice_of_several_sequences_is_refused() -> None:
    """`LigerForCausalLMLoss` views its hidden states as rows."""
    with pytest.raises(
        InputError, match="logits_to_keep: 40 is not valid; liger keeps the logits of all tokens, or needs batch_size 1"
    ):
        estimate(MODEL, **SIZES, logits_to_keep=40)
    assert estimate(MODEL, **SIZES, logits_to_keep=S).peaks is not None


def test_models_that_liger_leaves_alone_are_refused() -> None:
    with pytest.raises(RefusedError, match="patches no gpt2 models"):
        estimate("gpt2", **SIZES)


def test_it_is_advised_where_it_saves_enough() -> None:
    """Logits are most of what LoRA of a small model takes; GPT-2, which Liger does not patch, hears of none."""
    job: dict[str, Any] = {"batch_size": 8, "seq_len": 1024}
    llama = estimate("llama-3.2-1b", **job, gpu="8GiB")
    assert (llama.gpus[0].verdict, llama.advice["8GiB"].changes[0].options) == ("does_not_fit", {"loss": "liger"})
    assert estimate("llama-3.2-1b", **job, gpu="8GiB", loss="liger").gpus[0].verdict == "fits"
    gpt2 = estimate("gpt2", **job, gpu="2GiB", advice="all").advice["2GiB"].changes
    assert [change.options for change in gpt2 if "liger" in change.options.values()] == []

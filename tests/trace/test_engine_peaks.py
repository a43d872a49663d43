"""Peaks against sums by hand: logits, attention kernels, quantized layers, optimizer temporaries."""

from __future__ import annotations

from unittest.mock import patch

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch

from peftplan.errors import RefusedError
from peftplan.job.script import Script
from peftplan.trace.cuda.attention import choose
from tests.trace.engine_case import HEADS, HIDDEN, llama, lora, traced

Q = ["q_proj"]
SEQ = 64
WIDE = 16_000
LOGITS = SEQ * WIDE  # 64 × 16,000 elements; 2 and 4 B each are multiples of 512, and larger than a layer's activations


@pytest.mark.parametrize(
    ("trainer", "phase", "per_logit"),
    [
        ("plain", "forward", 2 + 4 + 4),  # bf16, fp32 copy, log-softmax
        ("plain", "backward", 2 + 4 + 4 + 4),  # held bf16, log-softmax, its gradient twice
        ("transformers", "backward", 4 + 4 + 4),  # compute_loss drops the outputs
    ],
)
def test_bytes_per_logit(trainer: str, phase: str, per_logit: int) -> None:
    trace = traced(llama(vocab_size=WIDE), lora(Q), trainer=trainer, seq_len=SEQ)
    assert trace.by_category(phase)["logits"] == per_logit * LOGITS


def test_outputs_of_a_loop_without_a_function_live_into_the_next_forward() -> None:
    config = llama(vocab_size=WIDE)
    inside = traced(config, lora(Q), trainer="plain", seq_len=SEQ)
    outside = traced(config, lora(Q), trainer="plain", seq_len=SEQ, script=Script(outputs_outlive_step=True))
    more = outside.by_category("forward")["logits"] - inside.by_category("forward")["logits"]
    assert more == 2 * LOGITS


def test_lines_of_the_peak_sum_to_it() -> None:
    trace = traced(llama(), lora(Q), trainer="transformers", quant="nf4", compute_dtype="bf16", seq_len=SEQ)
    for phase, peak in trace.peaks.items():
        assert sum(trace.by_category(phase).values()) == peak.bytes == sum(group.bytes for group in peak.alive)
    assert max(trace.peak_by_phase.values()) == trace.peaks[trace.peak_phase].bytes


@pytest.mark.parametrize(
    ("optim", "copies"),
    [("adamw_torch", 1), ("adamw_torch_fused", 0), ("sgd", 0), ("adamw_bnb_8bit", 0)],
)
def test_temporaries_of_the_step(optim: str, copies: int) -> None:
    trace = traced(llama(), None, trainer="plain", optim=optim, seq_len=SEQ, keep_outputs=False)
    gradients = trace.by_category("step")["gradients"]
    scalars = 64 * 1024
    assert copies * gradients <= trace.by_category("step").get("temporaries", 0) < copies * gradients + scalars


def test_dequantized_weight_and_absmax_in_passing() -> None:
    """4-bit forward: the weight in bf16 and, double quantized, two fp32 absmax; backward: the weight and one absmax.

    So bitsandbytes 0.49; 0.50 fuses a product of 64 tokens.
    """
    options = {"trainer": "plain", "quant": "nf4", "double_quant": True, "compute_dtype": "bf16", "seq_len": SEQ}
    module, blocks = "model.layers.0.mlp.gate_proj", 704 * HIDDEN // 64
    older, today = (
        [m.storage.shape for m in trace.log if m.kind == "alloc" and m.storage.module == module and m.phase == "forward"]
        for trace in (traced(llama(1), lora(Q), script=script, **options) for script in (Script(bitsandbytes="0.49.2"), Script()))
    )
    assert older[:3] == [(1, SEQ, HIDDEN), (blocks,), (blocks,)]  # the input cast from fp32, then absmax
    assert (704, HIDDEN) in older
    assert today[0] == (1, SEQ, HIDDEN)
    assert not {(704, HIDDEN), (blocks,)} & set(today)


def test_two_workspaces_and_before_torch_2_12_two_more_with_biases() -> None:
    # :4096:2:16:8 KiB on sm_80: 8,519,680 B in the forward and in the backward thread; cuBLASLt 1 MiB each where biases are added
    plain = traced(llama(), lora(Q), trainer="plain", seq_len=SEQ, device=(8, 0))
    assert plain.by_category("step")["workspaces"] == 2 * 8_519_680
    biases = llama(attention_bias=True)
    for script, lt in ((Script(), 0), (Script(torch="2.11.0"), 2**20)):
        options = {"trainer": "plain", "seq_len": SEQ, "gradient_checkpointing": True}
        biased = traced(biases, lora(Q), device=(8, 0), script=script, **options)
        assert biased.by_category("step")["workspaces"] == 2 * (8_519_680 + lt)
    hopper = traced(llama(), lora(Q), trainer="plain", seq_len=SEQ, device=(9, 0))
    assert hopper.by_category("step")["workspaces"] == 2 * 33_554_432


@pytest.mark.parametrize(
    ("dtype", "mask", "gqa", "capability", "kernel"),
    [
        ("bfloat16", False, True, (8, 0), "flash"),
        ("float32", False, False, (8, 0), "efficient"),
        ("float32", False, True, (8, 0), "math"),
        ("bfloat16", True, False, (8, 0), "efficient"),
        ("float16", False, False, (7, 5), "efficient"),
        ("float16", False, True, (7, 5), "math"),
        ("bfloat16", False, False, (7, 5), "math"),
    ],
)
def test_choice_of_the_attention_kernel(dtype: str, mask: bool, gqa: bool, capability: tuple[int, int], kernel: str) -> None:
    query = torch.empty(1, HEADS, 16, 32, dtype=getattr(torch, dtype), device="meta")
    key = torch.empty(1, HEADS // 2 if gqa else HEADS, 16, 32, dtype=query.dtype, device="meta")
    attn_mask = torch.empty(1, 1, 16, 16, dtype=torch.bool, device="meta") if mask else None
    assert choose(query, key, key, attn_mask, enable_gqa=gqa, capability=capability) == kernel


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"trainer": "trl", "loss": "full"}, "full"),
        ({"trainer": "plain", "quant": "hqq"}, "hqq"),
        ({"trainer": "plain", "optim": "lomo"}, "lomo"),
        ({"trainer": "transformers", "keep_outputs": True}, "keep_outputs"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(RefusedError, match=named):
        traced(llama(1), lora(Q), seq_len=8, **options)  # type: ignore[arg-type]


def test_a_trace_that_fails_says_where_in_one_line() -> None:
    broken = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
    with (
        patch("torch.nn.functional.silu", side_effect=ValueError("no such kernel\nand more")),
        pytest.raises(RefusedError) as error,
    ):
        traced(llama(1), broken, trainer="plain", seq_len=8)
    assert str(error.value) == "trace: forward fails in model.layers.0.mlp.gate_proj: ValueError: no such kernel"

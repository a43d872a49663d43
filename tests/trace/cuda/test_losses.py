"""Losses in chunks: the real functions where they are installed, with kernels that do nothing, and sums by hand.

Letters: n tokens, h hidden size, v vocabulary.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peftplan
from peftplan.errors import RefusedError
from peftplan.trace.cuda.cut import CutCrossEntropy
from peftplan.trace.cuda.liger import LigerCrossEntropy, liger_rows
from peftplan.trace.cuda.unsloth import FusedLinear, chunk_rows
from tests.trace.engine_case import HIDDEN, llama, lora, traced
from tests.trace.storages import Storages

n, h, v = 1000, 64, 3000
LIGER_ROWS = 32  # ⌈v / h⌉ = 47; ⌈n / 47⌉ = 22 → 32
AMPERE = (8, 0)


def tensors(
    *, weight: torch.dtype = torch.bfloat16, head_trains: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.zeros(n, h, dtype=weight, requires_grad=True)
    return hidden, torch.zeros(v, h, dtype=weight, requires_grad=head_trains), torch.zeros(n, dtype=torch.int64)


def big(seen: Storages) -> list[int]:
    """Storages beyond those of a number per token."""
    return [nbytes for nbytes in seen.sizes if nbytes > 8 * n]


@pytest.mark.parametrize(
    ("weight", "head_trains", "autocast", "expected"),
    [
        # the gradient of the hidden states, and one buffer of logits for all 32 chunks
        (torch.bfloat16, False, False, {2 * n * h: 1, 2 * LIGER_ROWS * v: 1}),
        # a head that trains: its gradient in its dtype
        (torch.bfloat16, True, False, {2 * n * h: 1, 2 * LIGER_ROWS * v: 1, 2 * v * h: 1}),
        # an fp32 head under autocast (QLoRA, kbit prepared): a bf16 copy of it for each of two products, and new logits per chunk
        (torch.float32, False, True, {4 * n * h: 1, 2 * v * h: 64, 2 * LIGER_ROWS * v: 31, 2 * (n % LIGER_ROWS) * v: 1}),
    ],
)
def test_liger_by_hand(weight: torch.dtype, head_trains: bool, autocast: bool, expected: dict[int, int]) -> None:
    with FakeTensorMode():
        operands = tensors(weight=weight, head_trains=head_trains)
    with operands[0].fake_mode, Storages() as seen, torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        LigerCrossEntropy.apply(*operands, AMPERE)
    operands_too = Counter(t.untyped_storage().nbytes() for t in operands[:2])  # seen as views
    assert Counter(nbytes for nbytes in big(seen) if nbytes > 2 * LIGER_ROWS * h * 2) - operands_too == Counter(expected)


@pytest.mark.parametrize(("head_trains", "weight"), [(False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32)])
def test_liger_takes_what_liger_kernel_takes(head_trains: bool, weight: torch.dtype) -> None:
    module = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    operands = tensors(weight=weight, head_trains=head_trains)
    autocast = weight == torch.float32
    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "liger_cross_entropy_kernel", Launched()))
        stack.enter_context(patch.object(module, "_can_use_mm_out", lambda x, w: not autocast))
        if autocast:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        with Storages() as theirs:
            module.LigerFusedLinearCrossEntropyFunction.apply(*operands)[0].backward()
        operands[0].grad = operands[1].grad = None
        with Storages() as ours:
            LigerCrossEntropy.apply(*operands, AMPERE if not head_trains else (7, 5)).backward()
    assert Counter(big(theirs)) == Counter(big(ours))
    assert abs(theirs.peak - ours.peak) <= 8 * n


class Launched:
    """A Triton kernel that does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab", "rows"),
    [(16384, 4096, 32000, 2048), (4096, 4096, 128256, 128), (10, 4096, 1000, 10), (16384, 2048, 151936, 256)],
)
def test_rows_of_a_liger_chunk(tokens: int, hidden: int, vocab: int, rows: int) -> None:
    """The first is the example of liger-kernel's own comment: ⌈32000 / 4096⌉ = 8; 16384 / 8 = 2048. Then ⌈4096 / 32⌉ = 128,
    never more than there are, and 16384 / 75 = 218.4 → 256."""
    assert liger_rows(tokens=tokens, hidden_size=hidden, vocab_size=vocab) == rows


def test_unsloth_of_few_tokens_holds_whole_rows_of_fp32_logits() -> None:
    with FakeTensorMode():
        hidden, weight, targets = tensors()
    scored = n - 1
    with hidden.fake_mode, Storages() as seen:
        FusedLinear.apply(hidden, weight, None, targets, scored, AMPERE).backward()
    # rows: n h / v = 21 → 16; at least 512 × 151,936 logits: 25,930 tokens, at most 4096, at most n: all in one chunk
    once = {2 * n * h: 2, 4 * scored * v: 1}  # gradient of the hidden states and its scaled copy; logits
    chunk = {2 * scored * h: 2, 4 * scored * h: 1}  # rows picked, their gradient in fp32 and in bf16
    sizes = Counter(nbytes for nbytes in big(seen) if nbytes > 4 * scored)
    assert sizes - Counter([2 * v * h]) == Counter(once) + Counter(chunk)


def test_unsloth_of_many_tokens_and_a_frozen_head_holds_one_tile() -> None:
    tokens, vocab = 5000, 40_000
    with FakeTensorMode() as mode:
        hidden = torch.zeros(tokens, h, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.zeros(vocab, h, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.int64)
    with mode, Storages() as seen:
        FusedLinear.apply(hidden, weight, None, targets, tokens - 1, AMPERE)
    tile, accumulator = 4096 * 16384 * 4, 4096 * h * 4
    assert seen.sizes.count(tile) == 1
    assert seen.sizes.count(accumulator) == 1
    assert max(nbytes for nbytes in seen.sizes if nbytes not in (tile, 2 * vocab * h)) == accumulator


@pytest.mark.parametrize("head_trains", [False, True])
def test_cut_cross_entropy_holds_no_logits(head_trains: bool) -> None:
    """A gradient of each operand, and an order of the vocabulary with what sorts it: nothing of tokens x vocabulary."""
    with FakeTensorMode():
        hidden, weight, labels = tensors(head_trains=head_trains)
    with hidden.fake_mode, Storages() as seen:
        CutCrossEntropy.apply(hidden, weight, None, labels.view(1, n), n - 1, False).backward()
    of_vocabulary = {8 * v: 2, 4 * v: 3, 12 * v: 1}  # indices before and after; average, sorted, and the order; the sort
    expected = Counter(of_vocabulary) + Counter({2 * n * h: 1, 2 * v * h: int(head_trains), 16 * (n - 1): 1})
    assert Counter(nbytes for nbytes in seen.sizes if nbytes > 8 * n) == expected


@pytest.mark.parametrize(
    ("scored", "hidden", "vocab", "rows"),
    [(2047, 4096, 128256, 512), (8191, 4096, 32000, 2048), (100, 2048, 151936, 100)],
)
def test_rows_of_an_unsloth_chunk(scored: int, hidden: int, vocab: int, rows: int) -> None:
    """512 × 151,936 / 128,256 = 606 → 512; 8191 × 4096 / 32,000 = 1048, but 2430 → 2048 at least; never more than there are."""
    assert chunk_rows(scored=scored, hidden_size=hidden, vocab_size=vocab, itemsize=4) == rows


@pytest.mark.parametrize("trainer", ["plain", "transformers"])
@pytest.mark.parametrize("loss", ["trl-chunked", "liger", "unsloth", "cut-cross-entropy"])
def test_every_loss_runs_in_every_trainer_below_the_full_one(trainer: str, loss: str) -> None:
    options: dict[str, Any] = {"trainer": trainer, "seq_len": 4200, "gradient_checkpointing": True}
    config = llama(1, vocab_size=40_000)
    parts = traced(config, lora(["q_proj"]), loss=loss, **options)
    full = traced(config, lora(["q_proj"]), **options)
    assert parts.by_category().get("logits", 0) < full.by_category()["logits"] / 2
    assert not parts.unknown_ops
    assert max(parts.peak_by_phase.values()) < max(full.peak_by_phase.values())


def test_tiles_count_as_logits() -> None:
    trace = traced(llama(1, vocab_size=40_000), lora(["q_proj"]), trainer="trl", seq_len=64)
    assert trace.by_category("backward")["logits"] == 63 * 32768 * 2  # one label fewer than tokens
    liger = traced(llama(1, vocab_size=40_000), lora(["q_proj"]), trainer="plain", loss="liger", seq_len=1024)
    assert (8, 40_000) in [m.storage.shape for m in liger.log if m.storage.category == "logits"]  # ⌈1024 / ⌈v / h⌉⌉ = 7 → 8


def test_an_estimate_says_whose_loss_it_is() -> None:
    estimate = peftplan.estimate(llama(1), method="lora", engine="trace", trainer="trl", seq_len=64)
    assert estimate.to_dict()["assumptions"]["loss_source"].startswith("trl 1.16")
    assert "loss_source" not in traced(llama(1), lora(["q_proj"]), trainer="plain", seq_len=64).facts


def test_a_head_that_trains_gets_an_fp32_gradient_of_trl_in_passing() -> None:
    config = lora(["q_proj"], modules_to_save=["lm_head"])
    trace = traced(llama(1), config, trainer="trl", seq_len=64)
    storages = [m.storage for m in trace.log if m.kind == "alloc" and m.phase == "backward" and m.storage.shape == (1000, HIDDEN)]
    assert [s.dtype for s in storages].count("fp32") >= 1


def test_adapters_on_the_head_are_refused_where_the_loss_reads_its_weight() -> None:
    with pytest.raises(RefusedError, match=r"reads lm_head\.weight itself"):
        traced(llama(1), lora(["lm_head"]), trainer="trl", seq_len=8)


def test_liger_leaves_unknown_models_to_the_full_loss_and_so_does_not_claim_them() -> None:
    opt = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 100}
    with pytest.raises(RefusedError, match="patches no gpt2 models"):
        traced(opt, lora(["c_attn"]), trainer="plain", loss="liger", seq_len=8)

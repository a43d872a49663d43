"""Cut cross entropy by formula: against the trace, whose kernels are written apart, where the loss is much of the step."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftplan import estimate
from peftplan.dtypes import ITEMSIZE
from peftplan.memory.cut_loss import _cross_entropy, _scored
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter
from peftplan.trace.cuda.cut import CutCrossEntropy
from peftplan.units import ceil_div
from tests.memory.engines import LLAMA, by_phase
from tests.trace.storages import SCALARS, Storages
from tools.rehearsed_axolotl import options
from tools.rehearsed_jobs import read

SCALED = read(Path(__file__).parents[1] / "rehearse" / "axolotl_scaled.jsonl")

SMALL: dict[str, Any] = {
    **LLAMA, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
WIDE = {**SMALL, "vocab_size": 256_000, "tie_word_embeddings": True}
"""A number of each entry of the vocabulary takes more than what is kept of the tokens."""
LONG = {**SMALL, "vocab_size": 1024, "max_position_embeddings": 2**15}
CAPPED = {
    **SMALL, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 32, "query_pre_attn_scalar": 32,
    "final_logit_softcapping": 30.0, "vocab_size": 1024,
}  # fmt: skip
OFF = {"gradient_checkpointing": False}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (WIDE, {"method": "full", "seq_len": 32, **OFF}),
        (WIDE, {"method": "lora", "seq_len": 32}),
        (WIDE, {"method": "full", "seq_len": 32, "trainer": "plain", "keep_outputs": False}),
        (LONG, {"method": "lora", "target_modules": ["q_proj"], "batch_size": 1, "seq_len": 2**15}),
        (LONG, {"method": "lora", "modules_to_save": ["lm_head"], "seq_len": 4000}),
        (CAPPED, {"method": "lora", "seq_len": 8000}),
        (CAPPED, {"method": "full", "seq_len": 8000}),
    ],
)
def test_both_engines_agree(model: dict[str, Any], options: dict[str, Any]) -> None:
    """Within a few numbers, and the positions of a batch, that only the trace has."""
    job: dict[str, Any] = {"batch_size": 2, "loss": "cut-cross-entropy", **options}
    by_formula, traced = (by_phase(estimate(model, engine=engine, **job)) for engine in ("analytic", "trace"))
    within = 1024 + 8 * (job["seq_len"] if job["seq_len"] > 32 and job["batch_size"] > 1 else 0)
    assert by_formula == {phase: pytest.approx(size, abs=within) for phase, size in traced.items()}


def taken(f: Tape, n: int) -> tuple[list[int], int, int]:
    """Of a tape's storages the sizes beyond single numbers in order, the most bytes alive, and those alive at its end."""
    count = {"n": n, "n/128": ceil_div(n, 128)}
    sizes = [
        ITEMSIZE[dtype] * prod(count[d] if isinstance(d, str) else int(d) for d in dims)
        for dims, dtype in zip(f.dims, f.dtypes, strict=True)
    ]
    alive = list(accumulate(sizes[number] if number > 0 else -sizes[-number] for number in f.log))
    return [size for size in sizes[1:] if size > SCALARS], max(alive), alive[-1]


def test_scored_labels_take_what_torch_takes() -> None:
    """`_build_flat_valids` until it has the places as int32, by torch; then one int64 of each, which is kept."""
    n, f = 1000, Tape()
    labels = torch.ones(2, 501, dtype=torch.int64)[..., 1:]
    with Storages() as seen:
        places = (labels != -100).nonzero().to(torch.int32)
    kept = _scored(f)
    sizes, most, last = taken(f, n)
    assert sizes == [*seen.sizes, 8 * n] == [n, 16 * n, 8 * n, 8 * n]
    assert (most, last) == (seen.peak, 8 * n) == (24 * n, 8 * n)
    assert (places.shape, kept.dims) == ((n, 2), ("n",))


@pytest.mark.parametrize(("n", "v"), [(1000, 300), (100, 3000)])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("capped", [False, True])
def test_each_tensor_is_the_traces(n: int, v: int, *, head_trains: bool, has_bias: bool, capped: bool) -> None:
    """Forward and backward of the loss alone, where it is the peak: every storage, and the most bytes alive."""
    h, f = 64, Tape()
    with FakeTensorMode():
        hidden, weight = (torch.zeros(rows, h, dtype=torch.bfloat16) for rows in (n, v))
        bias = torch.zeros(v, dtype=torch.bfloat16) if has_bias else None
        labels = torch.zeros(1, n + 1, dtype=torch.int64)
    for tensor, trains in ((hidden, True), (weight, head_trains), (bias, head_trains)):
        if tensor is not None:
            tensor.requires_grad_(trains)
    with hidden.fake_mode, Storages() as seen:  # type: ignore[attr-defined]
        CutCrossEntropy.apply(hidden, weight, bias, labels, n, capped).backward()
    x, head = Parameter("x", (n, h), "bf16", trainable=True), Parameter("head", (v, h), "bf16", trainable=head_trains)
    beside = Parameter("bias", (v,), "bf16", trainable=head_trains) if has_bias else None
    ops_of_logits = ("softcap",) if capped else ()
    model: Any = SimpleNamespace(tape=f, running=SimpleNamespace(tunes=False), arch=SimpleNamespace(logits_ops=ops_of_logits))
    f.backward(_cross_entropy(model, x, head, beside, _scored(f)))  # type: ignore[arg-type]
    sizes, most, _ = taken(f, n)
    assert Counter(sizes) == Counter(seen.sizes)
    assert most == pytest.approx(seen.peak, abs=SCALARS)


@pytest.mark.parametrize("row", SCALED, ids=[row["values"]["base_model"] for row in SCALED])
def test_hidden_states_of_granite_are_divided_in_place_of_its_logits(row: dict[str, Any]) -> None:
    """Rehearsed with axolotl: each phase within 0.04 %, reserved bytes equal."""
    peaks = estimate(**options(row)).peaks
    assert peaks is not None
    assert peaks.reserved == row["reserved"]
    assert peaks.allocated == pytest.approx(row["allocated"], rel=1e-4)
    assert peaks.by_phase == pytest.approx(row["by_phase"], rel=4e-4)

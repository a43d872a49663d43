"""What to change when a job does not fit: each change, applied, takes what the advice says and gets its verdict."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.planning.advice import FITS
from peftplan.report import advice as report
from tests.cli.run import run
from tests.memory.engines import shallow
from tests.planning.tiny import CONFIG

MODEL = {**CONFIG, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "vocab_size": 32_000}
JOBS: tuple[dict[str, Any], ...] = (
    {"method": "full", "batch_size": 8, "seq_len": 1024, "gpu": "2GiB", "context": 0},
    {
        "method": "lora",
        "batch_size": 6,
        "seq_len": 2048,
        "trainer": "plain",
        "attn_implementation": "eager",
        "gpu": "3GiB",
        "context": 0,
    },
    {"method": "dora", "batch_size": 2, "seq_len": 1024, "optim": "adamw_torch", "gpu": "1GiB", "context": 0},
    {"method": "qlora", "double_quant": False, "batch_size": 2, "seq_len": 1000, "gpu": "1GiB", "context": 0},
)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["method"])
def test_each_change_does_what_it_says(job: dict[str, Any]) -> None:
    """The first changes fit, if any do; `estimate` with their options gives the same peak and verdict."""
    found = estimate(MODEL, **job).advice[job["gpu"]]
    assert [a.verdict in FITS for a in found] == sorted((a.verdict in FITS for a in found), reverse=True) or len(
        found[-1].options
    ) > 1
    for change in found:
        changed = estimate(MODEL, **{**job, **change.options})
        (on_card,) = changed.gpus
        assert changed.peaks is not None
        assert (changed.peaks.allocated, on_card.verdict) == (change.peak_allocated, change.verdict)
        assert change.saving_bytes > 0


def test_trls_loss_comes_with_its_trainer() -> None:
    """No option of Trainer computes the loss in chunks: SFTTrainer does, which takes causal language models only."""
    changes = [a.options for a in estimate(MODEL, **JOBS[0]).advice["2GiB"]]
    assert {"trainer": "trl", "loss": "trl-chunked"} in changes
    other = estimate("t5-small", method="full", batch_size=64, gpu="1GiB", context=0).advice["1GiB"]
    assert not any("trainer" in a.options for a in other)


def test_a_traced_job_is_advised_by_formulas() -> None:
    pytest.importorskip("peft")
    job: dict[str, Any] = {"method": "full", "batch_size": 4, "seq_len": 512, "gpu": "1GiB", "context": 0}
    traced, analytic = (estimate(MODEL, engine=engine, **job) for engine in ("trace", "analytic"))  # type: ignore[arg-type]
    assert traced.advice == analytic.advice
    assert report.title("1GiB", traced.engine) == "change, for 1GiB (by formulas)"
    assert [card["advice_engine"] for card in traced.to_dict()["gpus"]] == ["analytic"]


def test_a_traced_job_without_formulas_has_no_advice() -> None:
    pytest.importorskip("peft")
    found = estimate(shallow("mamba-130m", 1), method="full", engine="trace", seq_len=8, gpu="0.1GiB")
    assert (found.gpus[0].verdict, found.advice) == ("does_not_fit", {"0.1GiB": ()})
    assert found.to_dict()["gpus"][0]["advice_engine"] is None


@pytest.mark.parametrize("fmt", ["table", "markdown"])
def test_no_advice_is_said(fmt: str) -> None:
    """Nothing that the advice knows makes plain gradient descent on BERT's biases smaller."""
    job = ("--method", "bitfit", "--optim", "sgd", "--adapter-dtype", "bf16", "--seq-len", "128", "--gpu", "0.1GiB")
    said = run("estimate", "bert-base-cased", *job, "--format", fmt)
    assert (said.code, "0.1GiB: the formulas know no change that helps" in said.out) == (0, True)

"""Jobs that do not fit: each change that is advised is applied, and the job is estimated again."""

from __future__ import annotations

import random
from typing import Any

import pytest

import peftplan
from peftplan.errors import PeftplanError
from peftplan.results.advice import FITS, Advice, Advised
from peftplan.results.estimate import Estimate

MODELS = ("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "gemma-2-2b", "qwen3-4b", "llama-3.1-8b")
METHODS = ("full", "lora", "lora", "qlora", "dora", "ia3", "oft")
TRAINERS = ("transformers", "transformers", "trl", "plain", "axolotl", "llamafactory", "trl-kto")
CARDS = ("t4", "rtx-2060", "rtx-3060", "rtx-3070", "6GiB", "10GiB", "l4")
STRATEGIES = ("ddp", "fsdp2", "zero2")
DRAWN = range(30)


def drawn(number: int) -> tuple[str, dict[str, Any]]:
    """A job of a seed; some are refused."""
    r = random.Random(f"advice {number}")
    job: dict[str, Any] = {"method": r.choice(METHODS), "trainer": r.choice(TRAINERS), "gpu": r.choice(CARDS)}
    job |= {"batch_size": r.choice((1, 2, 3, 6, 8)), "seq_len": r.choice((512, 1000, 2048, 4096))}
    if r.random() < 0.3:
        job["gradient_checkpointing"] = False
    if r.random() < 0.2:
        job["dtype"] = "fp32"
    if r.random() < 0.3:
        job |= {"strategy": r.choice(STRATEGIES), "gpu": f"{r.choice((2, 4))}x{job['gpu']}"}
    return r.choice(MODELS), job


def applied(model: str, job: dict[str, Any], options: dict[str, object]) -> Estimate:
    """The job with these options; a number of GPUs stands before the card."""
    gpu = str(job["gpu"])
    if "gpus" in options:
        gpu = f"{options['gpus']}x{gpu.partition('x')[2] if gpu[0].isdigit() and 'x' in gpu else gpu}"
    return peftplan.estimate(model, **{**job, **{name: value for name, value in options.items() if name != "gpus"}, "gpu": gpu})


def advised(model: str, job: dict[str, Any]) -> Advised:
    (card,) = peftplan.advice(peftplan.estimate(model, **job)).values()
    return card


@pytest.mark.parametrize("number", DRAWN)
def test_what_is_advised_is_what_the_job_then_needs(number: int) -> None:
    model, job = drawn(number)
    try:
        result = peftplan.estimate(model, **job)
    except PeftplanError:
        return
    for card in peftplan.advice(result).values():
        for change in card.rows():
            holds(change, applied(model, job, change.options))


def holds(change: Advice, result: Estimate) -> None:
    (card,) = result.gpus
    assert result.peaks is not None
    assert card.verdict == change.verdict or (change.verdict is None and card.verdict != "does_not_run"), change
    assert change.saving_bytes > 0, change
    if change.peak_allocated is not None:
        assert result.peaks.allocated == change.peak_allocated
    assert change.headroom_bytes in (None, card.headroom_bytes)


@pytest.mark.parametrize(
    ("model", "job", "expected"),
    [
        # no change helped on one card, "since the weights alone take 24.24 GiB"
        (
            "llama-2-13b",
            {"method": "ia3", "gpu": "v100-16gb", "batch_size": 8, "seq_len": 1000},
            {"quant": "nf4", "batch_size": 1, "gradient_accumulation_steps": 8},
        ),
        # QLoRA was
        ("llama-2-7b", {"method": "lora", "dtype": "fp32", "gpu": "rtx-4090"}, {"dtype": "bf16"}),
        # the twelve cheapest combinations do not fit, and none was advised
        (
            "llama-3.2-3b",
            {"method": "full", "trainer": "plain", "dtype": "fp16", "batch_size": 3, "seq_len": 8192, "gpu": "rtx-3070"},
            {"gradient_checkpointing": True, "batch_size": 1, "gradient_accumulation_steps": 3, "loss": "liger"}
            | {"method": "qlora", "kbit_prepare": False},
        ),
        # 13.4 GiB of inputs that int8 keeps were left
        (
            "llama-3.1-8b",
            {"method": "lora", "quant": "int8", "batch_size": 2, "seq_len": 4096, "use_reentrant": False, "gpu": "rtx-4090"},
            {"use_reentrant": True, "loss": "liger"},
        ),
    ],
    ids=["quantized base", "dtype", "as many as it takes", "checkpoints of int8"],
)
def test_what_a_person_tries_first_is_advised_first(model: str, job: dict[str, Any], expected: dict[str, object]) -> None:
    first, *others = advised(model, job).changes
    assert (first.options, first.verdict) == (expected, "fits")
    assert applied(model, job, first.options).gpus[0].verdict == "fits"
    assert first.options not in [other.options for other in others]


def test_a_method_that_fits_comes_before_one_that_saves_more() -> None:
    """Beside what fits in full, `--method qlora --no-kbit-prepare` was named, which saves most."""
    job = {"method": "full", "gpu": "2xrtx-4090"}
    _, second, *_ = advised("llama-3.1-8b", job).changes
    assert (second.options, second.verdict) == ({"method": "lora"}, "fits")


def test_no_micro_batch_is_advised_that_the_trainer_refuses() -> None:
    """KTO compares completions with others of the batch; one row was advised."""
    job = {"method": "ia3", "trainer": "trl-kto", "gpu": "v100-16gb", "batch_size": 16, "gradient_accumulation_steps": 2}
    changes = advised("mistral-7b-v0.1", job).changes
    assert {change.options["batch_size"] for change in changes if "batch_size" in change.options} <= {2, 4, 8}


def test_of_a_lower_bound_it_is_said_that_it_may_fit() -> None:
    """Evaluations of GRPOTrainer are not counted: no change was said to help, and that the job fits an A100."""
    job = {"method": "full", "trainer": "trl-grpo", "batch_size": 16, "gradient_checkpointing": False, "eval_batch_size": 16}
    result = peftplan.estimate("llama-3.2-1b", gpu="6GiB", **job)
    assert result.bound == "at_least"
    card = peftplan.advice(result)["6GiB"]
    assert card.helps
    assert card.changes[0].verdict is None
    assert not any(change.verdict in FITS for change in card.changes)


def test_nothing_is_named_that_does_more_than_what_fits() -> None:
    """`--method qdora` fits; `--method qdora --no-kbit-prepare` was named behind it."""
    first, *others = advised("mistral-7b-v0.1", {"method": "dora", "batch_size": 3, "seq_len": 1024, "gpu": "t4"}).changes
    assert (first.options, first.verdict) == ({"method": "qdora"}, "fits")
    assert not any(first.options.items() < other.options.items() for other in others)


def test_a_user_of_a_tool_is_not_sent_to_another_tools_trainer() -> None:
    """No config of axolotl names SFTTrainer's chunked loss, which was advised."""
    job = {"method": "lora", "trainer": "axolotl", "gradient_checkpointing": False, "seq_len": 4096, "gpu": "rtx-3060"}
    assert not any("trainer" in change.options for change in advised("qwen2.5-0.5b", job).changes)

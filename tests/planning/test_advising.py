"""`advice(estimate)` and `explain(estimate)`: functions above the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import peftplan
from peftplan.job.prepare import prepare
from peftplan.planning import advice as searching
from peftplan.planning import attempts
from peftplan.planning.changes import Change, Sizes, more_gpus
from peftplan.planning.trials import Trials
from peftplan.report.advice import command_line
from peftplan.results.advice import Advice
from tests.planning.tiny import CONFIG

UNFIT: dict[str, Any] = {"method": "full", "batch_size": 8, "context": 0}


def test_advice_has_an_entry_per_card_that_the_job_does_not_fit() -> None:
    estimate = peftplan.estimate(CONFIG, gpu=["0.04GiB", "0.05GiB", "24GiB"], **UNFIT)
    assert [(verdict.gpu, verdict.verdict) for verdict in estimate.gpus] == [
        ("0.04GiB", "does_not_fit"),
        ("0.05GiB", "does_not_fit"),
        ("24GiB", "fits"),
    ]
    advice = peftplan.advice(estimate)
    assert [*advice] == ["0.05GiB", "0.04GiB"]  # the nearest first
    assert peftplan.advice(estimate, gpu="0.04GiB") == {"0.04GiB": advice["0.04GiB"]}
    assert peftplan.advice(estimate, gpu="24GiB") == {}


def test_its_first_change_makes_the_job_fit() -> None:
    """The witness is the job with these options."""
    first = peftplan.advice(peftplan.estimate(CONFIG, gpu="0.06GiB", **UNFIT))["0.06GiB"].changes[0]
    changed = peftplan.estimate(CONFIG, gpu="0.06GiB", **{**UNFIT, **first.options})
    assert changed.peaks is not None
    assert first.verdict == "fits"
    assert (changed.gpus[0].verdict, changed.peaks.allocated) == (first.verdict, first.peak_allocated)


def test_the_json_holds_it() -> None:
    estimate = peftplan.estimate(CONFIG, gpu="0.05GiB", **UNFIT)
    (card,) = estimate.to_dict()["gpus"]
    assert card["advice"] == [change.to_dict() for change in peftplan.advice(estimate)["0.05GiB"].changes]


def test_a_card_of_another_estimate_is_an_error() -> None:
    estimate = peftplan.estimate(CONFIG, gpu=["0.05GiB", "t4"], **UNFIT)
    with pytest.raises(peftplan.UnknownNameError, match=r"gpu: 'h100' is not valid.*accepted: 0.05GiB, t4"):
        peftplan.advice(estimate, gpu="h100")


def test_nothing_is_advised_without_a_job_or_a_peak() -> None:
    estimate = peftplan.estimate(CONFIG, gpu="0.05GiB", **UNFIT)
    assert peftplan.advice(replace(estimate, origin=None)) == replace(estimate, origin=None).advice == {}
    assert peftplan.advice(replace(estimate, peaks=None)) == {}


def test_ddp_fits_by_shards_on_the_host() -> None:
    """Full fine-tuning of 8B on two RTX 4090: DDP needs all of it on each card; FSDP2 with its shards on the host fits."""
    result = peftplan.estimate("llama-3.1-8b", method="full", gpu="2xrtx-4090")
    assert [card.verdict for card in result.gpus] == ["does_not_fit"]
    fitting = [change.options for change in peftplan.advice(result)["rtx-4090"].changes if change.verdict == "fits"]
    assert {"strategy": "fsdp2", "offload_params": "cpu"} in fitting


def test_packed_weights_are_sharded_where_they_are_stored_as_floats() -> None:
    """FSDP2 keeps all packed weights on each rank if they are integers: the advice stores them in bf16, packed on the host."""
    job = {"method": "qlora", "seq_len": 4096, "strategy": "fsdp2", "gpu": "8x7GiB", "kbit_prepare": False, "trainer": "trl"}
    first = peftplan.advice(peftplan.estimate("llama-3.1-8b", **job))["7GiB"].changes[0]
    stored = {"quant_storage": "bf16", "device_map": "cpu"}
    assert first.options == stored
    assert peftplan.estimate("llama-3.1-8b", **job, **stored).gpus[0].verdict == first.verdict == "fits"


def test_the_fewest_gpus_that_fit_are_named() -> None:
    """Llama 3.1 8B trains in full on four L4; the advice for two stated only what sixteen would save."""
    changes = peftplan.advice(peftplan.estimate("llama-3.1-8b", method="full", gpu="2xl4", strategy="device-map"))["l4"].changes
    assert {"gpus": 4} in [change.options for change in changes if change.verdict == "fits"]
    number = peftplan.estimate("llama-3.1-8b", method="full", gpu="4xl4", strategy="device-map")
    assert number.gpus[0].verdict == "fits"


def test_no_more_gpus_are_named_than_help() -> None:
    """Beside shorter sequences 64 T4 save no more than 8: the advice named eight nodes."""
    job: dict[str, Any] = {"method": "lora", "strategy": "fsdp2", "gpu": "8xt4"}
    first = peftplan.advice(peftplan.estimate("llama-3.2-3b", **job, seq_len=8192))["t4"].changes[0]
    assert not {"gpus", "nodes"} & first.options.keys()
    assert peftplan.estimate("llama-3.2-3b", **{**job, **first.options}).gpus[0].verdict == first.verdict


@pytest.mark.parametrize(
    ("model", "job", "expected"),
    [
        # micro batches of 4 do not fit; halved sequences were advised
        (
            "llama-2-13b",
            {"seq_len": 8192, "batch_size": 16, "gpu": "8xrtx-5090", "strategy": "fsdp2"},
            {"batch_size": 2, "gradient_accumulation_steps": 8},
        ),
        # Liger's loss and 640 of 131,072 tokens, in micro batches of 4, were advised
        (
            "llama-3.2-1b",
            {"seq_len": 131072, "batch_size": 4, "gpu": "rtx-3070"},
            {"batch_size": 1, "gradient_accumulation_steps": 4, "loss": "liger", "seq_len": 16000},
        ),
        # a paged optimizer was advised beside LoRA, where it saves nothing
        (
            "llama-2-13b",
            {"method": "full", "seq_len": 32768, "batch_size": 4, "gpu": "a100-80gb"},
            {"method": "lora", "batch_size": 1, "gradient_accumulation_steps": 4},
        ),
    ],
    ids=["batch", "rows before sequences", "no change that is not needed"],
)
def test_the_least_change_is_advised(model: str, job: dict[str, Any], expected: dict[str, object]) -> None:
    (changes,) = peftplan.advice(peftplan.estimate(model, **{"method": "lora", **job})).values()
    first = changes.changes[0]
    assert (first.options, first.verdict) == (expected, "fits")
    assert peftplan.estimate(model, **{"method": "lora", **job, **first.options}).gpus[0].verdict == "fits"


def test_a_method_that_nearly_fills_the_card_does_not_hide_one_that_fits() -> None:
    """The tensors of LoRA leave a tenth of a T4, and the allocator holds more beside them."""
    job: dict[str, Any] = {"strategy": "fsdp2", "gpu": "2xt4", "batch_size": 2, "seq_len": 1024}
    changes = peftplan.advice(peftplan.estimate("llama-3.1-8b", method="full", **job))["t4"].changes
    assert ({"method": "qlora"}, "fits") in [(change.options, change.verdict) for change in changes]
    (lora,) = peftplan.estimate("llama-3.1-8b", method="lora", **job).gpus
    assert lora.verdict == "tight"
    assert lora.headroom_bytes is not None
    assert lora.headroom_bytes < 0


@pytest.mark.parametrize(
    ("strategy", "gpus", "nodes", "expected"),
    [
        ("fsdp2", 2, 1, [{"gpus": 4}, {"gpus": 8}, {"gpus": 8, "nodes": 2}]),
        ("zero3", 8, 1, [{"nodes": 2}, {"nodes": 4}, {"nodes": 8}]),
        ("fsdp2", 4, 2, [{"nodes": 4}, {"nodes": 8}, {"nodes": 16}]),
        ("fsdp2", 3, 1, [{"gpus": 6}, {"nodes": 4}, {"gpus": 8, "nodes": 3}]),
        ("device-map", 4, 1, [{"gpus": 8}, {}, {}]),
    ],
)
def test_more_gpus_are_those_of_machines(strategy: str, gpus: int, nodes: int, expected: list[dict[str, object]]) -> None:
    """`--gpus 16` beside `--gpu 8xh100-80gb` is an error, and no machine has sixteen."""
    distributed = prepare("llama-3.1-8b", method="full", strategy=strategy, gpus=gpus, nodes=nodes).distributed
    assert distributed is not None
    assert [more_gpus(distributed, times) for times in (2, 4, 8)] == expected


def test_a_number_of_gpus_is_typed_with_its_card() -> None:
    assert command_line(Advice({"gpus": 4}, 0, 0, None), "l4") == "--gpu 4xl4"


def test_more_than_eight_times_the_gpus_are_tried() -> None:
    """Llama 3.1 70B in full: 16 L40S are too few (85 GiB each), 32 run."""
    job = {"method": "full", "strategy": "fsdp2", "gpu": "2xl40s"}
    changes = peftplan.advice(peftplan.estimate("llama-3.1-70b", **job))["l40s"].changes
    (number,) = (change for change in changes if "nodes" in change.options)
    assert (number.options, number.verdict) == ({"gpus": 8, "nodes": 4}, "tight")
    assert peftplan.estimate("llama-3.1-70b", **job | {"gpu": "8xl40s"}, nodes=4).gpus[0].verdict == "tight"


@pytest.mark.parametrize(("tokens", "tried"), [(256, False), (2048, True)])
def test_losses_are_tried_where_tokens_need_enough(tokens: int, tried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the logits of 256 tokens are worth it (4 × 4 × 256 × 151,936 bytes of 7.6 GiB), but the optimizer's step, which
    holds none, needs more than backward."""
    options: list[dict[str, object]] = []

    def noted(trials: Trials, before: Sizes, of_try: dict[str, object], price: int) -> Change | None:
        options.append(of_try)
        return attempts.tried(trials, before, of_try, price)

    monkeypatch.setattr(searching, "tried", noted)
    job = peftplan.estimate("qwen3-0.6b", method="full", strategy="zero3", gpu="2xrtx-2060", optim="adamw_torch", seq_len=tokens)
    assert peftplan.advice(job)
    assert any("loss" in each for each in options) is tried


def test_micro_batches_whose_rows_alone_do_not_fit_are_not_tried_with_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows take 53 GiB without accumulation, and the cards have 40: no step of two micro batches is run for that."""
    tries: list[dict[str, object]] = []

    def noted(trials: Trials, before: Sizes, of_try: dict[str, object], price: int) -> Change | None:
        tries.append(dict(of_try))
        return attempts.tried(trials, before, of_try, price)

    monkeypatch.setattr(searching, "tried", noted)
    job = {"method": "lora", "strategy": "fsdp2", "batch_size": 32, "seq_len": 4096}
    result = peftplan.estimate("llama-2-13b", gpu="8xa100-40gb", **job)
    peftplan.advice(result)
    assert {"batch_size": 16} in tries
    assert {"batch_size": 16, "gradient_accumulation_steps": 2} not in tries

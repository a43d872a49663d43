"""The regression itself, as CI runs it: every measured run that ships, against what was measured and against the baseline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import median
from unittest.mock import patch

import pytest

import peftplan
from peftplan.accuracy import regression
from peftplan.accuracy.check import Check
from peftplan.accuracy.engines import RUNS, read_cases
from peftplan.accuracy.records import PHASES
from peftplan.analytic import compiled as analytic
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor
from peftplan.units import GIB

T4 = RUNS / "fitcheck_t4.jsonl"


@pytest.fixture(scope="module")
def every() -> Check:
    return regression.run([], engine="analytic")


def report_text(result: Check) -> str:
    """The failures, each with the command that repeats it; shown by pytest where there are some."""
    return "\n".join(failure.text(result.engine) for failure in result.failures)


def test_every_run_estimated(every: Check) -> None:
    assert report_text(every) == ""
    assert len(every.answers) == len(read_cases([]))


def test_the_baseline_holds_every_figure_that_is_stated(every: Check) -> None:
    assert every.new == 0, "peftplan check --update-baseline"


def test_t4_runs_by_phase(every: Check) -> None:
    """At most 2 % in the median and 5 % at worst, in each phase that was measured."""
    runs = [answer for answer in every.answers if answer.case.path == T4]
    assert len(runs) == 91
    for phase in PHASES[1:]:
        drifts = [abs(one.drift) for answer in runs for one in answer.compared if one.figure == phase]
        assert len(drifts) == 77
        assert median(drifts) <= 2.0
        assert max(drifts) <= 5.0


@pytest.mark.parametrize("figure", ["reserved", "device"])
def test_t4_runs_that_load_the_same_each_time(every: Check, figure: str) -> None:
    """Not quantized, or one weight at a time: what torch reserved and what the process held, of 34 runs. 32 are equal to the MiB,
    which is what was printed of ten; two are 2 MiB off."""
    drifts = [
        one.drift
        for answer in every.answers
        if answer.case.path == T4 and answer.record.exact
        for one in answer.compared
        if one.figure == figure
    ]
    assert len(drifts) == 34
    assert max(map(abs, drifts)) <= 0.05


def test_t4_runs_that_ran_out_of_memory(every: Check) -> None:
    """What was allocated, and what was asked for in vain, make the peak; three ran out in the first step, before any states."""
    failed = [answer for answer in every.answers if answer.case.path == T4 and answer.record.outcome == "oom"]
    assert len(failed) == 4
    for answer in failed:
        assert answer.stated.verdict in ("does_not_fit", "tight")
        sizes = re.search(r"allocate ([\d.]+) GiB\..* ([\d.]+) GiB is allocated by PyTorch", answer.record.error or "")
        assert sizes is not None
        result = peftplan.estimate(answer.record.run.model, gpu="t4", **answer.record.run.arguments())
        assert result.peaks is not None
        early = "warm step" in (answer.record.note or "")
        expected = result.peaks.allocated - early * result.static.by_category()["optimizer_states"]
        assert expected / GIB == pytest.approx(sum(map(float, sizes.groups())), abs=0.01)  # each number was rounded to 0.01 GiB


def test_runs_of_an_a6000(every: Check) -> None:
    """LoRA and full fine-tuning, bf16 and autocast, both kernels, with and without checkpointing. Labels are counted apart from
    the equal inputs: 16 KiB. In full fine-tuning of a model with biases the tails of blocks differ by 15 MiB of 22 GiB."""
    runs = [answer for answer in every.answers if answer.case.path.stem == "vramcalc_a6000"]
    assert len(runs) == 13
    assert all(answer.record.exact for answer in runs)
    assert max(abs(one.drift) for answer in runs for one in answer.compared) <= 0.1
    assert median(abs(one.drift) for answer in runs for one in answer.compared) <= 0.001


def test_lora_runs_of_an_a100(every: Check) -> None:
    """transformers 4.43 to 4.48, packed to 4,096 tokens: LoRA, full fine-tuning, QLoRA without kbit preparation. The loss of
    that time copied the logits."""
    drifts = [
        abs(one.drift)
        for answer in every.answers
        if answer.case.path.stem == "fms_acceleration" and not answer.record.run.options["kbit_prepare"]
        if answer.record.circumstances.versions.get("transformers", "4.39") >= "4.43"
        for one in answer.compared
        if one.figure == "allocated"
    ]
    assert len(drifts) > 20
    assert max(drifts) <= 0.05


def test_ranks_of_two_a100(every: Check) -> None:
    """FSDP1 with transformers 4.39 to 4.48. The formula spreads Mixtral's tokens evenly over the experts; full fine-tuning of
    SantaCoder has tails of blocks that differ among equal jobs by 3.5 MB."""
    drifts = [
        (abs(one.drift), any(name in answer.record.run.model_name for name in ("Mixtral", "santacoder")))
        for answer in every.answers
        if answer.case.path.stem == "fms_fsdp1" and answer.record.circumstances.versions
        for one in answer.compared
    ]
    assert len(drifts) == 88
    assert max(drift for drift, wide in drifts if wide) <= 0.2
    assert max(drift for drift, wide in drifts if not wide) <= 0.01


OF_FSDP_QLORA = {"allocated": (-1.4, 1.9), "reserved": (-10.8, 25)}
"""The smallest and the largest drift, in percent: its pages leave much open. Reserved bytes of FSDP1 depend on how late a GPU is
(`record_stream`), and they cover loading; its own code loads the first rank on the host."""


def test_ranks_of_fsdp_qlora(every: Check) -> None:
    """What it printed of its own FSDP1 loop on two RTX 3090 or 4090. Open: 2 % of allocated bytes, up to 25 % of reserved ones
    (70B with shards on the host)."""
    figures = [one for answer in every.answers if answer.case.path.stem == "fsdp_qlora" for one in answer.overall]
    assert len(figures) == 14  # reserved bytes of a frozen base on the host are not stated
    for one in figures:
        least, most = OF_FSDP_QLORA[one.figure]
        assert least < one.drift < most


def test_every_run_gets_a_card_that_it_ran_on(every: Check) -> None:
    assert [answer.record.id for answer in every.answers if "own" in answer.wrong_verdicts] == []


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    analytic.COMPILED.clear()
    yield
    analytic.COMPILED.clear()


@pytest.mark.usefixtures("nothing_compiled")
def test_a_wrong_formula_makes_it_fail() -> None:
    """Log probabilities written over the logits they are of: one tokens × vocabulary tensor in fp32 too few."""
    right = ops.keeps_output

    def in_place(f: Tape, x: Tensor, name: str) -> Tensor:
        return x if name == "log_softmax" else right(f, x, name)

    with patch.object(ops, "keeps_output", in_place):
        result = regression.run([T4], engine="analytic")
    kinds = {(failure.case.record.id, failure.kind) for failure in result.failures}
    assert ("pk01156", "tolerance") in kinds
    assert ("pk01156", "baseline") in kinds

"""What to change when a job does not fit: each change, applied, takes what the advice says and gets its verdict."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from peftplan import estimate
from peftplan.errors import InputError
from peftplan.job.job import Job
from peftplan.job.prepare import prepare
from peftplan.planning import advice, fewest_gpus
from peftplan.planning.advice import advise
from peftplan.planning.changes import CLOSE, MORE_GPUS, OTHER, SAME, SEQUENCE_STEP, Change, combinations, single_changes
from peftplan.planning.trials import Trials
from peftplan.report import advice as report
from peftplan.results.advice import FITS, Advised
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


@pytest.mark.parametrize("search", ["best", "all"])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["method"])
def test_each_change_does_what_it_says(job: dict[str, Any], search: Any) -> None:
    """`estimate` with the options of a change that was replayed gives the same peak, verdict and headroom; the first fits."""
    changes = estimate(MODEL, advice=search, **job).advice[job["gpu"]].changes
    replayed = [change for change in changes if change.peak_allocated is not None]
    assert replayed == list(changes[: len(replayed)])
    assert replayed[0].verdict in FITS
    for change in replayed:
        changed = estimate(MODEL, **{**job, **change.options})
        (on_card,) = changed.gpus
        stated = (changed.to_dict()["memory"]["peak_allocated"], on_card.verdict, on_card.headroom_bytes)
        assert stated == (change.peak_allocated, change.verdict, change.headroom_bytes)


def test_all_finds_what_best_finds_and_more() -> None:
    best, everything = (estimate(MODEL, advice=search, **JOBS[0]).advice["2GiB"] for search in ("best", "all"))  # type: ignore[arg-type]
    assert best.changes[0] in everything.changes
    assert sum(change.verdict in FITS for change in everything.changes) > 1


Options = dict[str, Any]


class Trying:
    """A job of 100 bytes in backward and 60 in forward on a card of `room`, whose options save what is written here.

    A replayed job holds `besides` more bytes than its tensors.
    """

    def __init__(self, changes: dict[str, tuple[int, int]], *, room: int, weights: int = 10, besides: int = 0) -> None:
        self.changes, self.room, self.besides, self.weights = changes, room, besides, weights
        self.several: list[Options] = []
        self.sized: list[Options] = []
        self.replays: list[Options] = []

    def sizes(self, **options: Any) -> dict[str, int]:
        self.sized.append(options)
        saved = [self.changes[name][1] for name in options]
        return {"load": 10, "forward": 60 - sum(saved) // 2, "backward": 100 - sum(saved), "step": 20}

    def judged(self, **options: Any) -> Any:
        self.replays.append(options)
        peak = max(self.sizes(**options).values()) + self.besides
        verdict = SimpleNamespace(verdict="fits" if peak <= self.room else "does_not_fit", headroom_bytes=self.room - peak)
        return SimpleNamespace(gpus=(verdict,), peaks=SimpleNamespace(allocated=peak))

    def advise(self, monkeypatch: pytest.MonkeyPatch, *, everything: bool = False) -> Advised:
        possible = [({name: True}, price) for name, (price, _) in self.changes.items() if name != "gpus"]
        monkeypatch.setattr(advice, "single_changes", lambda job, runs_flash_attention: possible)
        monkeypatch.setattr(fewest_gpus, "several_gpus", lambda job: self.several)
        trials = Trials(
            room=self.room,
            roomy=self.room,
            reserved=100 + self.besides,
            states=0,
            runs_flash_attention=False,
            weights=lambda **options: self.weights,
            lasting=lambda **options: self.weights,
            sizes=self.sizes,
            judged=self.judged,
            smallest_card=lambda: "a100-80gb",
        )
        job = SimpleNamespace(setup=SimpleNamespace(batch_size=1, seq_len=128), distributed=None)
        return advise(cast("Job", job), trials, everything=everything)


def names(advised: Advised) -> list[str]:
    """The options of each change."""
    return ["+".join(change.options) for change in advised.changes]


def test_the_cheapest_that_suffices_comes_first_then_what_saves_most(monkeypatch: pytest.MonkeyPatch) -> None:
    trying = Trying({"big": (OTHER, 40), "cheap": (SAME, 22), "close": (CLOSE, 30), "little": (SAME, 3)}, room=80)
    assert names(trying.advise(monkeypatch)) == ["cheap", "big", "close", "little"]
    assert trying.replays == [{"cheap": True}, {"big": True}, {"close": True}]


def test_a_cheap_combination_comes_before_an_expensive_change(monkeypatch: pytest.MonkeyPatch) -> None:
    trying = Trying({"big": (OTHER, 40), "a": (SAME, 12), "b": (SAME, 9)}, room=80)
    advised = trying.advise(monkeypatch)
    assert names(advised) == ["a+b", "big", "a", "b"]
    assert advised.helps
    assert advised.smallest_card is None


def test_no_change_is_combined_that_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    trying = Trying({"a": (SAME, 12), "b": (SAME, 9), "c": (SAME, 8), "d": (SAME, 1)}, room=80)
    assert names(trying.advise(monkeypatch))[0] == "a+b"
    everything = names(trying.advise(monkeypatch, everything=True))
    assert [name for name in everything if "+" in name] == ["a+b", "a+c"]  # b + c save 17, of the 20 that are missing


def test_savings_below_two_percent_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    trying = Trying({"two": (SAME, 2), "one": (SAME, 1), "much": (SAME, 10)}, room=50)
    assert names(trying.advise(monkeypatch)) == ["much", "two"]


def test_a_small_saving_that_changes_the_verdict_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(Trying({"one": (SAME, 1)}, room=99).advise(monkeypatch)) == ["one"]


def test_at_most_twelve_combinations_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of twenty changes would do by its sum, and none does once it is evaluated: savings do not add up. Then one
    after another is added, unless all pairs were tried."""

    class Shared(Trying):
        def sizes(self, **options: Any) -> dict[str, int]:
            alone = {name: self.changes[name] for name in list(options)[:1]}
            self.sized.append(options)
            return super().sizes(**alone) if len(options) < 2 else super().sizes()

    changes = {f"c{n}": (SAME, 15) for n in range(20)}
    trying = Shared(changes, room=75)
    advised = trying.advise(monkeypatch)
    assert len([options for options in trying.sized if len(options) > 1]) == 12 + 19
    assert (advised.helps, advised.smallest_card) == (False, "a100-80gb")
    trying = Shared(changes, room=75)
    trying.advise(monkeypatch, everything=True)
    assert len([options for options in trying.sized if len(options) > 1]) == 20 * 19 // 2


def test_only_combinations_that_could_close_the_gap_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    trying = Trying({"a": (SAME, 5), "b": (SAME, 6), "c": (SAME, 7)}, room=75)
    assert names(trying.advise(monkeypatch)) == ["c", "b", "a"]
    assert [options for options in trying.sized if len(options) > 1] == []
    assert trying.replays == []


def test_what_the_allocator_holds_besides_is_left_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cheap` leaves 79 of 80 bytes, with 8 besides that will not do: it is tried after the others."""
    trying = Trying({"cheap": (SAME, 21), "close": (CLOSE, 30)}, room=80, besides=8)
    assert names(trying.advise(monkeypatch)) == ["close", "cheap"]
    assert trying.replays == [{"close": True}, {"cheap": True}]


def test_where_the_tensors_fit_already_changes_that_save_too_little_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 bytes of tensors and 15 besides on a card of 105: cheap changes of 1 byte do not help."""
    little = {f"c{n}": (SAME, 1) for n in range(4)}
    trying = Trying({**little, "enough": (OTHER, 40)}, room=105, besides=15)
    assert names(trying.advise(monkeypatch)) == ["enough"]
    assert trying.replays == [{"enough": True}]


def test_few_are_replayed_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    trying = Trying({f"c{n}": (SAME, 21) for n in range(9)}, room=80, besides=50)
    advised = trying.advise(monkeypatch)
    assert (len(trying.replays), advised.helps) == (3 + 1 + 3, False)


def test_what_saves_most_is_replayed_beside_what_suffices_and_others_may_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """`little` leaves 97 of 80 bytes, which is certain to fail."""
    saving = {f"c{n}": (OTHER, 40 - n) for n in range(4)}
    trying = Trying({"cheap": (SAME, 22), **saving, "little": (SAME, 3)}, room=80)
    changes = trying.advise(monkeypatch).changes
    assert [(*change.options, change.verdict) for change in changes] == [
        ("cheap", "fits"), ("c0", "fits"), ("c1", "fits"), ("c2", "fits"), ("c3", None), ("little", "does_not_fit"),
    ]  # fmt: skip
    assert [report.outcome(change) for change in changes[3:]] == ["fits, 0.0 GiB left", "saves 0.0 GiB, may fit", "saves 0.0 GiB"]


def test_a_shorter_sequence_is_one_with_which_the_job_fits() -> None:
    """1,152 tokens leave enough room for their tensors, and 2.1 GiB too little for what the allocator holds beside them."""
    job: dict[str, Any] = {"method": "full", "batch_size": 4, "gpu": "t4"}
    changes = estimate("llama-3.2-1b", seq_len=4096, **job).advice["t4"].changes
    (length,) = (change.options["seq_len"] for change in changes if "seq_len" in change.options)
    assert isinstance(length, int)
    verdicts = [estimate("llama-3.2-1b", seq_len=n, **job).gpus[0].verdict for n in (length, length + SEQUENCE_STEP)]
    assert verdicts == ["tight", "does_not_fit"]


def test_a_change_that_was_replayed_in_vain_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """21 bytes of 100 leave 79 of tensors on a card of 80, but 129 bytes once they are replayed."""
    (change,) = Trying({"only": (SAME, 21)}, room=80, besides=50).advise(monkeypatch).changes
    assert (change.verdict, change.peak_allocated) == ("does_not_fit", None)


def test_a_hopeless_job_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    trying = Trying({"a": (SAME, 50)}, room=40, weights=41)
    assert trying.advise(monkeypatch) == Advised(weights_alone=41, smallest_card="a100-80gb")
    assert trying.sized == [{}]


def test_changes_exclude_each_other() -> None:
    before = {"step": 100}
    trl, no_kbit, qlora, lora = (
        Change(options, SAME, {"step": 30})
        for options in ({"trainer": "trl"}, {"kbit_prepare": False}, {"method": "qlora"}, {"method": "lora"})
    )
    proposed = [change.options for change in combinations([trl, no_kbit, qlora, lora], before, 50)]
    assert {"trainer": "trl", "kbit_prepare": False} not in proposed
    assert {"trainer": "trl", "method": "qlora"} in proposed
    assert len(proposed) == 4


def test_several_gpus_where_one_needs_another_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest that fit, of those whose ranks can hold the weights."""
    trying = Trying({"method": (OTHER, 40), "gpus": (MORE_GPUS, 30)}, room=80, weights=100)
    trying.several = [{"gpus": 1}, {"gpus": 2}]
    monkeypatch.setattr(advice, "_least_weights", lambda trials, possible: 10)
    advised = trying.advise(monkeypatch)
    assert names(advised) == ["method"]
    assert advised.several_gpus is not None
    assert (advised.several_gpus.options, advised.several_gpus.verdict) == ({"gpus": 2}, "fits")
    assert advised.rows(1) == (advised.changes[0], advised.several_gpus)


def test_one_gpu_is_enough_where_the_method_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    trying = Trying({"cheap": (SAME, 40)}, room=80)
    trying.several = [{"gpus": 2}]
    assert trying.advise(monkeypatch).several_gpus is None


def test_a_hopeless_job_on_a_card_names_another_and_several_of_it() -> None:
    """70e9 parameters as nf4 are 32 GiB and more; of the cards of 48 GB none has 5 % left."""
    output = run("estimate", "llama-2-70b", "--method", "qlora", "--r", "16", "--gpu", "rtx-4090", columns=None).out
    assert (
        "\nRTX 4090: no change helps on one card, since the weights alone take 32.85 GiB; the smallest card it fits is" in output
    )
    assert "--gpu 4xrtx-4090 --strategy fsdp2 --quant-storage bf16 --device-map cpu\n" in output


def test_laptops_are_not_counted_together() -> None:
    (advised,) = estimate("llama-2-70b", method="qlora", gpu="rtx-4090-laptop").advice.values()
    assert (advised.helps, advised.several_gpus) == (False, None)


@pytest.mark.parametrize(("model", "method", "gpu"), [("llama-2-70b", "qlora", "rtx-4090"), ("llama-3.1-8b", "full", "rtx-4090")])
def test_several_gpus_are_an_estimate_of_their_own(model: str, method: str, gpu: str) -> None:
    (advised,) = estimate(model, method=method, gpu=gpu).advice.values()
    assert advised.several_gpus is not None
    options: Options = {**advised.several_gpus.options}
    count = options.pop("gpus")
    of_these, of_fewer = (estimate(model, method=method, gpu=f"{number}x{gpu}", **options) for number in (count, count // 2))
    assert of_these.gpus[0].verdict in FITS
    assert of_these.gpus[0].headroom_bytes >= 0
    assert of_these.peaks is not None
    assert of_these.peaks.allocated == advised.several_gpus.peak_allocated
    assert of_fewer.gpus[0].headroom_bytes < 0


def test_the_smallest_card_fits() -> None:
    job: dict[str, Any] = {"method": "qlora", "r": 16}
    (advised,) = estimate("llama-2-70b", gpu="rtx-4090", **job).advice.values()
    others = estimate("llama-2-70b", gpu=[str(advised.smallest_card), "l40s", "rtx-a6000", "a100-40gb"], **job).gpus
    assert [card.verdict == "fits" for card in others] == [True, False, False, False]


def test_flash_attention_is_for_cards_that_run_it() -> None:
    job = prepare("llama-2-7b")
    flash = {"attn_implementation": "flash_attention_2"}
    assert [flash in [options for options, _ in single_changes(job, runs_flash_attention=runs)] for runs in (True, False)] == [
        True,
        False,
    ]
    for card in ("t4", "rtx-4090"):
        options: dict[str, Any] = {"trainer": "plain", "attn_implementation": "eager", "batch_size": 1024, "advice": "all"}
        eager = estimate("bert-base-uncased", gpu=card, **options)
        kernels = [change.options.get("attn_implementation") for change in eager.advice[card].changes]
        assert ("flash_attention_2" in kernels) == (card != "t4")


def test_trls_loss_comes_with_its_trainer() -> None:
    """No option of Trainer computes the loss in chunks: SFTTrainer does, which takes causal language models only."""
    changes = [change.options for change in estimate(MODEL, advice="all", **JOBS[0]).advice["2GiB"].changes]
    assert {"trainer": "trl", "loss": "trl-chunked"} in changes
    other = estimate("t5-small", method="full", batch_size=64, gpu="1GiB", context=0).advice["1GiB"]
    assert not any("trainer" in change.options for change in other.changes)


def test_a_traced_job_is_advised_by_formulas() -> None:
    pytest.importorskip("peft")
    job: dict[str, Any] = {"method": "full", "batch_size": 4, "seq_len": 512, "gpu": "1GiB", "context": 0}
    traced, analytic = (estimate(MODEL, engine=engine, **job) for engine in ("trace", "analytic"))  # type: ignore[arg-type]
    assert [change._replace(saving_bytes=0) for change in traced.advice["1GiB"].changes] == [
        change._replace(saving_bytes=0) for change in analytic.advice["1GiB"].changes
    ]
    assert report.title("1GiB", traced.engine) == "change, for 1GiB (by formulas)"
    assert [card["advice_engine"] for card in traced.to_dict()["gpus"]] == ["analytic"]


def test_a_traced_job_without_formulas_has_no_advice() -> None:
    pytest.importorskip("peft")
    result = estimate(shallow("mamba-130m", 1), method="full", engine="trace", seq_len=8, gpu="0.1GiB")
    assert (result.gpus[0].verdict, result.advice) == ("does_not_fit", {"0.1GiB": Advised()})
    assert result.to_dict()["gpus"][0]["advice_engine"] is None
    assert report.without_help("0.1GiB", Advised()) == f"0.1GiB: {report.UNKNOWN}"


@pytest.mark.parametrize("fmt", ["table", "markdown"])
def test_no_advice_is_said(fmt: str) -> None:
    """The card is smaller than an assumed context: nothing fits it."""
    job = ("--method", "bitfit", "--optim", "sgd", "--adapter-dtype", "bf16", "--seq-len", "128", "--gpu", "0.1GiB")
    done = run("estimate", "bert-base-cased", *job, "--format", fmt)
    assert done.code == 0
    assert "0.1GiB: no change helps, since the weights alone take" in done.out


def test_an_unknown_search_is_refused() -> None:
    with pytest.raises(InputError, match="advice: 'some' is not valid"):
        estimate("llama-2-7b", advice=cast("Any", "some"))


def test_a_shorter_sequence_that_does_not_suffice_is_left_out() -> None:
    """94 GiB are missing, and a sequence of 128 tokens saves 91."""
    job: dict[str, Any] = {"trainer": "plain", "batch_size": 4, "gpu": "20GiB"}
    best, everything = (estimate("qwen3-8b", advice=search, **job).advice["20GiB"] for search in ("best", "all"))  # type: ignore[arg-type]
    assert not any(set(change.options) == {"seq_len"} for change in best.changes)
    assert any(set(change.options) == {"seq_len"} for change in everything.changes)


def test_a_change_that_fits_comes_before_one_that_is_tight() -> None:
    """QLoRA alone is tight on a T4; without kbit preparation it fits."""
    first, *others = estimate("llama-3.1-8b", method="full", gpu="t4").advice["t4"].changes
    assert first.verdict == "fits"
    assert estimate("llama-3.1-8b", method="qlora", gpu="t4").gpus[0].verdict == "tight"
    assert {"method": "qlora"} in [change.options for change in others]


@pytest.mark.parametrize(
    ("model", "job", "first"),
    [
        ("bert-base-uncased", {"method": "full", "gpu": "2GiB", "seq_len": 512, "batch_size": 64}, {"optim", "batch_size"}),
        ("qwen2.5-7b", {"method": "qlora", "gpu": "t4", "seq_len": 8192, "batch_size": 8}, {"batch_size", "seq_len"}),
    ],
)
def test_a_job_far_too_large_is_made_small_by_few_changes(model: str, job: dict[str, Any], first: set[str]) -> None:
    """Of so large a job the allocator holds more than the card has; of what is left of it, little."""
    row = estimate(model, **job).advice[job["gpu"]].changes[0]
    assert row.options.keys() - {"gradient_accumulation_steps"} == first
    assert estimate(model, **{**job, **row.options}).gpus[0].verdict == row.verdict == "fits"


def test_sequences_of_a_combination_are_not_shorter_than_they_must_be() -> None:
    """A quarter of 131,072 tokens is too long; of the 128 that are tried next, as many are made as there is room for."""
    job: dict[str, Any] = {"method": "full", "gpu": "rtx-4090", "optim": "sgd", "gradient_checkpointing": True}
    row = estimate("llama-3.1-8b", seq_len=131_072, **job).advice["rtx-4090"].changes[0]
    assert int(str(row.options["seq_len"])) > 16_384
    assert estimate("llama-3.1-8b", **{**job, **row.options}).gpus[0].verdict == row.verdict == "tight"

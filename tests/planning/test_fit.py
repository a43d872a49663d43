"""`fit`: what it returns fits and one more does not, by direct estimates; how plans are made and ranked."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

import peftplan
from peftplan.arch.catalogue import models
from peftplan.errors import InputError, PeftplanError, UnknownNameError
from peftplan.hardware.gpus import gpus
from peftplan.hardware.usable import usable_bytes
from peftplan.planning.choosing import family, which_gpu
from peftplan.planning.fit import Size, fit
from peftplan.planning.plans import QUALITY
from peftplan.report import fitting
from peftplan.report.screen import ASCII
from tests.cli.run import run

CARDS = ("t4", "rtx-4090", "a10g", "l4", "a100-40gb", "a100-80gb", "h100-80gb", "24GiB")
SMALL = [
    entry.name for entry in models() if entry.num_parameters < 15e9 and entry.model_type in ("llama", "qwen2", "qwen3", "gpt2")
]


def verdict(model: str, gpu: str, **options: Any) -> str:
    return peftplan.estimate(model, gpu=gpu, **options).gpus[0].verdict


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_size_fits_and_one_more_does_not(seed: int) -> None:
    draw = random.Random(seed)
    model, gpu = draw.choice(SMALL), draw.choice(CARDS)
    size: Size = draw.choice(("batch_size", "seq_len", "r"))
    options: dict[str, Any] = {"method": draw.choice(("lora", "qlora", "dora")), "batch_size": draw.choice((1, 2))}
    if size == "seq_len":
        options["loss"] = "full"
    options.pop(size, None)
    plan = fit(model, gpu=gpu, max=size, keep=("method", "trainer", "gradient_checkpointing"), **options).plans[0]
    if not plan.size:
        assert verdict(model, gpu, **options, **{size: 1}) != "fits"
        return
    assert verdict(model, gpu, **options, **{size: plan.size}) == "fits"
    assert plan.bounded or verdict(model, gpu, **options, **{size: plan.size + 1}) != "fits"
    if plan.fits_again is not None:
        assert verdict(model, gpu, **options, **{size: plan.fits_again}) == "fits"


def test_a_layout_that_flips_below_the_largest_size_is_seen() -> None:
    """Batch 14 reserves 3 GiB more than 15: 16 fits, but 13 and 14 do not."""
    job: dict[str, Any] = {"method": "full", "seq_len": 512}
    plan = fit("qwen1.5-0.5b-chat", gpu="rx-7900-xt", keep=("method", "loss", "trainer", "gradient_checkpointing"), **job).plans[
        0
    ]
    verdicts = {size: verdict("qwen1.5-0.5b-chat", "rx-7900-xt", batch_size=size, **job) for size in range(1, 18)}
    assert [size for size, word in verdicts.items() if word != "fits"] == [13, 14, 17]
    assert (plan.size, plan.fits_again) == (12, 16)


def test_the_first_plan_is_the_job_as_typed() -> None:
    result = fit("llama-3.2-1b", gpu="rtx-4090", method="qlora", r=16, seq_len=1024, methods=("full",))
    first = result.plans[0]
    assert (first.method, first.r, first.seq_len, dict(first.changes)) == ("qlora", 16, 1024, {})
    assert result.to_dict()["plans"][0]["batch_size"] == first.size == first.batch_size > 1


def test_other_plans_say_what_they_change_and_are_ranked() -> None:
    plans = fit("llama-3.2-1b", gpu="rtx-4090", methods=("full", "qlora")).plans
    methods = [plan.method for plan in plans[1:]]
    assert [QUALITY.index(method) for method in methods] == sorted(QUALITY.index(method) for method in methods)
    for plan in plans[1:]:
        assert plan.changes
        assert verdict("llama-3.2-1b", "rtx-4090", **plan.changes, batch_size=plan.size) == "fits"
        assert all(
            plan.tokens_per_step >= other.tokens_per_step
            for other in plans[plans.index(plan) + 1 :]
            if other.method == plan.method
        )


def test_a_base_that_is_stored_in_few_bits_gets_no_second_plan_for_its_quantized_method() -> None:
    plan = peftplan.fit("llama-3.1-8b", method="lora", quant="gptq", gpu="rtx-4090")
    assert {each.method for each in plan.plans} == {"lora"}


def test_a_job_that_never_fits_names_what_comes_nearest() -> None:
    result = fit("llama-2-70b", gpu="rtx-4090", method="lora", methods=("full", "qlora"))
    first = result.plans[0]
    assert (first.size, first.verdict, result.fits) == (0, "does_not_fit", False)
    assert first.binding is not None
    assert first.binding.category == "weights"
    assert first.binding.headroom_bytes == first.headroom_bytes < 0
    assert [plan.method for plan in result.nearest] == ["qlora", "lora"]
    assert result.to_dict()["plans"][0]["batch_size"] == 0


def test_a_job_that_never_fits_names_the_smallest_card_that_takes_it() -> None:
    """The card takes the nearest plan, and no card with fewer usable bytes does, by direct estimates."""
    result = fit("llama-2-70b", gpu="rtx-4090", method="lora", methods=("full", "qlora"))
    card = result.other_card
    assert card is not None
    assert card.changes == result.nearest[0].changes
    options = {**card.changes, "batch_size": 1}
    assert verdict("llama-2-70b", card.gpu, **options) == "fits"
    smaller = [other.id for other in gpus() if usable_bytes(other).bytes < card.usable_bytes]
    assert "rtx-4090" in smaller
    taken = peftplan.estimate("llama-2-70b", gpu=smaller, **options).gpus
    assert [other.gpu for other in taken if other.verdict == "fits"] == []
    assert any("The smallest card that can run it" in line for line in fitting.remarks(result))
    assert fit("llama-3.2-1b", gpu="rtx-4090", keep=("method", "loss")).other_card is None


def test_a_job_that_one_gpu_cannot_run_is_planned_for_several() -> None:
    """The batch is the largest that direct estimates fit."""
    result = fit("llama-2-70b", gpu="rtx-4090", method="qlora", methods=["qlora"])
    (plan,) = (plan for plan in result.plans if "gpus" in plan.changes)
    options: dict[str, Any] = {name: value for name, value in plan.changes.items() if name != "gpus"}
    gpu = f"{plan.changes['gpus']}x{result.gpu}"
    sizes = (plan.size, plan.size + 1)
    verdicts = [
        peftplan.estimate("llama-2-70b", method="qlora", gpu=gpu, batch_size=size, **options).gpus[0].verdict for size in sizes
    ]
    assert verdicts[0] == "fits" != verdicts[1]
    assert result.other_card is not None


def test_what_is_kept_no_plan_changes() -> None:
    plans = fit("llama-3.2-1b", gpu="rtx-4090", keep=("method", "loss")).plans
    assert {plan.method for plan in plans} == {"lora"}
    assert all(plan.assumptions["loss"] == "full" for plan in plans)


def test_tight_plans_are_asked_for() -> None:
    usual = fit("llama-3.2-1b", gpu="rtx-4090", keep=("method", "loss")).plans[0]
    tight = fit("llama-3.2-1b", gpu="rtx-4090", keep=("method", "loss"), allow_tight=True).plans[0]
    assert tight.size >= usual.size
    assert verdict("llama-3.2-1b", "rtx-4090", batch_size=tight.size) in ("fits", "tight")
    assert verdict("llama-3.2-1b", "rtx-4090", batch_size=tight.size + 1) not in ("fits", "tight")


def test_shorter_sequences_only_down_to_what_is_said() -> None:
    plans = fit("qwen3-8b", gpu="l4", seq_len=8192, min_seq_len=1024, methods=("qlora",)).plans
    assert {plan.seq_len for plan in plans} <= {8192, 1024}
    assert any(plan.seq_len == 1024 for plan in plans)


def shown_lines(*, gpu: str = "l4", model: str = "llama-3.1-8b", **options: Any) -> list[str]:
    """The first line and the remarks."""
    result = fit(model, gpu=gpu, keep=("method", "trainer", "gradient_checkpointing"), **options)
    return [fitting.headline(result, ASCII), *fitting.remarks(result)]


def test_what_is_tight_or_does_not_run_is_not_called_too_large() -> None:
    assert "is tight at the smallest batch size, and fits at none" in shown_lines(method="dora")[0]
    lines = shown_lines(gpu="t4", attn_implementation="flash_attention_2")
    assert len(lines) == 2
    assert lines[1].startswith("The smallest card that can run it: A10, as typed")
    assert "x T4: llama-3.1-8b, lora does not run: flash_attention_2 needs compute capability 8.0" in lines[0]


def test_an_assumed_context_and_warnings_are_said() -> None:
    lines = shown_lines(model="phi-4", gpu="h100-80gb", target_modules="q_proj,o_proj")
    assert "of CUDA context assumed" in lines[0]
    assert "q_proj' adapts nothing" in lines[1]
    assert "text only" in shown_lines(model="Qwen/Qwen2-VL-2B-Instruct", gpu="l4", target_modules="q_proj")[1]


def test_context_and_versions_are_those_of_the_estimate() -> None:
    plan = fit("llama-3.2-1b", gpu="l4", keep=("method", "trainer"), context=0).plans[0]
    assert plan.context_bytes == 0
    stopped = run(
        "fit", "llama-3.2-1b", "--gpu", "l4", "--keep", "method,trainer", "--context", "0", "--torch", "2.10", "--format", "json"
    )
    assert (stopped.code, json.loads(stopped.out)["plans"][0]["context_bytes"]) == (0, 0)


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"gpu": "rtx-4090", "max": "layers"}, UnknownNameError, "max"),
        ({"gpu": "rtx-4090,t4"}, InputError, "one card"),
        ({"gpu": "rtx-4090", "keep": ("color",)}, UnknownNameError, "keep"),
        ({"gpu": "rtx-4090", "method": "prompt-tunning"}, UnknownNameError, "method"),
        ({"gpu": "rtx-4090", "methods": ("nosuch",)}, UnknownNameError, "method"),
        ({"gpu": "rtx-4090", "methods": None, "keep": 3}, InputError, "keep"),
        ({"gpu": "rtx-4090", "methods": (1,)}, InputError, "methods"),
        ({"gpu": "rtx-4090", "min_seq_len": 0}, InputError, "min_seq_len must be at least 1"),
        ({"gpu": "rtx-4090", "min_seq_len": 2049}, InputError, r"min_seq_len must be at most the sequence length, 2048 \(got"),
        ({"gpu": "rtx-4090", "keep": "seq-len", "min_seq_len": 512}, InputError, "min_seq_len: keep names seq_len"),
        ({"gpu": "rtx-4090", "keep": "method", "methods": ("qlora",)}, InputError, "methods: keep names method"),
        (
            {"gpu": "rtx-4090", "gpus": 2, "optim": "adagrad", "strategy": "fsdp1", "method": "partial"},
            PeftplanError,
            "fit: no formula",
        ),
    ],
)
def test_bad_input_says_what_is_accepted(options: dict[str, Any], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        fit("llama-3.2-1b", **options)


def test_the_smallest_cards_that_take_a_job() -> None:
    """Each one fits by a direct estimate; no smaller card of the catalogue does."""
    cards = which_gpu("llama-3.2-1b", method="qlora", seq_len=512)
    assert [card.usable_bytes for card in cards] == sorted(card.usable_bytes for card in cards)
    assert verdict("llama-3.2-1b", cards[0].gpu, method="qlora", seq_len=512) == "fits"
    smaller = [card.id for card in gpus() if usable_bytes(card).bytes < cards[0].usable_bytes]
    assert smaller
    assert "fits" not in {verdict("llama-3.2-1b", card, method="qlora", seq_len=512) for card in smaller}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("llama-3.2-1b --which-gpu --max seq-len", "--max has no effect with --which-gpu"),
        ("llama-3.2-1b --which-gpu --methods qlora", "--methods has no effect with --which-gpu"),
        ("llama-3.2-1b --which-gpu --min-seq-len 512", "--min-seq-len has no effect with --which-gpu"),
        ("gpt2 --gpu t4 --max seq-len --min-seq-len 5000", "--min-seq-len must be at most 1024, the positions of the model"),
        ("--model-family qwen3 --gpu t4 --keep seq-len", "--keep has no effect with --model-family"),
    ],
)
def test_options_of_plans_that_change_nothing_are_refused(options: str, expected: str) -> None:
    done = run("fit", *options.split())
    assert (done.code, done.out) == (2, "")
    assert expected in done.err


@pytest.mark.parametrize("said_again", [(), ("--max", "model")])
def test_a_family_by_the_method_that_is_typed(said_again: tuple[str, ...]) -> None:
    """It was asked by every method, whatever --method said."""
    done = run("fit", "--model-family", "qwen3", "--gpu", "t4", "--method", "qlora", "--format", "json", *said_again)
    assert [member["method"] for member in json.loads(done.out)] == ["qlora"]


def test_a_job_that_no_card_takes_is_an_answer() -> None:
    """Full fine-tuning of 70 B parameters needs a TiB."""
    job = ("fit", "llama-2-70b", "--method", "full", "--which-gpu")
    assert run(*job) == (0, f"{fitting.NO_CARD}\n", "")
    assert run(*job, "--format", "json").out == "[]\n"
    assert run(*job, "--require-fit").code == 1


def test_the_largest_member_of_a_family() -> None:
    (lora, full) = family("qwen3", gpu="rtx-4090", methods=("lora", "full"))
    assert lora.model == "qwen3-8b"
    assert verdict("qwen3-8b", "rtx-4090", method="lora") == "fits"
    assert verdict("qwen3-14b", "rtx-4090", method="lora") != "fits"
    assert full.model is not None
    assert full.num_parameters < lora.num_parameters
    (prompts,) = family("qwen3", gpu="rtx-4090", methods="prompt-tuning", num_virtual_tokens=8)
    assert prompts.model is not None
    (prompts, _) = family("qwen3", gpu="rtx-4090", methods=("prompt-tuning", "lora"))
    assert "num_virtual_tokens" in str(prompts.error)
    assert [member.method for member in family("qwen2", gpu="l4", num_virtual_tokens=8)][-1] == "prompt-tuning"
    assert "prompt-tuning" not in [member.method for member in family("qwen2", gpu="l4")]  # it lacks an option
    (unknown,) = family("rwkv", gpu="l4", methods="lora")  # none has formulas
    assert "no formula for" in str(unknown.error)
    assert unknown.verdict is None
    (text,) = family("qwen3-vl", gpu="l4", methods="lora")
    assert text.verdict is not None
    assert (text.model, text.verdict.scope) == ("qwen3-vl-4b-instruct", "text")
    (some,) = family("llama", gpu="rtx-4090", methods="lora")  # 8B fits, 13B and 11B with its pictures do not
    assert some.model == "llama-3-8b"
    (some,) = family("lfm2", gpu="a100-80gb", methods="lora")  # 2.6B fits, 8B-A1B has no formula
    assert some.model == "lfm2-2.6b"
    assert str(some.error).startswith("lfm2-8b-a1b: no formula for")
    assert fitting.member_cells([some])[0][1] == "at least lfm2-2.6b"
    for wrong in ({"gpu": "nosuch"}, {"gpu": "l4,t4"}, {"gpu": "l4", "dtype": "nosuch"}, {"gpu": "l4", "methods": ("nosuch",)}):
        with pytest.raises(InputError):
            family("qwen3", **wrong)
    with pytest.raises(InputError, match="model_family"):
        family("no-such-family", gpu="rtx-4090")


def test_the_largest_model_of_a_family_or_a_list() -> None:
    """Every larger member of the family does not fit, by direct estimates."""
    result = fit("qwen3", gpu="rtx-4090", max="model", methods=("qlora",), keep=("loss", "trainer"))
    assert (result.model, result.size) == ("qwen3", "model")
    assert [(plan.method, plan.model) for plan in result.plans] == [("lora", "qwen3-8b"), ("qlora", "qwen3-14b")]
    assert verdict("qwen3-8b", "rtx-4090") == verdict("qwen3-14b", "rtx-4090", method="qlora") == "fits"
    larger = [entry.name for entry in models() if entry.name.startswith("qwen3-") and entry.name[6].isdigit()]
    sizes = {entry.name: entry.num_parameters for entry in models()}
    assert {verdict(name, "rtx-4090") for name in larger if sizes[name] > sizes["qwen3-8b"]} == {"does_not_fit"}
    first = result.to_dict()["plans"][0]
    assert (first["model"], first["next_larger"], first["binding"]["verdict"]) == ("qwen3-8b", "qwen3-14b", "does_not_fit")
    listed = fit(["gpt2", "llama-3.1-8b", "qwen3-0.6b"], gpu="t4", max="model", keep="method,loss,trainer").plans[0]
    assert (listed.model, listed.next_larger) == ("qwen3-0.6b", "llama-3.1-8b")


def test_no_model_of_a_family_fits() -> None:
    result = fit("llama-3.3", gpu="t4", max="model", methods=("full",))
    assert (result.fits, result.plans[0].model, result.plans[0].verdict) == (False, "llama-3.3-70b-instruct", "does_not_fit")
    assert result.to_dict()["plans"][0]["model"] is None
    with pytest.raises(UnknownNameError, match="no-such-family"):
        fit("no-such-family", gpu="t4", max="model")
    with pytest.raises(InputError, match="a family such as qwen3"):
        fit(7, gpu="t4", max="model")


def test_several_cards_get_an_answer_each() -> None:
    on_both = fit("llama-3.2-1b", gpu=("t4", "l4"), keep=("method", "loss"))
    assert [result.gpu for result in on_both] == ["t4", "l4"]
    assert on_both == tuple(fit("llama-3.2-1b", gpu=card, keep=("method", "loss")) for card in ("t4", "l4"))
    stopped = run("fit", "llama-3.2-1b", "--gpu", "t4,l4", "--keep", "method,loss", "--format", "json")
    assert [card["plans"][0]["batch_size"] for card in json.loads(stopped.out)["cards"]] == [
        result.plans[0].size for result in on_both
    ]
    stopped = run("fit", "qwen3", "--max", "model", "--gpu", "t4", "--gpu", "l4", "--methods", "qlora", "--format", "csv")
    assert {line.split(",")[0] for line in stopped.out.splitlines()} == {"gpu", "t4", "l4"}


def test_what_may_be_kept_is_named_as_it_is_typed() -> None:
    wrong = run("fit", "llama-3.2-1b", "--gpu", "l4", "--keep", "color")
    assert wrong.code == 2
    assert "accepted: eval-batch-size, gradient-checkpointing, loss, method, seq-len, trainer" in wrong.err


def test_an_evaluation_that_does_not_fit_is_named_and_made_smaller() -> None:
    """8 rows of 2,048 tokens have 8 x 2,048 x 151,936 logits: 4.6 GiB in bf16, and 9.3 in fp32."""
    job: dict[str, Any] = {"gpu": "rtx-3060", "eval_batch_size": 8, "keep": ("method", "trainer")}
    result = fit("qwen3-0.6b", **job)
    assert "because of its evaluation of 8 rows: at the smallest it needs" in fitting.headline(result, ASCII)
    assert [plan.changes for plan in result.plans[1:]] == [{"eval_batch_size": 1}]
    without = fit("qwen3-0.6b", gpu="rtx-3060", keep=("method", "trainer")).plans[0]
    assert result.plans[1].size == without.size
    assert len(fit("qwen3-0.6b", **{**job, "keep": ("method", "trainer", "eval_batch_size")}).plans) == 1


def test_a_size_that_is_searched_and_typed_is_said_to_be_unused() -> None:
    done = run("fit", "llama-3.2-1b", "--gpu", "l4", "--keep", "method,loss", "--batch-size", "4")
    assert done.code == 0
    assert done.err == "peftplan: --batch-size 4 is not used: it is the size that --max searches\n"


def test_two_nearest_plans_are_named_where_only_one_method_fails() -> None:
    nearest = fit("llama-3.1-8b", gpu="rtx-4090", methods=("full",)).nearest
    assert [plan.method for plan in nearest] == ["full", "full"]
    assert nearest[0].headroom_bytes >= nearest[1].headroom_bytes
    assert nearest[0].changes != nearest[1].changes


def test_where_the_search_for_a_length_ends_is_said() -> None:
    """BERT has a table of 512 positions; a `min_seq_len` is no sign that shorter sequences do not fit."""
    bert = run("fit", "bert-base-uncased", "--task-type", "SEQ_CLS", "--gpu", "t4", "--max", "seq-len", "--keep", "method")
    assert "up to sequence length 512 (all that the model has); it needs" in " ".join(bert.out.split())
    long = run("fit", "gpt2", "--gpu", "1GiB", "--max", "seq-len", "--min-seq-len", "1000", "--keep", "method,loss")
    assert "does not fit at 1,000 tokens, nor at more: it needs" in " ".join(long.out.split())


def test_where_larger_sizes_have_no_peak_the_search_ends() -> None:
    """Rows of a packed batch become one, and ms-swift's embeddings were rehearsed with one row."""
    (plan,) = fit("qwen3-0.6b", gpu="24GiB", trainer="trl-packed", seq_len=512, keep=("trainer", "method")).plans[:1]
    assert (plan.size, plan.bounded, plan.binding, plan.verdict) == (1, True, None, "fits")
    assert "from batch size 2 on, nothing is known: SFTTrainer" in plan.warnings[-1]
    options = (
        "--trainer swift-embedding --gpus 2 --strategy zero2 --attn-implementation flash_attention_2 --gradient-checkpointing"
    )
    done = run("fit", "qwen3-0.6b", "--gpu", "24GiB", "--seq-len", "512", "--keep", "method,trainer", *options.split())
    assert "fits up to batch size 1, and perhaps more; it needs" in " ".join(done.out.split())


def test_the_name_of_a_model_is_never_parted() -> None:
    done = run("fit", "llama-3.2-1b,gpt2", "--gpu", "l4", "--max", "model", "--methods", "dora")
    (row,) = (line for line in done.out.splitlines() if line.startswith("as typed"))
    assert "  llama-3.2-1b  " in row


def test_over_several_gpus_a_plan_divides_what_does_not_fit() -> None:
    """DDP keeps the whole model on each card; nothing but another method was tried."""
    options: dict[str, Any] = {"gpu": "rtx-4090", "gpus": 4, "method": "full"}
    answer = peftplan.fit("llama-3.1-8b", methods=["full"], **options)
    (plan,) = (plan for plan in answer.plans if plan.changes == {"strategy": "fsdp2", "offload_params": "cpu"})
    assert verdict("llama-3.1-8b", **{**options, **plan.changes, "batch_size": plan.batch_size}) == "fits"
    assert answer.other_card is None
    typed = peftplan.fit("llama-3.1-8b", methods=["full"], strategy="ddp", **options)
    assert all("strategy" not in plan.changes for plan in typed.plans)


def test_lengths_are_searched_above_the_completions_that_a_trainer_writes() -> None:
    """A row is a prompt and a completion. One token leaves no room for the latter, with which the search began."""
    job: dict[str, Any] = {"trainer": "trl-grpo", "beta": 0.0, "batch_size": 32}
    typed: dict[str, Any] = {
        "gpu": "l4",
        "max": "seq_len",
        "keep": ("method", "loss", "trainer", "gradient_checkpointing"),
        **job,
    }
    by_default = fit("qwen2.5-0.5b", **typed).plans[0]
    assert verdict("qwen2.5-0.5b", "l4", seq_len=by_default.size, **job) == "fits"
    assert verdict("qwen2.5-0.5b", "l4", seq_len=by_default.size + 1, **job) != "fits"
    long = fit("qwen2.5-0.5b", max_completion_length=3072, **typed).plans[0]
    assert long.size > 3072
    none = fit("qwen2.5-7b", method="full", max_completion_length=4096, **typed).plans[0]
    assert (none.size, none.seq_len) == (0, 4097)


def test_a_card_is_counted_in_python_as_on_the_command_line() -> None:
    """`fit --gpu 2xt4` was read, `fit(gpu="2xt4")` refused; so was `sweep`."""
    counted = peftplan.fit("gpt2", gpu="2xt4", methods=["lora"])
    assert counted == peftplan.fit("gpt2", gpu="t4", gpus=2, methods=["lora"])
    assert isinstance(peftplan.fit("gpt2", gpu=["2xt4"], methods=["lora"]), tuple)
    with pytest.raises(InputError, match=r"gpus: the card says how many there are \(2x…\)"):
        peftplan.fit("gpt2", gpu="2xt4", gpus=2)
    (row,) = peftplan.sweep("gpt2", gpu="2xt4").records()
    assert (row["gpu"], row["needed_bytes"]) == ("t4", peftplan.estimate("gpt2", gpu="2xt4").gpus[0].needed_bytes)

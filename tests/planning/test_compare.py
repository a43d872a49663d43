"""`compare`: every row is what an estimate of that method on that card says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.cli import main
from peftplan.errors import InputError, PeftplanError
from peftplan.ledger import EVERY_CATEGORY
from peftplan.planning.compare import compare
from peftplan.planning.documents import ComparedFacts, ComparedRow
from peftplan.report import comparing, comparing_plot
from tests.cli.run import run


def test_a_row_is_what_an_estimate_says() -> None:
    result = compare("llama-3.2-1b", methods=("lora", "full"), gpu="t4,l4", r=16, seq_len=512)
    assert [(row.method, row.gpu) for row in result.rows] == [("lora", "t4"), ("lora", "l4"), ("full", "t4"), ("full", "l4")]
    for row in result.rows:
        rank = {"r": 16} if row.method == "lora" else {}
        alone = peftplan.estimate("llama-3.2-1b", method=row.method, gpu=row.gpu, seq_len=512, **rank)
        assert row.trainable_parameters == alone.trainable_parameters
        assert (row.needed_bytes, row.verdict) == (alone.gpus[0].needed_bytes, alone.gpus[0].verdict)
    served = peftplan.serving("llama-3.2-1b", method="lora", r=16).file
    assert served is not None
    assert {row.adapter_bytes for row in result.rows if row.method == "lora"} == {served.num_bytes}


def test_the_function_compares_the_methods_of_the_command() -> None:
    named = compare("gpt2")
    assert json.loads(run("compare", "gpt2", "--format", "json").out) == json.loads(json.dumps(named.to_dict()))


def test_fields_that_a_method_lacks_are_left_out_for_it_alone() -> None:
    """A rank says nothing to full fine-tuning, which is compared all the same."""
    (lora, full) = compare("llama-3.2-1b", methods=("lora", "full"), r=16).rows
    assert (lora.error, full.error) == (None, None)


def test_a_method_that_is_refused_has_a_row_that_says_why() -> None:
    rows = compare("llama-3.2-1b", methods=("lora", "full"), quant="nf4").rows
    assert rows[0].peak_allocated is not None
    assert rows[1].peak_allocated is None
    assert "trained in full" in str(rows[1].error)
    with pytest.raises(PeftplanError, match="trained in full"):
        compare("llama-3.2-1b", methods=("full",), quant="nf4")


def test_a_lower_bound_says_at_least_and_nothing_of_what_is_left() -> None:
    """AdaLoRA over 4 bits under ZeRO-3 has no formula: what is known lasts from step to step."""
    result = compare("llama-3.2-1b", methods=("lora", "adalora"), quant="nf4", gpu="l4", gpus=2, strategy="zero3")
    (lora, adalora) = comparing.cells(result)
    places = [column.header for column in comparing.COLUMNS]
    needs, left, verdict = (places.index(name) for name in ("needs", "left", "verdict"))
    assert (lora[verdict], adalora[verdict]) == ("fits", "unknown")
    assert [row.needed_is_lower_bound for row in result.rows] == [False, True]
    assert (lora[needs].startswith("at least"), adalora[needs].startswith("at least")) == (False, True)
    assert (bool(lora[left]), adalora[left]) == (True, "")


def test_a_name_that_is_no_method_is_refused_whatever_the_others_are() -> None:
    for methods in (("lora", "nosuch"), ("nosuch", "lora"), ()):
        with pytest.raises(InputError, match="method"):
            compare("llama-3.2-1b", methods=methods)


def test_a_method_named_twice_is_one_row_and_warnings_are_said() -> None:
    result = compare("phi-4", methods=("lora", "lora"), target_modules="q_proj,o_proj")
    assert [row.method for row in result.rows] == ["lora"]
    assert "'q_proj' adapts nothing" in comparing.errors(result)[0]
    for fmt in ("table", "json", "csv", "markdown"):
        done = run("compare", "phi-4", "--method", "lora", "--target-modules", "q_proj,o_proj", "--format", fmt)
        assert "adapts nothing" in done.out, fmt


def test_text_only_is_said_of_a_vision_language_model() -> None:
    (row,) = compare("Qwen/Qwen2-VL-2B-Instruct", methods=("lora",), gpu="l4", target_modules="q_proj").rows
    assert row.verdict == "fits"
    assert row.warnings[-1].startswith("the batch is text only")


def test_a_method_that_does_not_run_says_so_in_words() -> None:
    result = compare("llama-3.2-1b", methods=("lora",), gpu="t4", attn_implementation="flash_attention_2")
    assert result.rows[0].reason
    assert comparing.cells(result)[0][6] == "does not run"
    assert "t4: lora does not run: flash_attention_2 needs" in comparing.errors(result)[0]


def test_a_row_has_a_field_for_every_category() -> None:
    assert ComparedRow.__annotations__.keys() - ComparedFacts.__annotations__.keys() == {*EVERY_CATEGORY, "warnings"}


def test_rows_are_flat_for_data_frames() -> None:
    records = compare("llama-3.2-1b", methods=("lora",), gpu="l4").records()
    assert {"method", "gpu", "needed_bytes", "weights"} <= set(records[0])
    assert not any(isinstance(value, (dict, list, tuple)) for value in records[0].values())


def test_every_row_has_a_column_for_each_category() -> None:
    """QLoRA has quant_state, full fine-tuning gradients; in a CSV the cells of such rows stood under other categories' names."""
    result = compare("llama-3.2-1b", methods=("lora", "qlora", "full"), gpu="l4")
    assert len({tuple(record) for record in result.records()}) == 1
    header, *rows = csv.reader(run("compare", "llama-3.2-1b", "--method", "lora,qlora,full", "--format", "csv").out.splitlines())
    for row, compared in zip(rows, result.rows, strict=True):
        cells = dict(zip(header, row, strict=True))
        counted = {name: int(cells[name]) for name in EVERY_CATEGORY if cells.get(name, "0") != "0"}
        assert counted == compared.by_category
        assert sum(counted.values()) == int(cells["peak_allocated"])


def test_markdown_says_what_it_compares() -> None:
    assert run("compare", "llama-3.2-1b", "--method", "lora,full", "--format", "markdown").out.startswith(
        "## llama-3.2-1b: 2 methods\n\n| method |"
    )


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (1, 1), (500, 12), (1000, 24)])
def test_bars_are_in_proportion(size: int, blocks: int) -> None:
    assert comparing.bar(size, 1000) == "█" * blocks


def test_names_of_near_cards_stand_one_above_the_other() -> None:
    """They were drawn over each other; a name that has room stays in the lowest row."""
    rows = comparing_plot._rows({"a10g": 22.0, "l4": 22.5, "rtx-4090": 23.6, "a100-80gb": 79.0}, 90.0)
    assert rows == {"a10g": 0, "l4": 1, "rtx-4090": 2, "a100-80gb": 0}
    # a letter is 1.35 of 90: the first name ends at 22 + 5 / 2 * 1.35 = 25.4, the second begins 3 / 2 * 1.35 = 2.0 to the left
    assert comparing_plot._rows({"a10g": 22.0, "l4": 27.0}, 90.0) == {"a10g": 0, "l4": 1}
    assert comparing_plot._rows({"a10g": 22.0, "l4": 27.5}, 90.0) == {"a10g": 0, "l4": 0}


def test_the_command_and_its_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "methods.svg"
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "llama-3.2-1b", "--method", "lora,full", "--gpu", "l4", "--plot", str(figure), "--format", "json"])
    assert stopped.value.code == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["lora", "full"]
    assert figure.read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize(("args", "expected"), [(["--plot", "x.pdf"], "--plot"), (["--method", "lorra"], "lora")])
def test_bad_input_is_one_line(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "llama-3.2-1b", *args])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert expected in captured.err


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("card", ["--gpu l4", ""])
def test_every_terminal_shows_the_adapter_and_a_bar_for_each_method(card: str, columns: int) -> None:
    """LoRA r=8 on all linear layers of Llama 3.2 1B: 5,636,096 parameters in fp32 take 21.5 MiB."""
    done = run("compare", "llama-3.2-1b", "--method", "lora,full", *card.split(), columns=columns)
    assert "21.5" in done.out
    assert done.out.count("peak, against the largest") == 1
    assert [line.count("█") for line in done.out.splitlines() if "█" in line][-1] == comparing.BAR
    assert ("verdict" in done.out) == bool(card)


def test_a_notebook_leaves_out_the_columns_of_cards_too() -> None:
    assert "verdict" not in compare("llama-3.2-1b", methods=("lora",))._repr_html_()


WAYS = {"methods": ("full", "lora"), "gpu": "2xrtx-4090,8xrtx-4090", "strategies": ("ddp", "fsdp2"), "seq_len": 512}


def test_a_row_of_a_strategy_is_what_an_estimate_says() -> None:
    result = compare("llama-3.2-1b", **WAYS)
    assert [(row.method, row.strategy, row.world_size) for row in result.rows] == [
        (method, strategy, gpus) for method in ("full", "lora") for strategy in ("ddp", "fsdp2") for gpus in (2, 8)
    ]
    for row in result.rows:
        assert row.world_size is not None
        alone = peftplan.estimate(
            "llama-3.2-1b", method=row.method, gpu=row.gpu, seq_len=512, strategy=row.strategy, gpus=row.world_size
        )
        assert (row.needed_bytes, row.verdict) == (alone.gpus[0].needed_bytes, alone.gpus[0].verdict)
        assert row.peak_allocated == alone.peaks.allocated  # type: ignore[union-attr]


def test_ways_say_for_each_method_the_fewest_gpus() -> None:
    """Llama 3.1 8B in full needs 74 GiB for states alone: over 4 × 24 GB it does not fit, over 16 it does by FSDP2 alone."""
    result = compare("llama-3.1-8b", methods="full,lora", gpu="4xrtx-4090,16xrtx-4090", strategies="ddp,fsdp2")
    assert comparing.answers(result) == ["full: fits 16 × rtx-4090 by fsdp2", "lora: fits 4 × rtx-4090 by ddp, fsdp2"]
    none = compare("llama-3.1-8b", methods="full", gpu="2xrtx-4090", strategies="ddp,fsdp2")
    assert comparing.answers(none) == ["full: fits none of these"]


def test_a_way_that_is_refused_has_a_row_that_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    result = compare("llama-3.2-1b", methods="full", gpu="2xl4", strategies="ddp,fsdp2", offload_params="cpu")
    assert [row.error is None for row in result.rows] == [False, True]
    assert comparing.errors(result)[0].startswith("full by ddp: offload_params")


def test_one_way_says_what_it_said() -> None:
    """JSON of one strategy, or of one GPU, has no fields of ways."""
    for options in ({"gpu": "l4"}, {"gpu": "2xl4", "strategies": "fsdp2"}):
        result = compare("llama-3.2-1b", methods="lora", **options)  # type: ignore[arg-type]
        assert "strategy" not in result.to_dict()["rows"][0]
    assert result.over == "FSDP2 over 2 GPUs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategies": "ddp,fsdp3", "gpu": "2xl4"}, "fsdp3"),
        ({"strategies": "ddp,fsdp2", "strategy": "ddp", "gpu": "2xl4"}, "strategies says which there are"),
        ({"gpu": "2xl4", "gpus": 4}, "gpu says how many there are"),
        ({"strategies": "ddp,fsdp2", "gpu": "l4"}, "divides a job over several GPUs"),
    ],
)
def test_ways_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftplanError, match=message):
        compare("llama-3.2-1b", methods="lora", **options)


def test_ways_on_the_command_line(tmp_path: Path) -> None:
    words = ["compare", "llama-3.2-1b", "--method", "full", "--strategy", "ddp,fsdp2", "--gpu", "2xl4,4xl4"]
    rows = json.loads(run(*words, "--format", "json").out)["rows"]
    assert [(row["strategy"], row["world_size"]) for row in rows] == [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4)]


@pytest.mark.parametrize(("words", "gpus"), [("--gpus 4", 4), ("--gpus 4 --nodes 2", 8), ("--nodes 2", 2)])
def test_the_number_of_gpus_may_be_an_option(words: str, gpus: int) -> None:
    done = run("compare", "llama-3.2-1b", "--method", "lora", "--strategy", "ddp,fsdp2", "--gpu", "l4", *words.split())
    assert f"lora: fits {gpus} × l4 by ddp, fsdp2" in done.out


def test_rows_say_what_a_file_says(tmp_path: Path) -> None:
    """The strategy, and how many GPUs."""
    zero = {"strategies": (), "gpu": "2xl4,4xl4", "deepspeed": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}}
    result = compare("llama-3.2-1b", methods="lora", **zero)  # type: ignore[arg-type]
    assert [(row.strategy, row.world_size) for row in result.rows] == [("zero3", 2), ("zero3", 4)]
    config = {"distributed_type": "MULTI_GPU", "num_processes": 4, "num_machines": 1, "mixed_precision": "bf16"}
    result = compare("llama-3.2-1b", methods="lora", gpu="2xl4,l4", accelerate_config=config)
    assert [(row.strategy, row.world_size, row.verdict) for row in result.rows] == [("ddp", 2, None), ("ddp", 4, "fits")]


def test_names_may_end_with_a_comma() -> None:
    result = compare("llama-3.2-1b", methods="lora,", strategies="fsdp2,", gpu="2xl4")
    assert result.over == "FSDP2 over 2 GPUs"


def test_one_strategy_elsewhere() -> None:
    done = run("fit", "llama-3.2-1b", "--method", "lora", "--strategy", "ddp,fsdp2", "--gpu", "2xl4")
    assert "`peftplan compare` and `sweep` take several" in done.err


def test_a_method_without_its_first_way_says_what_it_trains() -> None:
    result = compare("llama-3.2-1b", methods="qlora", strategies="fsdp1,fsdp2", gpu="2xl4")
    assert [row.trainable_parameters is None for row in result.rows] == [True, False]
    assert [cells[8] for cells in comparing.cells(result)] == ["", "5.64 M"]


def test_a_margin_is_said() -> None:
    """Earlier transformers offload a frozen base under FSDP1 without known reserved bytes: what an estimate calls an upper bound
    is one in a row too."""
    offloaded: dict[str, Any] = {"gpu": "4xl4", "offload_params": "cpu", "seq_len": 512, "strategy": "fsdp1"}
    offloaded["script"] = peftplan.Script(transformers="4.57.1")
    result = compare("llama-3.2-1b", methods="lora", **offloaded)
    alone = peftplan.estimate("llama-3.2-1b", method="lora", **offloaded | {"gpu": "l4", "gpus": 4}).gpus[0]
    (row,) = result.to_dict()["rows"]
    assert alone.upper_bound
    assert (row["needed_bytes"], row["needed_is_upper_bound"]) == (alone.needed_bytes, True)
    assert comparing.cells(result)[0][4].startswith("at most ")
    assert "needed_is_upper_bound" not in compare("llama-3.2-1b", methods="full", gpu="l4").to_dict()["rows"][0]


def test_a_bar_of_several_gpus_is_as_long_as_its_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what ranks gather and send each other."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_args, **_options: drawn.append(self))
    result = compare("llama-3.2-1b", methods="full", gpu="2xl4,4xl4", strategies="ddp,fsdp2", seq_len=512)
    comparing_plot.write(result, str(tmp_path / "a.svg"))
    ends: dict[float, float] = {}
    for bar in drawn[0].axes[0].patches:
        ends[bar.get_y()] = max(ends.get(bar.get_y(), 0.0), bar.get_x() + bar.get_width())
    peaks = sorted(row.peak_allocated / 2**30 for row in result.rows if row.peak_allocated)
    assert sorted(ends.values()) == pytest.approx(peaks)

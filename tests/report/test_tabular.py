"""Rows and cells that every format shares, and what each format makes of odd ones."""

from __future__ import annotations

import csv
import io
import json

import pytest

from peftplan.libraries.count import field_defaults
from peftplan.methods import BOOKKEEPING, OTHER_PEFT_TYPES
from peftplan.report import markdown, terminal
from peftplan.report.tabular import Column, assumption_rows, texts, write_csv
from peftplan.report.writing import as_json
from tests.cli.run import run

LONG_NAMES = "llama-3.2-11b-vision"


def test_cells_for_people() -> None:
    assert texts(("q_proj", 1234567, None, 0, "")) == ["q_proj", "1,234,567", "-", "0", ""]


def test_csv_cells_come_back() -> None:
    facts = [
        {
            "name": 'odd, "quoted"',
            "count": 12345,
            "none": None,
            "list": ["a", "b"],
            "flag": True,
            "nest": {"x": [1]},
            "rows": [{"y": 2}],
        },
        {"name": "line\nbreak", "count": 0, "none": None, "list": [], "flag": False, "nest": {}, "rows": []},
    ]
    stream = io.StringIO()
    write_csv(facts, stream)
    first, second = csv.DictReader(io.StringIO(stream.getvalue()))
    assert first == {
        "name": 'odd, "quoted"',
        "count": "12345",
        "none": "",
        "list": "a;b",
        "flag": "true",
        "nest": '{"x": [1]}',
        "rows": '[{"y": 2}]',
    }
    assert (second["name"], second["list"], second["flag"]) == ("line\nbreak", "", "false")


def test_assumptions_in_words() -> None:
    rows = assumption_rows(
        {
            "kbit_prepare": True,
            "padding": False,
            "trust_remote_code": False,
            "notes": ["shown elsewhere"],
            "target_modules": ["model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj", "lm_head"],
            "optim_target_modules": ["attn", "mlp"],
            "seq_len": 2048,
        }
    )
    assert rows == [
        ("kbit_prepare", "yes"),
        ("padding", "no"),
        ("target_modules", "q_proj, up_proj, lm_head"),
        ("optim_target_modules", "attn, mlp"),
        ("seq_len", "2048"),
    ]


def test_markdown_escapes_pipes() -> None:
    assert markdown.table(["a"], [["x|y"]]).splitlines() == ["| a |", "| --- |", "| x\\|y |"]


def test_wide_columns_are_left_out_of_a_narrow_terminal(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    columns = (Column("name"), Column("bytes", right=True), Column("source", wide=True))
    for width, header in ((109, "name  bytes"), (110, "name  bytes  source")):
        monkeypatch.setenv("COLUMNS", str(width))
        terminal.rows(columns, [("a", "1", "b")], above=None, below=None)
        assert capsys.readouterr().out.splitlines()[0] == header
    monkeypatch.delenv("COLUMNS")
    terminal.rows(columns, [("a", "1", "b" * 500)], above="title", below="end")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "title"
    assert shown[-1] == "end"
    assert shown[4] == f"a         1  {'b' * 500}"


def test_names_break_where_a_reader_expects_it() -> None:
    """Not between an option and its value, nor within a part of a module's name."""
    assert terminal._folded("--method ia3 --trainer trl --loss trl-chunked", 34) == (
        "--method ia3 --trainer trl\n--loss trl-chunked"
    )
    assert terminal._folded("--no-double-quant --loss liger", 20) == "--no-double-quant\n--loss liger"
    assert terminal._folded("model.layers.*.mlp.up_proj.lora_B.weight.exp_avg\n  states · fp32 8×8", 45) == (
        "model.layers.*.mlp.up_proj.lora_B.weight.\nexp_avg\n  states · fp32 8×8"
    )
    assert terminal._folded("x" * 50, 20) == "x" * 50, "the terminal cuts a word that has no better place"


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_long_names_cut_no_number(columns: int) -> None:
    """`model.vision_model.global_transformer.layers.*.post_attention_layernorm`, 69 letters, beside numbers of eleven."""
    modules = json.loads(run("inspect", LONG_NAMES, "--format", "json").out)["modules"]
    lines = json.loads(run("estimate", LONG_NAMES, "--format", "json").out)["memory"]["lines"]
    for shown, numbers in (
        (run("inspect", LONG_NAMES, columns=columns).out, [module["num_parameters"] for module in modules]),
        (run("estimate", LONG_NAMES, "-v", columns=columns).out, [line["bytes"] for line in lines]),
    ):
        assert max(map(len, shown.splitlines())) <= columns
        assert not {f"{number:,}" for number in numbers} - set(shown.split())


def test_markup_in_names_is_text() -> None:
    done = run("estimate", "./tiny.json", "--target-modules", ".*[qk]_proj", "-v")
    assert ".*[qk]_proj" in done.out


def test_verdicts_state_what_is_left_over() -> None:
    # In JSON: what is usable, less what the allocator reserves, less a context: the largest recorded, 828 MiB.
    job = ("estimate", "llama-2-7b", "--batch-size", "2", "--gpu", "24GiB")
    exact = json.loads(run(*job, "--format", "json").out)
    left = exact["gpus"][0]["headroom_bytes"]
    assert left == 24 * 2**30 - exact["memory"]["peak_reserved"] - 828 * 2**20
    (row,) = [line for line in run(*job, "-v", columns=120).out.splitlines() if line.startswith("24GiB  ")]
    needed = exact["gpus"][0]["needed_bytes"]
    sizes = ["24.00", "GiB", f"{needed / 2**30:.2f}", "GiB", "828.00", "MiB", "assumed", f"{left / 2**30:.2f}", "GiB"]
    assert row.split() == ["24GiB", *sizes, "fits"]


def test_a_csv_without_a_peak_says_so() -> None:
    rows = list(csv.DictReader(io.StringIO(run("estimate", "gemma-3n-e4b-it", "--format", "csv").out)))
    (first, *_) = labels = [row for row in rows if row["category"] == "incomplete"]
    assert "model type gemma3n" in first["name"]
    assert {row["bytes"] for row in labels} == {""}


def test_a_method_shows_what_is_required_and_what_does_nothing() -> None:
    shown = run("methods", "prefix-tuning").out
    assert "num_virtual_tokens" in shown
    assert "required" in shown
    assert "without effect on memory" in run("methods", "lora").out


def test_a_method_without_formulas_shows_the_fields_of_the_installed_peft() -> None:
    """Each has a name of `peftplan methods`, which said that it was not valid."""
    for name in OTHER_PEFT_TYPES:
        rows = json.loads(run("methods", name.lower(), "--format", "json").out)
        assert {row["field"] for row in rows} == set(field_defaults(name)) - BOOKKEEPING
    assert {"field": "r", "required": False, "default": 8} in json.loads(run("methods", "hra", "--format", "json").out)


def test_json_escapes_what_no_terminal_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that turns the direction of a line (U+202E) is the same to a program, and harmless to a terminal."""
    value = [{"model": "a\u202eb\x1b[31m\x9f\ud800é"}]
    as_json(value)
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert "é" in out
    assert json.loads(out) == value

"""`peftplan serve`: what every format says alike, and bad input in one line."""

from __future__ import annotations

import csv
import io
import json

import pytest

from tests.cli.run import run

JOB = ("./tiny.json", "--target-modules", "q_proj,v_proj", "--r", "4", "--adapters", "3", "--batch-size", "2", "--context", "100")


def test_every_format_says_the_same() -> None:
    document = json.loads(run("serve", *JOB, "--format", "json").out)
    table = csv.DictReader(io.StringIO(run("serve", *JOB, "--format", "csv").out))
    rows = {(row["part"], row["name"]): int(row["bytes"]) for row in table}
    assert rows["adapter_file", "adapter_model.safetensors"] == document["adapter_file"]["bytes"]
    assert rows["merged_checkpoint", "file 1"] == document["merged_checkpoint"]["bytes"]
    assert rows["merge_memory.cpu", "total"] == document["merge_memory"]["cpu"]["total"]
    assert rows["serving", "total"] == document["serving"]["total"]
    for shown in (run("serve", *JOB, columns=80).out, run("serve", *JOB, "--format", "markdown").out):
        for number in (document["adapter_file"]["bytes"], document["merged_checkpoint"]["bytes"], document["serving"]["total"]):
            assert f"{number:,}" in shown


def test_values_are_the_library_s() -> None:
    import peftplan

    document = peftplan.serving("gpt2", method="ia3", adapters=2, batch_size=4).to_dict()
    assert (
        json.loads(run("serve", "gpt2", "--method", "ia3", "--adapters", "2", "--batch-size", "4", "--format", "json").out)
        == document
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("gpt2 --method prompt-tuning --num-virtual-tokens 4 --merge", ["merge", "prompt-tuning", "nothing to merge"]),
        ("gpt2 --method pfeiffer --merge", ["merge", "pfeiffer"]),
        ("gpt2 --adapters 0", ["--adapters must be at least 1 (got 0)"]),
        ("gpt2 --batch-size many", ["--batch-size must be a whole number (got 'many')"]),
        ("gpt2 --context 4096", ["context: 4096", "up to 1024"]),
        ("gpt2 --serving-dtype int8", ["--serving-dtype", "'int8'", "bf16, fp16, fp32"]),
        ("gpt2 --method full --adapters 2", ["adapters", "full"]),
        ("gpt2 --set merge=true", ["--set", "merge=true"]),
        ("gpt3", ["MODEL", "'gpt3'"]),
        ("gpt2 --format xml", ["format", "'xml'"]),
        ("", ["MODEL"]),
    ],
)
def test_bad_input_is_one_line(args: str, expected: list[str]) -> None:
    done = run("serve", *args.split())
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert [text for text in expected if text not in done.err] == [], done.err


def test_without_asking_for_a_merge_the_rest_is_told() -> None:
    done = run("serve", "gpt2", "--method", "prompt-tuning", "--num-virtual-tokens", "4", columns=120)
    assert done.code == 0
    assert "note: prompt-tuning trains virtual tokens, not weights" in done.out
    assert "adapter_model.safetensors" in done.out

"""The JSON contract: keys, types, null for what is not counted, and lines that add up."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from tests.cli.run import run

COUNTED = {"weights", "adapter_weights", "quant_state", "gradients", "optimizer_states", "buffers"}
OF_A_PEAK = {"activations", "logits", "temporaries", "workspaces"}
JOBS = [
    ("llama-2-70b", "--method", "qlora", "--r", "16", "--gpu", "rtx-4090", "--gpu", "a100-80gb"),
    ("mixtral-8x7b", "--optim", "paged_adamw_32bit"),
    ("gpt2", "--method", "full", "--trainer", "plain", "--dtype", "fp32"),
    ("t5-small", "--method", "prompt-tuning", "--num-virtual-tokens", "8"),
]


def estimate(*args: str) -> Any:
    """The parsed JSON of one estimate."""
    done = run("estimate", *args, "--format", "json")
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job[0]}{job[2] if len(job) > 2 else ''}")
def test_keys_and_types(job: tuple[str, ...]) -> None:
    result = estimate(*job)
    assert list(result) == [
        "schema_version",
        "engine",
        "model",
        "method",
        "trainable_parameters",
        "total_parameters",
        "memory",
        "assumptions",
        "warnings",
        "not_modelled",
        "gpus",
        "host",
    ]
    assert result["schema_version"] == 1
    assert result["engine"] == "analytic"
    assert {"name", "model_type", "num_parameters"} <= set(result["model"])
    assert set(result["method"]) == {"name", "config"}
    assert type(result["trainable_parameters"]) is type(result["total_parameters"]) is int
    memory = result["memory"]
    for line in memory["lines"]:
        assert {"category", "name", "bytes", "bytes_by_phase", "formula", "source"} <= set(line)
        assert type(line["bytes"]) is int
        assert line["category"] in COUNTED | OF_A_PEAK
        assert "{" not in line["name"]
    assert set(memory["by_category"]) == COUNTED | OF_A_PEAK
    for verdict in result["gpus"]:
        assert {"name", "usable_bytes", "verdict", "headroom_bytes"} <= set(verdict)
        assert verdict["verdict"] in ("fits", "tight", "does_not_fit", "does_not_run", "unknown")
        assert verdict["headroom_bytes"] <= verdict["usable_bytes"] - memory["peak_allocated"]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job[0])
def test_lines_add_up(job: tuple[str, ...]) -> None:
    memory = estimate(*job)["memory"]
    on_device = [line for line in memory["lines"] if line["place"] == "device"]
    for category, stated in memory["by_category"].items():
        assert stated == sum(line["bytes"] for line in on_device if line["category"] == category)
    assert sum(memory["by_category"].values()) == memory["peak_allocated"] == memory["peak_by_phase"][memory["peak_phase"]]
    assert all(line["bytes_by_phase"][memory["peak_phase"]] == line["bytes"] for line in on_device)
    assert memory["peak_allocated"] == max(memory["peak_by_phase"].values())
    assert {line["place"] for line in memory["lines"]} == {"device"}
    # Paged moments live outside torch's allocator, and so in no line.
    assert (memory["managed"] > 0) == ("paged_adamw_32bit" in job)


def test_what_is_not_counted_is_null_and_named() -> None:
    result = estimate("gpt-neo-125m")  # no formulas: the trace engine knows its activations
    memory = result["memory"]
    assert {memory["by_category"][category] for category in OF_A_PEAK} == {None}
    assert memory["peak_by_phase"] == {"load": None, "forward": None, "backward": None, "step": None}
    for peak in ("peak_phase", "peak_allocated", "peak_reserved", "reserved_source", "runtime_context", "device_total"):
        assert memory[peak] is None
    assert result["not_modelled"]


def test_known_numbers() -> None:
    # Llama-2-70B as meta-llama publishes it, and peft's count for r = 16 on all linear layers.
    result = estimate("llama-2-70b", "--method", "qlora", "--r", "16")
    assert result["model"]["num_parameters"] == 68_976_648_192
    assert result["trainable_parameters"] == 207_093_760
    assert result["total_parameters"] == 69_183_741_952
    assert result["method"]["name"] == "qlora"
    assert result["method"]["config"]["r"] == 16


def test_verdicts() -> None:
    small, large = estimate("llama-2-70b", "--method", "qlora", "--gpu", "rtx-4090", "--gpu", "b200")["gpus"]
    assert (small["name"], small["verdict"]) == ("rtx-4090", "does_not_fit")
    assert small["headroom_bytes"] < 0
    assert (large["name"], large["verdict"]) == ("b200", "fits")


def test_lines_of_one_name_add_up_in_each_phase() -> None:
    """DeepSpeed steps a flat tensor for each group of parameters, so the optimizer has as many step counters of one name."""
    memory = estimate("mistral-7b-v0.3", "--method", "full", "--strategy", "zero3", "--gpus", "3", "--seq-len", "128")["memory"]
    counters = [line for line in memory["lines"] if line["name"].endswith(".step")]
    assert memory["peak_phase"] == "backward"
    assert len(counters) > 1
    assert [line["bytes_by_phase"]["backward"] for line in counters] == [line["bytes"] for line in counters]
    assert sum(line["bytes_by_phase"]["backward"] for line in memory["lines"]) == memory["peak_allocated"]


def test_csv_holds_the_lines_of_the_json() -> None:
    job = ("./tiny.json", "--quant", "nf4", "--optim", "adafactor")
    exact = estimate(*job)
    rows = list(csv.DictReader(io.StringIO(run("estimate", *job, "--format", "csv").out)))
    lines = [{key: str(value) for key, value in line.items() if key != "bytes_by_phase"} for line in exact["memory"]["lines"]]
    assert sorted((row for row in rows if row["category"] != "incomplete"), key=str) == sorted(lines, key=str)
    missing = [] if exact["memory"]["peak_phase"] else exact["not_modelled"]
    assert [row["name"] for row in rows if row["category"] == "incomplete"] == missing


@pytest.mark.parametrize("command", [("models", "llama"), ("gpus", "rtx"), ("methods",), ("methods", "lora")], ids=" ".join)
def test_lists_are_the_same_in_json_and_csv(command: tuple[str, ...]) -> None:
    facts = json.loads(run(*command, "--format", "json").out)
    reader = csv.DictReader(io.StringIO(run(*command, "--format", "csv").out))
    rows = list(reader)
    assert len(rows) == len(facts) > 0
    assert list(reader.fieldnames or ()) == list(facts[0])
    for row, fact in zip(rows, facts, strict=True):
        for name, value in fact.items():
            if value is None:
                assert row[name] == ""
            elif isinstance(value, (str, int)) and not isinstance(value, bool):
                assert row[name] == str(value)


def test_inspect_counts_every_parameter_once() -> None:
    document = json.loads(run("inspect", "bart-base", "--format", "json").out)
    assert sum(module["num_parameters"] for module in document["modules"]) == document["num_parameters"] == 139_420_416

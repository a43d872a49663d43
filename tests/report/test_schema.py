"""`peftplan schema`: what the commands print is valid under it, with no field that it does not know and none missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import pytest
from typing_extensions import NotRequired, TypedDict

import peftplan
from peftplan.allocator.events import Event
from peftplan.cli import COMMANDS as CLI
from peftplan.cli import LazyGroup, cli
from peftplan.report.schema import DIALECT, DOCUMENTS, json_schema, schema_of
from peftplan.units import MIB
from tests.cli.run import run
from tests.results.test_rehearsal import rehearsal
from tools import random_draws

jsonschema = pytest.importorskip("jsonschema")

LOG = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.52 GiB of which "
    "1.00 GiB is free. Including non-PyTorch memory, this process has 22.00 GiB memory in use. Of the allocated memory 20.00 GiB "
    "is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but unallocated."
)
COMMANDS: list[tuple[str, str]] = [
    ("estimate", "estimate llama-2-70b --method qlora --r 16 --gpu rtx-4090,a100-80gb"),
    ("estimate", "estimate qwen3-8b --r 16 --seq-len 8192 --gpu l4 --explain-peak"),
    ("estimate", "estimate mixtral-8x7b --optim paged_adamw_32bit"),
    ("estimate", "estimate gpt2 --method full --trainer plain --dtype fp32 --gpu 8GiB"),
    ("estimate", "estimate t5-small --method prompt-tuning --num-virtual-tokens 8 --gpu t4"),
    ("estimate", "estimate bert-base-uncased --task-type SEQ_CLS --target-modules query,nothing"),
    ("estimate", "estimate qwen2.5-vl-7b-instruct --gpu l4"),
    ("estimate", "estimate llama-3.2-1b --method qlora --attn-implementation flash_attention_2 --gpu t4"),
    ("estimate", "estimate llama-3.2-1b --method qlora --quant gptq --gpu t4"),
    ("fit", "fit llama-3.2-1b --gpu t4 --methods qlora"),
    ("fit", "fit llama-3.1-8b --gpu 4GiB --methods ia3"),
    ("fit", "fit llama-3.2 --gpu t4 --max model --methods qlora"),
    ("fit-cards", "fit llama-3.2-1b --gpu t4,l4 --methods qlora"),
    ("which-gpu", "fit llama-3.2-1b --which-gpu"),
    ("model-family", "fit --model-family qwen3 --gpu t4 --methods qlora"),
    ("compare", "compare llama-3.2-1b --method lora,qlora,full --gpu t4,l4"),
    ("compare", "compare gpt2 --method lora,boft,prefix-tuning"),
    ("explain-oom", "explain-oom LOG"),
    ("explain-oom", "explain-oom LOG --model llama-3.2-1b --batch-size 4"),
    ("serve", "serve llama-3.2-1b --method lora --adapters 8"),
    ("serve", "serve llama-3.2-1b --method qlora --gpu l4,4GiB"),
    ("serve", "serve t5-small --method prefix-tuning --num-virtual-tokens 8"),
    ("serve", "serve bert-base-uncased --method full"),
    ("replay", "replay EVENTS"),
    ("replay", "replay EVENTS --capacity 200MiB"),
    ("inspect", "inspect mixtral-8x7b --match all-linear"),
    ("models", "models qwen3"),
    ("methods", "methods"),
    ("advise", "advise"),
    ("method", "methods lora"),
    ("gpus", "gpus"),
    ("check", "check --sample 12"),
    ("estimate", "estimate llama-3.1-8b --gpu 8xh100-80gb --strategy fsdp2"),
    ("estimate", "estimate llama-3.1-8b --gpu 4xa100-80gb --strategy zero3"),
    ("estimate", "estimate --config CONFIG --gpu l4"),
    ("configs", "configs CONFIG --gpu l4"),
]
CONFIG = """base_model: meta-llama/Llama-3.1-8B
adapter: lora
lora_r: 16
lora_target_linear: true
sequence_len: 1024
micro_batch_size: 1
sample_packing: true
"""


def validator_of(name: str) -> Any:
    """A validator of what a command prints today: a field that its schema does not know is an error."""
    return jsonschema.Draft202012Validator(json_schema(name, closed=True))


@pytest.mark.parametrize(("name", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_what_a_command_prints_is_valid(name: str, line: str, tmp_path: Path) -> None:
    if "EVENTS" in line:
        pytest.importorskip("torch")
        from peftplan.allocator import eventlog

        events = (Event("alloc", 0, 100 * MIB, phase="load", op="load"), Event("alloc", 1, 130 * MIB, phase="forward"))
        eventlog.save(events, tmp_path / "EVENTS", title="tiny")
    (tmp_path / "LOG").write_text(LOG, encoding="utf-8")
    (tmp_path / "CONFIG").with_suffix(".yml").write_text(CONFIG, encoding="utf-8")
    line = line.replace("CONFIG", "CONFIG.yml")
    words = [str(tmp_path / word) if word in ("LOG", "EVENTS", "CONFIG.yml") else word for word in line.split()]
    done = run(*words, "--format", "json")
    assert (done.code, done.err) == (0, "")
    assert list(validator_of(name).iter_errors(json.loads(done.out))) == []


def test_every_document_is_printed_here() -> None:
    assert {name for name, _ in COMMANDS} | {"sweep", "rehearse"} == DOCUMENTS.keys()


def test_a_rehearsal_is_valid() -> None:
    document = json.loads(json.dumps(rehearsal().to_dict()))
    assert list(validator_of("rehearse").iter_errors(document)) == []


@pytest.mark.parametrize("line", ["--gpu t4,l4", "", "--method lora,full,prompt-tuning --gpu t4 --replays 0"])
def test_the_rows_of_a_sweep_are_valid(line: str) -> None:
    pytest.importorskip("numpy")
    validator = validator_of("sweep")
    grid = "sweep llama-3.2-1b --batch-size 1,8 --seq-len 2048:6144:2048 --format jsonl"
    rows = [json.loads(row) for row in run(*grid.split(), *line.split()).out.splitlines()]
    assert len(rows) >= 6
    assert [error for row in rows for error in validator.iter_errors(row)] == []


def test_every_command_that_prints_json_has_a_schema() -> None:
    assert isinstance(cli, LazyGroup)
    commands = [cli.get_command(click.Context(cli), name) for name in CLI]
    accepted = {one.name: param.metavar for one in commands if one for param in one.params if param.name == "fmt"}
    described = {document.command.split()[1] for document in DOCUMENTS.values()}
    assert {name for name, formats in accepted.items() if "json" in str(formats)} - described == {"schema"}


@pytest.mark.parametrize("number", range(40))
def test_a_random_estimate_is_valid(number: int) -> None:
    job = random_draws.draw_job(8, number)
    try:
        result = peftplan.estimate(job.config, **{"gpu": "t4"} | job.options)
    except peftplan.PeftplanError as refused:
        pytest.skip(str(refused))
    document = json.loads(json.dumps(result.to_dict()))
    assert list(validator_of("estimate").iter_errors(document)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_schema_is_one(name: str) -> None:
    schema = json.loads(run("schema", name).out)
    assert (schema["$schema"], schema["$id"]) == (DIALECT, f"urn:peftplan:schema:{name}:1")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "additionalProperties': False" not in str(schema), "a program of today reads the fields of tomorrow"


def test_a_field_that_the_types_do_not_know_is_noticed() -> None:
    document = json.loads(run("estimate", "gpt2", "--format", "json").out)
    validator = validator_of("estimate")
    assert list(validator.iter_errors(document)) == []
    for wrong in (document | {"new": 1}, {k: v for k, v in document.items() if k != "engine"}, document | {"engine": 1}):
        assert not validator.is_valid(wrong)
    document["memory"]["peak_phase"] = "after"
    assert not validator.is_valid(document)


class Inner(NamedTuple):
    """A part."""

    size: int | None
    """Bytes."""


class Outer(TypedDict):
    """A whole."""

    kind: Literal["a", "b"]
    parts: tuple[Inner, ...]
    more: NotRequired[dict[str, float]]
    anything: object


def test_a_type_becomes_a_schema() -> None:
    definitions: dict[str, Any] = {}
    assert schema_of(Outer, definitions, closed=False) == {"$ref": "#/$defs/Outer"}
    assert definitions["Outer"]["properties"] == {
        "kind": {"enum": ["a", "b"]},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/Inner"}},
        "more": {"type": "object", "additionalProperties": {"type": "number"}},
        "anything": {},
    }
    assert definitions["Outer"]["required"] == ["kind", "parts", "anything"]
    assert definitions["Inner"]["properties"] == {"size": {"type": ["integer", "null"]}}


def test_the_list_says_which_command_prints_what() -> None:
    rows = json.loads(run("schema", "--format", "json").out)
    assert [row["name"] for row in rows] == list(DOCUMENTS)
    refused = run("schema", "estimat")
    assert refused.code == 2
    assert refused.err.startswith("peftplan: NAME: 'estimat' is not valid; did you mean estimate? accepted: ")
    assert run("schema", "fit", "--format", "csv").err.startswith("peftplan: --format: a schema is JSON (got csv)")

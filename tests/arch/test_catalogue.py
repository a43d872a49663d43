"""The built-in models: names, aliases, and an index that agrees with the files behind it."""

from __future__ import annotations

import json

import pytest

from peftplan.arch import catalogue
from peftplan.arch.readers import READERS
from peftplan.datafiles import DATA


def test_each_model_has_one_name() -> None:
    assert len(catalogue.models()) == 441
    keys: dict[str, str] = {}
    for entry in catalogue.models():
        for name in (entry.name, entry.repo_id, *entry.aliases, *entry.siblings):
            key = name.lower().replace("_", "-")
            assert keys.setdefault(key, entry.name) == entry.name, f"{name} names two models"


@pytest.mark.parametrize(
    ("name", "repo_id"),
    [
        ("llama-2-70b", "meta-llama/Llama-2-70b-hf"),
        ("Llama_2 70B", "meta-llama/Llama-2-70b-hf"),
        ("meta-llama/llama-2-70b-HF", "meta-llama/Llama-2-70b-hf"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama-7b", "huggyllama/llama-7b"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("gpt2", "openai-community/gpt2"),
        ("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("kimi-k2", "moonshotai/Kimi-K2-Instruct"),
    ],
)
def test_well_known_names(name: str, repo_id: str) -> None:
    entry = catalogue.find(name)
    assert entry is not None
    assert entry.repo_id == repo_id


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        # Counts that the models' publishers print: model cards and papers, not this project's arithmetic.
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("gpt2", 124_439_808),
        ("llama-7b", 6_738_415_616),
        ("qwen2.5-0.5b", 494_032_768),
    ],
)
def test_published_counts(name: str, num_parameters: int) -> None:
    entry = catalogue.find(name)
    assert entry is not None
    assert entry.num_parameters == num_parameters


def test_the_index_says_what_the_files_say() -> None:
    for entry in catalogue.models():
        facts = json.loads((DATA / "models" / f"{entry.name}.json").read_text(encoding="utf-8"))
        assert facts["name"] == entry.name
        assert facts["config"]["model_type"] == entry.model_type
        assert facts["config"]["architectures"] == [facts["model_class"]] == [entry.model_class]
        assert facts["num_parameters"] == entry.num_parameters
        assert facts["source"]
        assert not {"transformers_version", "torch_dtype", "auto_map"} & set(facts["config"])
    files = {path.stem for path in (DATA / "models").glob("*.json")} - {"index"}
    assert files == {entry.name for entry in catalogue.models()}


def test_names_follow_their_rule_and_can_be_file_names() -> None:
    for entry in catalogue.models():
        last = entry.repo_id.split("/")[1].lower().replace("_", "-")
        assert entry.name in (last, last.removesuffix("-hf"), last.removeprefix("meta-"))


def test_a_difference_to_the_published_count_is_explained() -> None:
    unverified = {entry.name for entry in catalogue.models() if not entry.verified}
    without = {"opt-30b", "opt-66b", "minitron-8b-base", "open-llama-3b", "all-minilm-l6-v2"}
    without |= {"nvidia-nemotron-3.5-lightning-30b-a3b-bf16"}
    without |= {"deberta-v2-xxlarge", "deberta-v3-small", "deberta-v3-xsmall"}
    assert unverified == without
    for entry in catalogue.models():
        facts = entry.facts()
        if entry.verified and facts["published_params"] != entry.num_parameters:
            assert "published total is" in facts["note"] or "counts" in facts["note"], entry.name


def test_patterns() -> None:
    assert {e.name for e in catalogue.models("llama-2")} == {"llama-2-7b", "llama-2-13b", "llama-2-70b"}
    assert {e.name for e in catalogue.models("Llama-2-?b")} == {"llama-2-7b"}
    assert {e.model_type for e in catalogue.models("mpt")} == {"mpt"}
    assert catalogue.models("no such model") == ()
    assert set(catalogue.models("llama3")) > set(catalogue.models("llama-3-"))
    assert not {"llama-30b", "codellama-34b"} & {e.name for e in catalogue.models("llama3")}
    assert catalogue.models("qwen-3-8b") == catalogue.models("qwen3-8b")


def test_an_unknown_name_says_what_is_near_and_what_is_accepted() -> None:
    error = catalogue.unknown("lama-2-70b")
    assert "did you mean llama-2-70b" in str(error)
    assert "did you mean llama-3.1-8b-instruct " in str(catalogue.unknown("llama-3.1-8b-instructt"))
    assert "did you mean Qwen/Qwen3-8B?" in str(catalogue.unknown("https://huggingface.co/Qwen/Qwen3-8B/tree/main"))
    assert "Hub id" in str(error)
    assert "path" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["", " ", "llama", "x" * 10_000, "\0", "-", "é"])
def test_what_is_no_name_finds_nothing(name: str) -> None:
    assert catalogue.find(name) is None
    assert len(str(catalogue.unknown(name))) < 400


def test_a_model_without_a_reader_has_a_weight_table() -> None:
    tables = {path.stem for path in (DATA / "weights").glob("*.json")}
    assert tables == {entry.name for entry in catalogue.models() if entry.model_type not in READERS}

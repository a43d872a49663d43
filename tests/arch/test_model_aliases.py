"""Further names of built-in models: each row has a source, names a model of the catalogue, and the result says which is used."""

from __future__ import annotations

from pathlib import Path

import pytest

import peftplan
from peftplan.arch import catalogue
from peftplan.datafiles import load
from peftplan.errors import InputError
from peftplan.job import sources
from tests.cli.run import run

DATA = load("model_aliases.json", dict)


def test_each_row_has_its_source_and_an_original_of_the_catalogue() -> None:
    for alias, row in DATA["aliases"].items():
        source = DATA["sources"][row["source"]]
        assert source["file"]
        assert source["licence"] in ("Apache-2.0", "MIT")
        entry = next(entry for entry in catalogue.models() if entry.name == row["model"])
        assert row["original"] in (entry.repo_id, *entry.aliases, *entry.siblings), alias


def test_each_checkpoint_of_the_same_shapes_has_its_source() -> None:
    """The catalogue's own lists too: what the source states of both is the same."""
    siblings = {name for entry in catalogue.models() for name in entry.siblings}
    assert siblings == set(DATA["siblings"])
    assert set(DATA["siblings"].values()) <= set(DATA["sources"])


@pytest.mark.parametrize("name", ["ibm-granite/granite-3.0-8b-instruct", "granite-3.0-2b-instruct"])
def test_a_checkpoint_with_another_vocabulary_is_no_alias(name: str) -> None:
    """Granite 3.0's instruct models have 49,155 tokens, their base models 49,152."""
    assert catalogue.find(name) is None


def test_a_checkpoint_whose_q_k_and_v_are_clamped_is_no_alias() -> None:
    """allenai/OLMo, configs/official-0724/OLMo-7B-0724.yaml: clip_qkv 8.0; the first OLMo 7B has none."""
    assert catalogue.find("allenai/OLMo-7B-0724-hf") is None


def test_hermes_2_pro_is_a_model_of_its_own() -> None:
    """It has 32 tokens more than Llama 3: 32 x 4,096 more in the embedding and in the head."""
    own, base = catalogue.find("NousResearch/Hermes-2-Pro-Llama-3-8B"), catalogue.find("llama-3-8b")
    assert own is not None
    assert base is not None
    assert own.num_parameters - base.num_parameters == 2 * 32 * 4096


def test_no_alias_hides_a_name_of_the_catalogue() -> None:
    names = {name.lower() for e in catalogue.models() for name in (e.name, e.repo_id, *e.aliases, *e.siblings)}
    assert names.isdisjoint(alias.lower() for alias in DATA["aliases"])


def test_mirrors_that_load_in_another_format_or_class_are_no_aliases() -> None:
    """A bnb-4bit or FP8 checkpoint loads as it is stored; Unsloth's Phi mirrors have separate q, k and v projections."""
    aliases = [alias.lower() for alias in DATA["aliases"]]
    assert [alias for alias in aliases if "4bit" in alias or "fp8" in alias or alias.startswith("unsloth/phi")] == []
    assert catalogue.find("unsloth/llama-3-8b-bnb-4bit") is None


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("llama-3.1-8b-instruct", "llama-3.1-8b"),
        ("Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("unsloth/llama-3-8b", "llama-3-8b"),
        ("unsloth/mistral-7b-instruct-v0.3", "mistral-7b-v0.3"),
        ("NousResearch/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("qwen2.5-7b-instruct", "qwen2.5-7b"),
    ],
)
def test_the_result_names_the_model_that_was_used(name: str, model: str) -> None:
    result, own = peftplan.estimate(name, r=4), peftplan.estimate(model, r=4)
    assert result.model["name"] == model
    assert result.assumptions["model"] == own.assumptions["model"]
    assert result.trainable_parameters == own.trainable_parameters
    used = own.assumptions["model"].removeprefix("built-in: ").partition(",")[0]
    assert f"{name} has the shapes of the built-in {used}, which is used for it" in result.assumptions["notes"]


@pytest.mark.parametrize(
    ("typed", "model"),
    [
        ("llama3-8b", "llama-3-8b"),
        ("Qwen-3-8B", "qwen3-8b"),
        ("phi4", "phi-4"),
        ("llama3.1:8b", "llama-3.1-8b"),
        ("mistral:7b", "mistral-7b-v0.3"),
        ("zephyr-7b-alpha", "mistral-7b-v0.1"),
    ],
)
def test_another_spelling_of_a_name_is_understood(typed: str, model: str) -> None:
    assert catalogue.find(typed) is None
    assert run("estimate", typed).out.startswith(f"{model} · ")


def test_a_spelling_that_several_models_have_means_none() -> None:
    """Qwen2.5-Coder-0.5B-Instruct has two mirrors with other shapes."""
    assert catalogue.spelled("qwen2.5-coder-0.5b-instruct") is None


def test_a_folder_of_the_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phi4").mkdir()
    with pytest.raises(InputError, match="config"):
        sources.load("phi4")


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("llama3", "llama-3-8b or llama-3-70b or llama-3.1-8b (`peftplan models llama3` lists more)?"),
        ("mixtral", "mixtral-8x7b or mixtral-8x22b or"),
        ("deepseek", "deepseek-r1 or deepseek-v2 or deepseek-v3 (`peftplan models deepseek` lists more)?"),
        ("gpt-oss", "gpt-oss-20b or gpt-oss-120b"),
    ],
)
def test_a_family_leads_to_its_models(typed: str, near: str) -> None:
    """Different models, the shortest names first; llama-30b is none of Llama 3."""
    assert f"did you mean {near}" in str(catalogue.unknown(typed))
    assert len(catalogue.models(typed)) > 1


def test_no_suffix_is_stripped_by_rule() -> None:
    for name in ("llama-3.1-8b-instruct-v2", "gpt2-instruct", "qwen2.5-7b-chat"):
        done = run("estimate", name)
        assert done.code == 2
        assert "did you mean" in done.err

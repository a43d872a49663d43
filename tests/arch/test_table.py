"""Weight tables: nothing is lost on the way through JSON, and the shipped ones are what transformers builds today."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from peftplan.arch import catalogue
from peftplan.arch.modules import NO_DROPOUT, Architecture, Buffer, Module, PromptDims
from peftplan.arch.table import from_table, load_table, to_table
from peftplan.datafiles import DATA
from peftplan.job.sources import load

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_field_survives_the_round_trip() -> None:
    arch = Architecture(
        model_type="toy",
        model_class="ToyForCausalLM",
        task_type="CAUSAL_LM",
        modules=(
            Module("", "Module", (("logit_scale", ()),)),
            Module("layers.{}.a", "Linear", (("weight", (3, 4)), ("bias", (3,))), (0, 1, 2, 5, 7, 8)),
            Module("layers.{}.b", "RMSNorm", (("weight", (4,)),), (3,)),
            Module("head", "Linear", (("weight", (9, 4)),)),
        ),
        ties=(("head.weight", "embed.weight"),),
        buffers=(Buffer("rotary.inv_freq", "fp32", (2,)), Buffer("layers.{}.mask", "bool", (1, 8, 8), (0, 1))),
        hidden_size=4,
        vocab_size=9,
        input_embedding="embed",
        output_embedding="head",
        keep_in_fp32=("wo",),
        keep_in_fp32_strict=("gate",),
        frozen=("embed.weight",),
        logits_ops=("scale",),
        supports_sdpa=False,
        prompt=PromptDims(8, 4, 2, num_key_value_heads=1, head_dim=2, num_transformer_submodules=2),
    )
    table = json.loads(json.dumps(to_table(arch)))
    assert from_table(table) == arch
    assert [row[3] for row in table["modules"]] == [None, "0-2,5,7-8", "3", None]


def test_a_readers_architecture_survives_without_its_blocks() -> None:
    arch = load("gpt2")
    assert from_table(to_table(arch)) == replace(
        arch,
        blocks=(),
        dropout=NO_DROPOUT,
        max_positions=None,
        logits_ops=arch.logits_ops,
        name="",
        source="",
        notes=(),
        asides=(),
    )


def test_a_table_counts_what_the_index_states() -> None:
    """Two ways to one number: the sum over a table's tensors, and the count that its source published or explains."""
    for path in sorted((DATA / "weights").glob("*.json")):
        entry, arch = catalogue.find(path.stem), load_table(path.stem)
        assert entry is not None
        assert arch is not None
        assert (arch.num_parameters, arch.model_class, arch.model_type) == (
            entry.num_parameters,
            entry.model_class,
            entry.model_type,
        )


def test_no_table_for_a_model_with_a_reader() -> None:
    assert load_table("llama-2-70b") is None


@pytest.mark.parametrize(
    "name", ["mamba-130m", "zamba2-2.7b", "kimi-k2-instruct", "llama-4-scout-17b-16e", "clip-vit-base-patch16"]
)
def test_regenerating_gives_the_shipped_file(name: str) -> None:
    pytest.importorskip("transformers")
    tables = tool("weight_tables")
    entry = catalogue.find(name)
    assert entry is not None
    text = tables.table_text(to_table(tables.architecture(entry)))
    assert text == (DATA / "weights" / f"{name}.json").read_text(encoding="utf-8")


def test_the_index_is_what_the_maintainers_tool_writes() -> None:
    adding = tool("add_model")
    assert adding.index_text(adding.read_entries()) == (DATA / "models" / "index.json").read_text(encoding="utf-8")


def test_a_model_is_added_with_the_real_models_count(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    adding = tool("add_model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.0",
        "vocab_size": 32,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    folder = tmp_path / "models"
    folder.mkdir()
    options = ["--repo-id", "me/Meta-Toy_Model-hf", "--source", "a test"]
    assert adding.main([str(file), *options], folder=folder) == 0
    entry = json.loads((folder / "toy-model.json").read_text())
    # embedding 32·8; a layer: q, o 2·8·8, k, v 2·4·8, MLP 3·8·16, two norms 2·8 = 592; last norm 8; lm_head tied
    assert entry["num_parameters"] == 256 + 3 * (128 + 64 + 384 + 16) + 8
    assert entry["config"]["dtype"] == "bfloat16"
    assert "transformers_version" not in entry["config"]
    (row,) = json.loads((folder / "index.json").read_text())
    assert (row["name"], row["model_type"], row["verified"]) == ("toy-model", "llama", False)

"""Every built-in model against transformers' own, built on the meta device: each name, each shape, ties, buffers, the total."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from peftplan.arch import catalogue
from peftplan.arch.catalogue import ModelEntry
from peftplan.arch.readers import READERS
from peftplan.job.sources import load
from peftplan.libraries.meta import quiet_transformers
from tests.arch.meta import assert_same, build

PROMISED = (
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj gpt_bigcode opt"
    " bloom falcon mpt starcoder2 stablelm cohere cohere2 olmo olmo2 granite granitemoe deepseek_v2 deepseek_v3 gpt_oss smollm3"
    " glm glm4 bert roberta xlm-roberta distilbert deberta-v2 modernbert t5 mt5 bart vit whisper"
    " ministral3 seed_oss hunyuan_v1_dense exaone4 arcee ernie4_5 glm4_moe glm4_moe_lite lfm2 nemotron_h falcon_h1"
    " gemma4_text gemma4_unified_text olmo3 olmoe nemotron apertus"
    " qwen3_5_text qwen3_5_moe_text qwen3_next"
)
"""The model types that the analytic engine promises to know layer by layer."""

COUNTED_AS = {"kimi_k2": "deepseek_v3"}
"""Remote code, and the native type that has the same tensors."""


@pytest.mark.parametrize("entry", catalogue.models(), ids=lambda entry: entry.name)
def test_tensors_equal_those_of_the_real_model(entry: ModelEntry) -> None:
    arch = load(entry.name)
    config = dict(entry.facts()["config"])
    config["model_type"] = COUNTED_AS.get(entry.model_type, entry.model_type)
    with quiet_transformers():
        assert_same(arch, build(config, entry.model_class))
    assert arch.num_parameters == entry.num_parameters
    assert arch.model_class == entry.model_class
    assert arch.name == entry.name
    assert arch.source.startswith(f"built-in: {entry.repo_id}")


def test_every_promised_reader_is_there() -> None:
    assert set(PROMISED.split()) <= set(READERS)
    folder = Path(catalogue.__file__).parent
    assert [m for m, _, _ in READERS.values() if not (folder / f"{m}.py").is_file()] == []

"""The meta-device reader: equal to the adapters where both can read, to the real model elsewhere, and one line where neither."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("transformers")

from peftplan.arch import catalogue
from peftplan.arch.modules import Architecture, PromptDims
from peftplan.arch.readers import read_config
from peftplan.errors import InputError, MissingExtraError, UnknownNameError
from peftplan.libraries.meta import is_native, read_architecture
from tests.arch.meta import assert_prompt, assert_same, build

MAMBA = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 40,
}


def tensors(arch: Architecture) -> list[tuple[str, str, Any]]:
    return sorted((name, m.kind, m.params) for m in arch.modules for name in m.names())


def buffers(arch: Architecture) -> set[tuple[str, str, Any]]:
    return {(b.name.replace("{}", str(i)), b.dtype, b.shape) for b in arch.buffers for i in b.layers or (0,)}


def prefix_dims(prompt: PromptDims | None) -> tuple[int | None, ...] | None:
    """The dimensions that the stated ones lead to: a head_dim that follows from the others may be stated or not."""
    if prompt is None:
        return None
    heads = prompt.num_attention_heads
    head_dim = prompt.head_dim or (prompt.token_dim // heads if heads else None)
    kv_dim = head_dim if prompt.num_key_value_heads else None
    return (prompt.num_layers, prompt.token_dim, heads, prompt.num_key_value_heads, kv_dim, prompt.num_transformer_submodules)


ADAPTED = (
    "llama-3.1-8b mixtral-8x7b qwen1.5-moe-a2.7b qwen3-30b-a3b gemma-2-2b gemma-3-1b-pt phi-2 phi-3-mini gpt2 pythia-70m gpt-j"
    " starcoder opt-350m bloom-560m falcon-7b falcon-40b mpt-7b starcoder2-3b stablelm-2-1.6b command-r7b olmo-1b olmo-2-1b"
    " granite-3.0-2b-base deepseek-v2-lite deepseek-v3 gpt-oss-20b smollm3-3b glm-4-9b-0414 bert-base-uncased roberta-base"
    " distilbert deberta-v3-base modernbert-base t5-small flan-t5-small mt5-small bart-base vit-base whisper-tiny"
)


@pytest.mark.parametrize("name", ADAPTED.split())
def test_equal_to_the_adapter(name: str) -> None:
    entry = catalogue.find(name)
    assert entry is not None
    config = entry.facts()["config"]
    ours, theirs = read_config(config, name=name), read_architecture(config, name=name)
    assert tensors(ours) == tensors(theirs)
    assert buffers(ours) == buffers(theirs)
    assert set(ours.ties) == set(theirs.ties)
    assert prefix_dims(ours.prompt) == prefix_dims(theirs.prompt)
    assert ours.last_module().name == theirs.last_module().name
    for field in ("model_type", "model_class", "task_type", "hidden_size", "vocab_size", "input_embedding", "output_embedding"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for field in ("keep_in_fp32", "keep_in_fp32_strict", "frozen"):
        assert set(getattr(ours, field)) == set(getattr(theirs, field)), field
    assert ours.supports_sdpa == theirs.supports_sdpa
    assert ours.supports_flash_attn == theirs.supports_flash_attn


@pytest.mark.parametrize(
    "name", ["gemma-4-e2b", "gemma-4-31b", "qwen3.5-0.8b", "llava-1.5-7b", "jamba", "mistral-small-3.1-24b-instruct-2503"]
)
def test_prompt_dimensions_lead_to_pefts_own(name: str) -> None:
    pytest.importorskip("peft")
    entry = catalogue.find(name)
    assert entry is not None
    config = entry.facts()["config"]
    assert_prompt(read_architecture(config, name=name), config)


@pytest.mark.parametrize(
    ("task_type", "model_class"),
    [
        (None, "MambaForCausalLM"),
        ("CAUSAL_LM", "MambaForCausalLM"),
        ("FEATURE_EXTRACTION", "MambaModel"),
    ],
)
def test_a_config_without_architectures(task_type: str | None, model_class: str) -> None:
    arch = read_architecture(MAMBA, name="made up", task_type=task_type)
    assert arch.model_class == model_class
    assert_same(arch, build(dict(MAMBA), model_class))
    assert arch.task_type == (task_type or "CAUSAL_LM")


def test_families_are_split_where_shapes_differ() -> None:
    arch = read_architecture({**catalogue.find("jamba").facts()["config"]}, name="jamba")  # type: ignore[union-attr]
    attention = [m.layers for m in arch.modules if m.name == "model.layers.{}.self_attn.q_proj"]
    # Jamba: attention in layers 4, 12, 20, 28 (attn_layer_period 8, offset 4), Mamba in the others
    assert attention == [(4, 12, 20, 28)]


def test_num_labels_makes_the_head() -> None:
    config = {**LLAMA, "num_labels": 7}
    arch = read_architecture(config, name="made up", task_type="SEQ_CLS")
    assert next(m for m in arch.modules if m.name == "score").params == (("weight", (7, 16)),)
    assert arch == read_architecture({**config, "architectures": ["LlamaForCausalLM"]}, name="made up", task_type="SEQ_CLS")


def test_remote_code_is_never_run(tmp_path: Any) -> None:
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": f"{tmp_path}--modeling_evil.Evil"}}
    assert read_architecture(config, name="made up") == read_architecture(LLAMA, name="made up")


def test_the_users_settings_are_left_alone() -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_info()
    before = torch.get_default_dtype()
    read_architecture(LLAMA, name="made up")
    assert transformers.logging.get_verbosity() == transformers.logging.INFO
    assert torch.get_default_dtype() == before
    transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "lama"}, UnknownNameError, "did you mean llama"),
        ({"num_hidden_layers": 10**9}, InputError, "num_hidden_layers"),
        ({"num_hidden_layers": 1e300}, InputError, "num_hidden_layers"),
        ({"hidden_size": "16"}, InputError, "hidden_size"),
        ({"hidden_size": -16}, InputError, "refuses"),
        ({"hidden_size": 2**70}, InputError, "refuses"),
        ({"vocab_size": 2**62, "hidden_size": 2**40}, InputError, "refuses"),
        ({"rope_scaling": "wrong"}, InputError, "refuses"),
    ],
)
def test_a_damaged_config_is_one_line(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        read_architecture({**LLAMA, **change}, name="made up")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("task_type", ["IMAGE_CLS", "MASKED_LM"])
def test_a_task_without_a_class_names_those_that_there_are(task_type: str) -> None:
    with pytest.raises(UnknownNameError, match="CAUSAL_LM"):
        read_architecture(MAMBA, name="made up", task_type=task_type)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"'mamba'.*peftplan\[trace\]"):
        read_architecture(MAMBA, name="made up")


def test_native_types() -> None:
    assert is_native("mamba")
    assert not is_native("kimi_k2")

"""The merged model's checkpoint, byte for byte what `save_pretrained` of the merged model writes, in one file and in shards."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peftplan  # noqa: E402
from peftplan import parameters  # noqa: E402
from peftplan.arch.readers import READERS  # noqa: E402
from peftplan.deployment.checkpoint import MAX_SHARD_BYTES, merged_storages, shards  # noqa: E402
from peftplan.deployment.safetensors import StoredTensor  # noqa: E402
from peftplan.methods.adaptation import Adaptation  # noqa: E402
from tests.methods import matrix, tiny  # noqa: E402

MERGED: list[tuple[str, str, str | None, dict[str, Any]]] = [
    ("llama", "lora", None, {"target_modules": "all-linear"}),
    ("qwen2", "lora", None, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),  # tied before
    ("qwen2", "lora", None, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("qwen2", "lora", None, {"target_modules": ["embed_tokens", "q_proj"]}),
    ("qwen2", "lora", None, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    ("qwen2", "dora", None, {"target_modules": "all-linear"}),
    ("mixtral", "lora", None, {"target_modules": "all-linear"}),
    ("t5", "lora", None, {"target_modules": ["q", "v"], "modules_to_save": ["shared"]}),
    ("bart", "lora", None, {"target_modules": ["q_proj"], "modules_to_save": ["shared"]}),
    ("bert", "lora", "SEQ_CLS", {"target_modules": ["query"], "bias": "all"}),
    ("gpt2", "adalora", None, {"target_modules": ["c_attn"], "total_step": 10}),
    ("llama", "loha", None, {"target_modules": ["q_proj"]}),
    ("llama", "lokr", None, {"target_modules": ["q_proj"]}),
    ("llama", "vera", None, {"target_modules": ["q_proj"]}),
    ("bert", "ia3", "SEQ_CLS", {}),
    ("llama", "oft", None, {"target_modules": ["q_proj"], "oft_block_size": 8}),
    ("opt", "boft", None, {"target_modules": ["q_proj"]}),
    ("gpt2", "fourierft", None, {"target_modules": ["c_attn"], "n_frequency": 11}),
    ("gpt_neox", "ln-tuning", None, {"target_modules": ["input_layernorm"]}),
]  # fmt: skip


def sizes(folder: Path) -> list[int]:
    """Bytes of the files with tensors."""
    return sorted(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "method", "task", "options"), MERGED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_merged_model(model: str, method: str, task: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = tiny.peft_of(model, method, task, device="cpu", **options).merge_and_unload()
        merged.save_pretrained(tmp_path)
    checkpoint = peftplan.serving(tiny.config_of(model), method=method, task_type=task, dtype="fp32", **options).checkpoint
    assert list(checkpoint.files) == sizes(tmp_path)


@pytest.mark.parametrize("model_type", list(READERS))
def test_every_model_type(model_type: str, tmp_path: Path) -> None:
    """Names and shapes as on the hub, one file, and many of at most 200,000 bytes of tensors."""
    arch, model = matrix.architecture(model_type), matrix.real(model_type, None, "cpu")
    built = parameters.build(arch, Adaptation(), dtype="fp32", adapter_dtype="fp32", quant=None, kbit_prepare=False)
    storages = merged_storages(arch, Adaptation(), built, dtype="fp32")
    for most in (MAX_SHARD_BYTES, 200_000):
        copy.copy(model).save_pretrained(tmp_path / str(most), max_shard_size=most)
        sizes_of_ours = shards(storages, max_shard_bytes=most)
        if model_type != "modernbert" or most == MAX_SHARD_BYTES:
            assert sorted(sizes_of_ours) == sizes(tmp_path / str(most))


def test_a_buffer_of_the_state_dict_and_a_dtype(tmp_path: Path) -> None:
    model = matrix.real("bart", None, "cpu")
    built = parameters.build(
        matrix.architecture("bart"), Adaptation(), dtype="bf16", adapter_dtype="fp32", quant=None, kbit_prepare=False
    )
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    assert list(shards(merged_storages(matrix.architecture("bart"), Adaptation(), built, dtype="bf16"))) == sizes(tmp_path)


def test_shards_by_hand() -> None:
    def storage(name: str, elements: int) -> tuple[StoredTensor, ...]:
        return (StoredTensor(name, "int8", (elements,)),)

    def file(entries: str, nbytes: int) -> int:
        header = '{"__metadata__":{"format":"pt"},' + entries + "}"
        return 8 + -(-len(header) // 8) * 8 + nbytes

    # 30 + 60 fill the first file of 100, 200 stand alone before it, 40 begin another
    assert shards([storage("a", 30), storage("b", 60), storage("c", 200), storage("d", 40)], max_shard_bytes=100) == (
        file('"c":{"dtype":"I8","shape":[200],"data_offsets":[0,200]}', 200),
        file('"a":{"dtype":"I8","shape":[30],"data_offsets":[0,30]},"b":{"dtype":"I8","shape":[60],"data_offsets":[30,90]}', 90),
        file('"d":{"dtype":"I8","shape":[40],"data_offsets":[0,40]}', 40),
    )

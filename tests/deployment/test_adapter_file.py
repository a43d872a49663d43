"""The adapter's file, byte for byte what peft's `save_pretrained` writes, for every method of peft that has formulas here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peftplan  # noqa: E402
from peftplan.dtypes import parse_dtype  # noqa: E402
from tests.methods import tiny  # noqa: E402

BOTH = ["q_proj", "down_proj"]
CASES: list[tuple[str, str, str | None, dict[str, Any]]] = [
    # model, method, task, options
    ("llama", "lora", None, {"target_modules": "all-linear"}),
    ("llama", "lora", None, {"target_modules": BOTH, "bias": "lora_only", "modules_to_save": ["lm_head"]}),
    ("llama", "lora", None, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    ("llama", "lora", None, {"target_modules": "all-linear", "trainable_token_indices": [1, 5, 7]}),
    ("llama", "lora", None, {"target_modules": BOTH, "rank_pattern": {r"layers.1.*q_proj": 3}, "layers_to_transform": [0, 1]}),
    ("gpt2", "lora", None, {"target_modules": "all-linear", "bias": "all"}),
    ("bert", "lora", "SEQ_CLS", {"target_modules": ["query", "value"], "bias": "all"}),
    ("mixtral", "lora", None, {"target_modules": "all-linear"}),
    ("qwen2", "dora", None, {"target_modules": "all-linear"}),
    ("qwen2", "rslora", None, {"target_modules": BOTH, "r": 3}),
    ("qwen2", "lora+", None, {"target_modules": BOTH}),
    ("qwen2", "lora-fa", None, {"target_modules": BOTH}),
    ("gpt2", "adalora", None, {"target_modules": "all-linear", "total_step": 10}),
    ("llama", "loha", None, {"target_modules": "all-linear"}),
    ("bert", "lokr", "SEQ_CLS", {"target_modules": "all-linear", "r": 2}),
    ("llama", "vera", None, {"target_modules": BOTH}),
    ("llama", "vera", None, {"target_modules": BOTH, "save_projection": False}),
    ("t5", "ia3", None, {}),
    ("llama", "oft", None, {"target_modules": BOTH, "oft_block_size": 8}),
    ("opt", "boft", None, {"target_modules": ["q_proj"], "bias": "boft_only"}),
    ("gpt2", "fourierft", None, {"target_modules": ["c_attn"], "n_frequency": 11}),
    ("qwen3", "ln-tuning", None, {}),
    ("bert", "ln-tuning", "TOKEN_CLS", {"target_modules": ["LayerNorm"]}),
    ("qwen2", "prefix-tuning", None, {"num_virtual_tokens": 4}),
    ("llama", "prefix-tuning", "SEQ_CLS", {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 20}),
    ("t5", "prompt-tuning", None, {"num_virtual_tokens": 5}),
    ("bert", "p-tuning", "SEQ_CLS", {"num_virtual_tokens": 5}),
    ("gpt2", "p-tuning", None, {"num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16}),
]  # fmt: skip


def ours(model: str, method: str, task: str | None, options: dict[str, Any], **more: Any) -> Any:
    """The file that peftplan states, of a base in fp32."""
    if tiny.METHODS[method].peft_type == "LORA":
        options = {"target_modules": "peft-default", **options}
    config = tiny.config_of(model)
    return peftplan.serving(config, method=method, task_type=task, dtype=more.pop("dtype", "fp32"), **options, **more).file


@pytest.mark.parametrize(("model", "method", "task", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_bytes_of_the_file(model: str, method: str, task: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    # LoRA-FA is LoRA with an optimizer that leaves A frozen.
    adapted = tiny.peft_of(model, method.replace("lora-fa", "lora"), task, device="cpu", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path)
    written = tmp_path / "adapter_model.safetensors"
    file_of_ours = ours(model, method, task, options)
    from safetensors import safe_open

    with safe_open(written, "pt") as file:
        theirs = {key: (tuple(t.shape), parse_dtype(t.dtype)) for key in file.keys() for t in (file.get_tensor(key),)}  # noqa: SIM118
    assert {t.name: (t.shape, t.dtype) for t in file_of_ours.tensors} == theirs
    assert file_of_ours.num_bytes == written.stat().st_size


def test_every_method_of_peft_is_among_the_cases() -> None:
    assert {method for _, method, _, _ in CASES} | {"qlora", "qdora"} == {m.name for m in tiny.METHODS.values() if m.peft_type}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_base_in_16_bits(dtype: str) -> None:
    """The adapter stays in fp32, copies of saved modules have the dtype of the base."""
    options = {"target_modules": BOTH, "modules_to_save": ["lm_head"]}
    base = tiny.real("llama", None, "cpu").to(getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype]))
    with patch.object(tiny, "real", lambda *_: base):
        adapted = tiny.peft_of("llama", "lora", device="cpu", **options)
    theirs = {k: (tuple(v.shape), parse_dtype(v.dtype)) for k, v in peft.get_peft_model_state_dict(adapted).items()}
    file_of_ours = ours("llama", "lora", None, options, dtype=dtype)
    assert {t.name: (t.shape, t.dtype) for t in file_of_ours.tensors} == theirs
    assert file_of_ours.dtypes == (dtype, "fp32")
    tiny.real.cache_clear()


def test_by_hand() -> None:
    """One layer, one target: A (2, 8) and B (8, 2) in fp32, or in bf16 where TRL trains on a quantized base."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}  # fmt: skip
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"]
    # {"__metadata__":{"format":"pt"},"NAME":{"dtype":"F32","shape":[2,8],"data_offsets":[0,64]},"NAME":{...[8,2]...[64,128]}}
    header = 32 + sum(len(f'"{name}":') for name in names) + 52 + 1 + 54 + 1
    adapter_file = peftplan.serving(config, target_modules=["q_proj"], r=2).file
    assert adapter_file.num_bytes == 8 + -(-header // 8) * 8 + 2 * 64
    trl = peftplan.serving(config, target_modules=["q_proj"], r=2, trainer="trl", quant="nf4").file
    assert trl.dtypes == ("bf16",)
    # the same header, `BF16` for `F32` and shorter offsets: [0,32], [32,64]
    assert trl.num_bytes == 8 + -(-(header + 2 - 1) // 8) * 8 + 2 * 32

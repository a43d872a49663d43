"""The files of methods without formulas here, byte for byte what peft's `save_pretrained` writes of a real model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peftplan  # noqa: E402
from tests.methods import tiny, witness  # noqa: E402

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "DELORA", {"target_modules": ["q_proj"], "r": 4}),
    ("llama", "HIRA", {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["lm_head"]}),
    ("llama", "GLORA", {"target_modules": ["q_proj"], "r": 4}),
    ("llama", "LILY", {"target_modules": ["q_proj", "v_proj"]}),
    ("qwen2", "VBLORA", {"target_modules": ["q_proj"], "num_vectors": 16, "vector_length": 8, "topk": 2,
                        "save_only_topk_weights": True}),
    ("qwen2", "SHIRA", {"target_modules": ["q_proj"], "r": 4}),
    ("qwen2", "UNILORA", {"target_modules": ["q_proj"]}),
    ("llama", "TRAINABLE_TOKENS", {"token_indices": [1, 2, 3]}),
    ("llama", "WAVEFT", {"target_modules": ["q_proj"], "n_frequency": 50}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "peft_type", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_bytes_of_the_file(model: str, peft_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = witness.peft_model(tiny.real(model, None, "cpu"), cls(task_type="CAUSAL_LM", **options), device="cpu")
        adapted.save_pretrained(tmp_path)
    serving = peftplan.serving(tiny.config_of(model), method=peft_type.lower().replace("_", "-"), dtype="fp32", **options)
    assert serving.file is not None, serving.refused
    assert serving.file.num_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size

"""Host memory of loading and merging against the own memory of a process that does it, with transformers' loader on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.units import MIB

pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
PROGRAM = Path(__file__).with_name("loaded_in_host.py")
SLACK = 8 * MIB
"""Python's own objects for the modules."""


def config(hidden_size: int, layers: int, vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": vocab_size, "tie_word_embeddings": False,
    }  # fmt: skip


TINY, MODEL = config(64, 2, 256), config(1536, 4, 16_000)


def saved(folder: Path, fields: dict[str, Any], dtype: Any) -> str:
    architecture = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    return str(folder)


def measured(*folders: str) -> list[dict[str, int]]:
    """Of each folder after the first, what a process of all of them measured."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"}  # freed memory goes back at once
    done = subprocess.run([sys.executable, str(PROGRAM), *folders], check=True, capture_output=True, text=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process")
def test_own_memory_is_what_is_said(tmp_path: Path) -> None:
    host = peftplan.estimate(MODEL, r=16, seq_len=128).host
    (merge, *_) = peftplan.serving(MODEL, r=16).merges
    assert host is not None
    assert host.merging == merge.total
    models = {"tiny": (TINY, torch.bfloat16), "fp32": (MODEL, torch.float32), "bf16": (MODEL, torch.bfloat16)}
    converted, mapped = measured(*(saved(tmp_path / name, *model) for name, model in models.items()))
    assert converted["loaded"] == pytest.approx(host.loading.bytes, rel=0.01, abs=SLACK)
    assert converted["merging"] == pytest.approx(merge.need.num_bytes, rel=0.05, abs=SLACK)
    assert mapped["loaded"] == pytest.approx(merge.adapter, rel=0.1, abs=SLACK), "the base is mapped from its file"
    assert mapped["loaded"] + mapped["merging"] < host.merging + SLACK

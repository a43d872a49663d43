"""Bytes of a file: a sum by hand, and what the library writes for tensors of every dtype."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from peftplan.deployment.safetensors import CODES, StoredTensor, file_bytes, header_bytes

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

TORCH = {
    "bool": "bool", "uint8": "uint8", "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64", "fp16": "float16",
    "bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "complex64": "complex64", "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}  # fmt: skip


def test_by_hand() -> None:
    # {"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}
    #  31 characters with the brace and the comma, 4 for the name, 53 for the entry, 1 brace: 88 → 88, already a multiple of 8
    header = '{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    assert len(header) == 88
    assert header_bytes([StoredTensor("w", "fp32", (2, 3))]) == 88
    assert file_bytes([StoredTensor("w", "fp32", (2, 3))]) == 8 + 88 + 24
    assert header_bytes([StoredTensor("ww", "fp32", (2, 3))]) == 96  # 89 characters and 7 blanks


def test_as_the_library_writes_it(tmp_path: Path) -> None:
    dice = random.Random(0)
    assert set(CODES) == set(TORCH)
    for case in range(60):
        shapes = [tuple(dice.randint(1, 40) for _ in range(dice.randint(0, 3))) for _ in range(dice.randint(1, 30))]
        tensors = [StoredTensor(f"layer.{'é' * (case % 2)}{i}", dice.choice(list(TORCH)), s) for i, s in enumerate(shapes)]
        zeros = {t.name: torch.zeros(t.shape).to(getattr(torch, TORCH[t.dtype])) for t in tensors}
        save_file(zeros, tmp_path / "file", metadata={"format": "pt"})
        assert file_bytes(tensors) == (tmp_path / "file").stat().st_size

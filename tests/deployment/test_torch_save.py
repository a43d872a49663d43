"""Bytes of what `torch.save` writes, against torch: on the CPU, and on CUDA by fake tensors whose data is not written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from peftplan.deployment.torch_save import SavedTensor, file_bytes

torch = pytest.importorskip("torch")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "uint8": torch.uint8}


def real(value: Any) -> Any:
    """The same value with torch's tensors."""
    if isinstance(value, SavedTensor):
        return torch.empty(value.shape, dtype=DTYPES[value.dtype], device=value.device)
    if isinstance(value, dict):
        return {key: real(item) for key, item in value.items()}
    return [real(item) for item in value] if isinstance(value, list) else value


def state(
    count: int, *, shapes: list[tuple[int, ...]], dtype: str = "fp32", device: str = "cpu", shared: bool = False
) -> dict[str, Any]:
    """What an AdamW of `count` parameters saves; `shared`: equal states are one dict, as those of equal layers are."""
    draw = random.Random(count)
    states, of_shape = {}, {}
    for number in range(count):
        shape = draw.choice(shapes)
        moment = SavedTensor(dtype, shape, device)
        states[number] = {"step": SavedTensor("fp32", (), device), "exp_avg": moment, "exp_avg_sq": moment}
        if shared:
            states[number] = of_shape.setdefault(shape, states[number])
    group = {"lr": 0.5, "foreach": None, "fused": True, "large": 2**40, "negative": -1, "params": list(range(count))}
    return {"state": states, "param_groups": [group, {**group, "params": []}], "betas": tuple(float(n) for n in range(count % 5))}


SHAPES = [(3, 5), (7,), (64, 64), (1,), (700, 2), (4, 64, 3)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 40, 100, 999, 1000, 1001])
def test_a_state_on_the_cpu(count: int, shared: bool, tmp_path: Path) -> None:
    saved = state(count, shapes=SHAPES, dtype=random.Random(count).choice(list(DTYPES)), shared=shared)
    torch.save(real(saved), tmp_path / "optimizer.pt")
    assert file_bytes(saved, stem="optimizer") == (tmp_path / "optimizer.pt").stat().st_size


@pytest.mark.parametrize(("count", "shape"), [(3, (4, 4)), (300, (16, 8)), (6, (30000, 16384)), (3, (130000, 16384))])
def test_a_state_on_a_card_beyond_four_gigabytes(count: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """The file is sparse: sizes are written, data is not."""
    from torch._subclasses import FakeTensorMode

    saved = state(count, shapes=[shape], device="cuda:0")
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(real(saved), tmp_path / "optimizer.pt")
    assert file_bytes(saved, stem="optimizer") == (tmp_path / "optimizer.pt").stat().st_size

"""DoRA's first norm against peft's own code on the CPU: both engines share `Norm.take`; neither can witness the other."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb
import torch
from peft.tuners.lora.dora import DoraLinearLayer

from peftplan.memory.dora_load import Norm
from tests.trace.storages import SCALARS, Storages

N_OUT, N_IN, RANK = 768, 512, 4
BLOCKS = N_OUT * N_IN // 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASES = [
    *((dtype, dtype) for dtype in DTYPES),
    *((packed, dtype) for packed in ("nf4", "nf4 doubled", "int8") for dtype in ("bf16", "fp16")),
]
"""What a weight is stored in, and its dtype before."""


class Device:
    """Notes the sizes of tensors, and the highest level of those that are alive."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.level = self.peak = 0

    def allocate(self, nbytes: int) -> int:
        self.sizes += [nbytes] if nbytes > SCALARS else []
        self.level += nbytes
        self.peak = max(self.peak, self.level)
        return nbytes

    def release(self, nbytes: int, /) -> None:
        self.level -= nbytes

    def keep(self, sizes: tuple[int, ...], /) -> None:
        raise AssertionError("nothing of a norm stays")

    def empty_cache(self) -> None:
        raise AssertionError("no norm empties the cache")


def loaded(base: str, dtype: str, norm: Norm) -> tuple[Any, Norm]:
    """A layer as it is loaded, by bitsandbytes where it is packed, and its bytes."""
    weight = torch.randn(N_OUT, N_IN, dtype=DTYPES[dtype])
    layer: Any = torch.nn.Linear(N_IN, N_OUT, bias=False, dtype=weight.dtype)
    if base == "int8":
        layer = bnb.nn.Linear8bitLt(N_IN, N_OUT, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        norm = norm._replace(packed=N_OUT * N_IN, dtype="fp32")
    elif base not in DTYPES:
        doubled = base == "nf4 doubled"
        layer = bnb.nn.Linear4bit(N_IN, N_OUT, bias=False, quant_type="nf4", compress_statistics=doubled)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=doubled)
        code, absmax = 4 * 16, 4 * BLOCKS
        state = (BLOCKS, code, 4, 4 * BLOCKS // 256, 4 * 256) if doubled else (absmax, code)
        norm = norm._replace(packed=N_OUT * N_IN // 2, state=state, absmax=absmax if doubled else 0)
    return layer.to("cpu"), norm


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize(("base", "dtype"), BASES)
def test_it_takes_what_peft_takes(base: str, dtype: str, adapter_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, norm = loaded(base, dtype, Norm(N_OUT, N_IN, RANK, dtype, adapter_dtype))
    # Without this kernel peft multiplies as it does inside, in sight.
    monkeypatch.delattr(bnb.functional, "int8_vectorwise_dequant")
    a, b = (torch.randn(*shape, dtype=DTYPES[adapter_dtype]) for shape in ((RANK, N_IN), (N_OUT, RANK)))
    dora, seen = DoraLinearLayer(fan_in_fan_out=False), Storages()
    there = (a, b, layer.weight, getattr(layer.weight, "SCB", a))
    seen.known.update(tensor.untyped_storage()._cdata for tensor in there)
    with seen:
        dora.update_layer(base_layer=layer, lora_A=a, lora_B=b, scaling=2.0)

    device, at_product = Device(), list[int]()
    temporaries = norm.take(device, lambda: at_product.append(device.level))
    assert sorted([*device.sizes, dora.weight.nbytes]) == sorted(seen.sizes)
    assert device.peak == pytest.approx(seen.peak, abs=SCALARS)
    for nbytes in temporaries:
        device.release(nbytes)
    assert device.level == 0
    assert len(at_product) == 1

"""DoRA's first norms against rehearsals and peft's own code: both engines share `Norm.take`; neither can witness the other."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest

from peftplan import estimate
from peftplan.memory.dora_load import Norm
from tools.rehearsed_jobs import LOOP

SHAPE = {"method": "lora", "use_dora": True, "r": 8, "batch_size": 1, "seq_len": 128, "device_map": "none"}
REHEARSED: dict[str, tuple[dict[str, Any], int]] = {
    "fp16, multiplied as fp32": (
        {"method": "qlora", "dtype": "fp16", "compute_dtype": "fp16", "trainer": "plain", "script": LOOP},
        225_291_776,
    ),
    "8 bits, restored as fp32": ({"quant": "int8", "kbit_prepare": False, "trainer": "transformers"}, 196_648_960),
}
"""Jobs of SmolLM2 135M → the highest level of loading, by `tools.rehearsed_jobs` with the CUDA build of torch 2.13."""


@pytest.mark.parametrize("job", REHEARSED)
def test_loading_holds_what_was_rehearsed(job: str) -> None:
    options, rehearsed = REHEARSED[job]
    assert estimate("smollm2-135m", **{**SHAPE, **options}).to_dict()["memory"]["peak_by_phase"]["load"] == rehearsed


N_OUT, N_IN, RANK = 768, 512, 4
SMALL = 64
"""Bytes of the smallest tensor that is followed: the code table of NF4. Copying a layer makes and frees tensors of 4 bytes."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BASES = [
    *((dense, dense) for dense in DTYPES),
    *((packed, dtype) for packed in ("nf4", "nf4 doubled", "int8") for dtype in ("bf16", "fp16")),
]
"""What a weight is stored in, and its dtype before."""


class Noted:
    """Tensors as they come: their sizes, and the highest level of those that are alive."""

    def __init__(self) -> None:
        self.sizes: Counter[int] = Counter()
        self.level = self.peak = 0

    def allocate(self, nbytes: int) -> int:
        if nbytes >= SMALL:
            self.sizes[nbytes] += 1
            self.level += nbytes
            self.peak = max(self.peak, self.level)
        return nbytes

    def release(self, nbytes: int, /) -> None:
        self.level -= nbytes if nbytes >= SMALL else 0

    def keep(self, sizes: tuple[int, ...], /) -> None:
        raise AssertionError("nothing of a norm stays")

    def empty_cache(self) -> None:
        raise AssertionError("no norm empties the cache")


def by_peft(base: str, adapter_dtype: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Noted, Norm]:
    """What `DoraLinearLayer.update_layer` makes beside the magnitude, and the layer as it is loaded."""
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    dora = pytest.importorskip("peft.tuners.lora.dora")
    mode = pytest.importorskip("torch.utils._python_dispatch").TorchDispatchMode
    weight = torch.randn(N_OUT, N_IN, dtype=getattr(torch, DTYPES.get(base, DTYPES[dtype])))
    norm = Norm(N_OUT, N_IN, RANK, base, adapter_dtype)
    if base in DTYPES:
        layer = torch.nn.Linear(N_IN, N_OUT, bias=False, dtype=weight.dtype)
    elif base == "int8":
        layer = bnb.nn.Linear8bitLt(N_IN, N_OUT, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        monkeypatch.delattr(bnb.functional, "int8_vectorwise_dequant")  # peft then multiplies as that kernel does, but in sight
        norm = norm._replace(packed=N_OUT * N_IN, dtype="fp32")
    else:
        doubled = base == "nf4 doubled"
        layer = bnb.nn.Linear4bit(N_IN, N_OUT, bias=False, quant_type="nf4", compress_statistics=doubled)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=doubled)
        blocks = N_OUT * N_IN // 64
        absmax = 4 * blocks
        state = (blocks, 16 * 4, 4, blocks // 256 * 4, 256 * 4) if doubled else (absmax, 16 * 4)
        norm = norm._replace(packed=N_OUT * N_IN // 2, dtype=dtype, state=state, absmax=absmax if doubled else 0)
    layer = layer.to("cpu")
    a, b = (torch.randn(*shape, dtype=getattr(torch, DTYPES[adapter_dtype])) for shape in ((RANK, N_IN), (N_OUT, RANK)))
    noted, alive = Noted(), {tensor.untyped_storage()._cdata for tensor in (a, b, layer.weight, getattr(layer.weight, "SCB", a))}

    class Watch(mode):  # type: ignore[misc, valid-type]
        """Notes the storages of results."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            storage = result.untyped_storage() if isinstance(result, torch.Tensor) else None
            if storage is not None and storage._cdata not in alive:
                alive.add(storage._cdata)
                weakref.finalize(storage, alive.discard, storage._cdata)
                if "norm" not in str(func):
                    weakref.finalize(storage, noted.release, noted.allocate(storage.nbytes()))
            return result

    with Watch():
        dora.DoraLinearLayer(False).update_layer(base_layer=layer, lora_A=a, lora_B=b, scaling=2.0)
    return noted, norm


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize(("base", "dtype"), BASES)
def test_a_norm_takes_what_pefts_own_code_takes(
    base: str, dtype: str, adapter_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft, norm = by_peft(base, adapter_dtype, dtype, monkeypatch)
    ours, products = Noted(), list[int]()
    left = norm.take(ours, lambda: products.append(ours.level))
    assert (ours.sizes, ours.peak) == (peft.sizes, peft.peak)
    for nbytes in left:
        ours.release(nbytes)
    assert ours.level == 0
    assert len(products) == 1

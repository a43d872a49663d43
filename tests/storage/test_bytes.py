"""Stored tensors against what bitsandbytes and transformers really allocate: name, dtype, dims and bytes of each."""

from __future__ import annotations

import pytest

from peftplan.ledger import Allocation
from peftplan.storage import category, parse_quant, shared, stored
from peftplan.units import round512

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

SHAPES = [
    (1, 1), (1, 2), (3, 1), (1, 63), (1, 64), (5, 13), (65, 1), (8, 8), (31, 33), (64, 64), (64, 65), (127, 129),
    (100, 77), (256, 64), (128, 128), (130, 126), (257, 255), (512, 33), (33, 512), (896, 128), (1000, 777), (640, 641),
]  # fmt: skip
SHORT = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float64": "fp64"}
SHORT["torch.float8_e4m3fn"] = "fp8_e4m3"

Tensors = dict[str, tuple[str, tuple[int, ...], int]]


def real(**tensors: torch.Tensor) -> Tensors:
    """Each tensor as (dtype, dims, bytes of its storage); no two may share one."""
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)
    return {
        name: (SHORT.get(str(t.dtype), str(t.dtype).removeprefix("torch.")), tuple(t.shape), t.untyped_storage().nbytes())
        for name, t in tensors.items()
    }  # fmt: skip


def planned(allocations: tuple[Allocation, ...]) -> Tensors:
    return {a.name: (a.dtype, a.dims, a.nbytes) for a in allocations}


def params4bit(weight: torch.Tensor, **options: object) -> Tensors:
    """The tensors of a weight that bitsandbytes quantized, under our names."""
    param = bnb.nn.Params4bit(weight, requires_grad=False, **options).to("cpu")
    state = param.quant_state
    tensors = {"weight": param.data, "absmax": state.absmax, "code": state.code}
    if state.nested:
        tensors |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
    return real(**tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4bit_is_what_bitsandbytes_allocates(name: str, double_quant: bool, shape: tuple[int, int]) -> None:
    quant = parse_quant(name, double_quant=double_quant)
    weight = torch.randn(shape, dtype=torch.bfloat16)
    expected = params4bit(weight, quant_type=name, compress_statistics=double_quant)
    assert planned(stored(quant, shape=shape, dtype="bf16")) == expected


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_other_block_sizes(blocksize: int) -> None:
    quant = parse_quant("nf4", double_quant=True, blocksize=blocksize)
    expected = params4bit(torch.randn(128, 96), quant_type="nf4", compress_statistics=True, blocksize=blocksize)
    assert planned(stored(quant, shape=(128, 96), dtype="fp32")) == expected


@pytest.mark.parametrize("storage", ["uint8", "int8", "float16", "bfloat16", "float32", "float64"])
def test_quant_storage_changes_the_dtype_and_not_the_bytes(storage: str) -> None:
    quant = parse_quant("nf4", quant_storage=storage)
    dtype = getattr(torch, storage)
    expected = params4bit(torch.randn(48, 64), quant_type="nf4", compress_statistics=False, quant_storage=dtype)
    allocations = stored(quant, shape=(48, 64), dtype="bf16")
    assert planned(allocations) == expected
    assert allocations[0].nbytes == 48 * 64 // 2


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_what_bitsandbytes_allocates(shape: tuple[int, int]) -> None:
    layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
    assert layer.weight.CB.data_ptr() == layer.weight.data_ptr()  # one tensor under two names
    expected = real(weight=layer.weight.data, SCB=layer.weight.SCB)
    assert planned(stored(parse_quant("int8"), shape=shape, dtype="bf16")) == expected


def test_int8_keeps_nothing_else_after_a_step() -> None:
    layer = bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
    layer(torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    kept = [v for v in (*vars(layer.state).values(), layer.weight.data) if isinstance(v, torch.Tensor) and v.numel()]
    bytes_kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(bytes_kept.values()) == 48 * 64 + 4 * 48


@pytest.mark.parametrize(
    ("shape", "plain", "double"),
    [
        # 4096×4096: 8388608 packed + 4·262144 absmax + 512 code; 8388608 + 262144 + 4·1024 + 512 + 1024 + 512
        ((4096, 4096), 9_437_696, 8_656_896),
        # 14336×4096: 29360128 + 4·917504 + 512; 29360128 + 917504 + 4·3584 + 512 + 1024 + 512
        ((14336, 4096), 33_030_656, 30_294_016),
        # 1000×777: R(388500) 388608 + R(4·12141) 48640 + 512; 388608 + R(12141) 12288 + R(4·48) 512 + 512 + 1024 + 512
        ((1000, 777), 437_760, 403_456),
    ],
)
def test_4bit_bytes_as_the_allocator_counts_them(shape: tuple[int, int], plain: int, double: int) -> None:
    for double_quant, expected in ((False, plain), (True, double)):
        allocations = stored(parse_quant("nf4", double_quant=double_quant), shape=shape, dtype="bf16")
        assert sum(round512(a.nbytes) for a in allocations) == expected


def test_double_quantization_shares_one_map_per_process() -> None:
    bnb.functional.name2qmap.clear()
    params4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=False)
    assert not bnb.functional.name2qmap
    params4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    (table,) = bnb.functional.name2qmap.values()
    assert planned(shared(parse_quant("nf4", double_quant=True))) == real(dynamic_map=table)
    assert shared(parse_quant("nf4")) == shared(parse_quant("int8")) == shared(None) == ()


def test_categories() -> None:
    split = {a.name: category(a.name) for a in stored(parse_quant("nf4", double_quant=True), shape=(8, 8), dtype="bf16")}
    assert [name for name, kind in split.items() if kind == "weights"] == ["weight"]
    assert {kind for name, kind in split.items() if name != "weight"} == {"quant_state"}
    packed = [stored(parse_quant(name), shape=(256, 256), dtype="bf16")[0].name for name in ("gptq", "awq", "hqq")]
    assert [category(name) for name in packed] == ["weights"] * 3


def test_stored_never_grows_with_a_narrower_format() -> None:
    total = {
        name: sum(a.nbytes for a in stored(quant, shape=(4096, 4096), dtype="bf16"))
        for name, quant in {
            "nf4+dq": parse_quant("nf4", double_quant=True),
            "nf4": parse_quant("nf4"),
            "int8": parse_quant("int8"),
            "bf16": parse_quant("none"),
        }.items()
    }
    assert list(total.values()) == sorted(total.values())
    assert total["bf16"] == 2 * 4096 * 4096

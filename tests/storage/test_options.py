"""The words and options of `--quant`, and the packed layouts as sums by hand."""

from __future__ import annotations

import pytest

from peftplan.errors import InputError, RefusedError, UnknownNameError
from peftplan.storage import (
    FORMATS,
    check_trainable,
    is_skipped,
    keys_to_not_convert,
    parse_quant,
    quantized_modules,
    stored,
)
from peftplan.units import round512


def layout(name: str, shape: tuple[int, ...], **options: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    quant = parse_quant(name, **options)  # type: ignore[arg-type]
    return {a.name: (a.dtype, a.dims) for a in stored(quant, shape=shape, dtype="bf16")}


def test_gptq() -> None:
    # 4 bits: 8 inputs to a word down the rows, 8 outputs to a word across; 4096/128 = 32 groups; 32/4 = 8 shifts
    assert layout("gptq", (14336, 4096)) == {
        "qweight": ("int32", (512, 14336)),
        "qzeros": ("int32", (32, 1792)),
        "scales": ("fp16", (32, 14336)),
        "g_idx": ("int32", (4096,)),
        "wf_unsqueeze_zero": ("int32", (1, 1, 8)),
    }
    # 3 bits: 128·3/32 = 12 words hold 128 inputs, 64·3/32 = 6 hold 64 outputs; one group of the whole row
    assert layout("gptq", (64, 128), bits=3, group_size=-1) == {
        "qweight": ("int32", (12, 64)),
        "qzeros": ("int32", (1, 6)),
        "scales": ("fp16", (1, 64)),
        "g_idx": ("int32", (128,)),
        "wf_unsqueeze_zero": ("int32", (1, 1, 3, 12)),
    }
    # inputs that are no multiple of the group: 96 = 64 + 32
    assert layout("gptq", (32, 96), group_size=64)["scales"] == ("fp16", (2, 32))


def test_gptq_bytes() -> None:
    # 4096×4096, 4 bits, 128: 8388608 qweight + 4·32·512 qzeros + 2·32·4096 scales + 4·4096 g_idx + R(32) shifts
    allocations = stored(parse_quant("gptq"), shape=(4096, 4096), dtype="fp16")
    assert sum(round512(a.nbytes) for a in allocations) == 8_388_608 + 65_536 + 262_144 + 16_384 + 512


def test_gptq_of_a_conv1d_is_that_of_its_transpose() -> None:
    quant = parse_quant("gptq")
    assert stored(quant, shape=(768, 2304), dtype="fp16", kind="Conv1D") == stored(quant, shape=(2304, 768), dtype="fp16")


def test_awq() -> None:
    # 8 outputs to a word, 4096 rows; 32 groups of 128
    assert layout("awq", (1024, 4096)) == {
        "qweight": ("int32", (4096, 128)),
        "qzeros": ("int32", (32, 128)),
        "scales": ("fp16", (32, 1024)),
    }


def test_hqq() -> None:
    # 48×200 = 9600 elements, 150 groups of 64; 4 bits: two groups to a row; 3 bits: 150/10 = 15 rows of words
    assert layout("hqq", (48, 200)) == {
        "W_q": ("uint8", (75, 64)),
        "scale": ("bf16", (150, 1)),
        "zero": ("bf16", (150, 1)),
    }
    assert layout("hqq", (48, 200), bits=3)["W_q"] == ("int32", (15, 64))
    # 64×128 = 128 groups of 64: padded to 130 for 3 bits
    assert layout("hqq", (64, 128), bits=3)["W_q"] == ("int32", (13, 64))
    assert layout("hqq", (64, 128), bits=1, group_size=8)["W_q"] == ("uint8", (128, 8))
    explicit = parse_quant("hqq", compute_dtype="float16")
    assert {a.dtype for a in stored(explicit, shape=(64, 128), dtype="bf16")} == {"uint8", "fp16"}


def test_sizes_that_the_libraries_refuse() -> None:
    refused = [
        ("gptq", (100, 128), {}),
        ("gptq", (128, 100), {}),
        ("awq", (4, 128), {}),
        ("awq", (128, 192), {}),  # not a multiple of the group of 128
        ("hqq", (48, 200), {"group_size": 128}),  # 75 groups do not pack in twos
        ("hqq", (7, 9), {}),
        ("nf4", (5, 13), {"quant_storage": "bfloat16"}),  # 33 bytes
    ]
    for name, shape, options in refused:
        with pytest.raises(RefusedError, match=name if name != "nf4" else "quant_storage"):
            stored(parse_quant(name, **options), shape=shape, dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="multiple of 32"):
        stored(parse_quant("mxfp4"), shape=(2, 48, 64), dtype="bf16")


def test_only_fp8_and_mxfp4_store_three_dimensions() -> None:
    experts = (8, 256, 512)
    for name in FORMATS:
        if name in ("fp8", "mxfp4"):
            assert len(stored(parse_quant(name), shape=experts, dtype="bf16")) == 2
        else:
            with pytest.raises(InputError, match=f"{name} stores weights of 2 dimensions"):
                stored(parse_quant(name), shape=experts, dtype="bf16")


def test_dense() -> None:
    (weight,) = stored(parse_quant("none"), shape=(3, 5, 7), dtype="fp32")
    assert (weight.name, weight.dtype, weight.dims, weight.nbytes) == ("weight", "fp32", (3, 5, 7), 420)


def test_defaults_are_the_libraries_own() -> None:
    nf4 = parse_quant("nf4")
    assert nf4 is not None
    assert (nf4.bits, nf4.double_quant, nf4.blocksize, nf4.compute_dtype, nf4.quant_storage) == (
        4, False, 64, "fp32", "uint8",
    )  # fmt: skip
    gptq, hqq = parse_quant("gptq"), parse_quant("hqq")
    assert gptq is not None
    assert hqq is not None
    assert (gptq.bits, gptq.group_size, hqq.bits, hqq.group_size) == (4, 128, 4, 64)


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("int8", {"double_quant": True}, "double_quant"),
        ("nf4", {"bits": 3}, "quant_bits"),
        ("nf4", {"blocksize": 100}, "quant_blocksize"),
        ("nf4", {"group_size": 64}, "quant_group_size"),
        ("gptq", {"bits": 5}, "quant_bits"),
        ("gptq", {"skip_modules": ("lm_head",)}, "quant_skip_modules"),
        ("awq", {"group_size": 100}, "quant_group_size"),
        ("int8", {"compute_dtype": "bf16"}, "compute_dtype"),
        ("nf4", {"compute_dtype": "int8"}, "compute_dtype"),
        ("hqq", {"quant_storage": "uint8"}, "quant_storage"),
    ],
)
def test_options_that_a_format_does_not_have(name: str, options: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_quant(name, **options)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean nf4"):
        parse_quant("nf44")


def test_mxfp4_is_not_trainable_and_the_rest_is() -> None:
    with pytest.raises(RefusedError, match="dequantize=True"):
        check_trainable(parse_quant("mxfp4"))
    for name in ("none", "nf4", "fp4", "int8", "fp8", "gptq", "awq", "hqq"):
        check_trainable(parse_quant(name))


MODULES = [
    ("model.embed_tokens", "Embedding"),
    ("model.layers.0.self_attn.q_proj", "Linear"),
    ("model.layers.0.mlp.gate", "Router"),
    ("model.layers.0.mlp.experts", "Experts"),
    ("model.norm", "Module"),
    ("lm_head", "Linear"),
]


def converted(name: str, modules: list[tuple[str, str]] = MODULES, skip: tuple[str, ...] | None = None) -> set[str]:
    return quantized_modules(
        parse_quant(name, skip_modules=skip),
        modules=modules,
        ties={},
        output_embedding="lm_head",
        last_parameter="lm_head.weight",
        model_type="gpt_oss",
    )


def test_what_each_format_converts() -> None:
    q, experts = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"
    assert {name: converted(name) for name in ("none", *FORMATS)} == {
        "none": set(),
        "nf4": {q},
        "fp4": {q},
        "int8": {q},
        "fp8": {q, experts},
        "mxfp4": {experts},
        "gptq": {q},
        "awq": {q},
        "hqq": {q},
    }


def test_default_list_has_ties_output_and_last_parameter() -> None:
    ties = {"head.weight": "embed.weight"}
    keys = keys_to_not_convert(ties=ties, output_embedding="out", last_parameter="classifier.bias")
    assert keys == {"head", "embed", "out", "classifier.bias"}
    assert not is_skipped("classifier", keys)


def test_skip_lists() -> None:
    assert converted("nf4", skip=("q_proj",)) == {"lm_head"}
    assert converted("awq", skip=("q_proj",)) == set()  # joins the default, which has lm_head
    with pytest.raises(InputError, match="quant_skip_modules"):
        converted("nf4", skip=("(",))


def test_gptq_needs_blocks_that_it_knows() -> None:
    with pytest.raises(RefusedError, match="finds no blocks"):
        converted("gptq", [("bert.encoder.layer.0.output.dense", "Linear")])

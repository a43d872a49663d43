"""Bytes by hand, names and errors: no other library needed."""

from __future__ import annotations

import pytest

from peftplan.errors import InputError, RefusedError, UnknownNameError
from peftplan.optim import OPTIMIZERS, REFUSED, parse_optim, parse_optim_args, shared_states, states


def nbytes(optim, *, shape, place="device", dtype="bf16", shared=False, **options):
    allocations = states(optim, shape=shape, dtype=dtype, **options)
    if shared:
        allocations += shared_states(optim, states=allocations)
    return sum(state.nbytes for state in allocations if state.place == place)


MATRIX = (4096, 1024)  # n = 4,194,304 elements; ⌈n/256⌉ = 16,384


@pytest.mark.parametrize(
    ("optim", "dtype", "device_bytes"),
    [
        ("adamw_torch", "bf16", 16_777_216),  # 4 B/param; `step` is on the CPU
        ("adamw_torch", "fp32", 33_554_432),  # 8 B/param
        ("adamw_torch_fused", "bf16", 16_777_220),  # + 4 B of `step`
        ("adafactor", "bf16", 20_484),  # 4·4096 + 4·1024 + 4 B of RMS
        ("sgd", "bf16", 0),
        ("adagrad", "bf16", 8_388_608),  # 2 B/param
        ("rmsprop", "fp32", 16_777_216),  # 4 B/param
        ("adamw_8bit", "bf16", 8_521_728),  # 2n + 8·16,384 = 8,388,608 + 131,072, + 2·1024 of tables
        ("ademamix", "bf16", 50_331_648),  # 12 B/param
        ("ademamix_8bit", "bf16", 12_781_568),  # 3n + 12·16,384 = 12,582,912 + 196,608, + 2048
        ("lion_32bit", "bf16", 16_777_216),  # 4 B/param
        ("lion_8bit", "bf16", 4_260_864),  # n + 4·16,384 = 4,194,304 + 65,536, + 1024
        ("rmsprop_bnb", "bf16", 16_777_216),  # the name without bits is 32-bit
        ("rmsprop_bnb_8bit", "bf16", 4_260_864),
        ("adamw_torch_8bit", "bf16", 8_521_728),  # 2·(n + 4·16,384 + 1024)
        ("adamw_torch_4bit", "bf16", 4_325_504),  # 2·(n/2 + 4·16,384 + 64)
        ("lomo", "bf16", 0),
        ("adalomo", "bf16", 20_480),  # 4·4096 + 4·1024
        ("schedule_free_adamw", "bf16", 16_777_216),  # z and one moment: 4 B/param
        ("schedule_free_radam", "fp32", 33_554_432),
        ("schedule_free_sgd", "bf16", 8_388_608),  # z
        ("stable_adamw", "bf16", 25_165_830),  # 6 B/param with Kahan, + 2 of eps_sq + 4 of mean_square
        ("stable_adamw", "fp32", 33_554_441),  # 8 B/param, + 4 + 1 + 4
        ("grokadamw", "bf16", 0),  # on the CPU
    ],
)
def test_one_matrix(optim, dtype, device_bytes):
    assert nbytes(optim, shape=MATRIX, dtype=dtype, shared=True) == device_bytes


def test_host_states():
    assert nbytes("grokadamw", shape=MATRIX, place="host") == 25_165_824  # 6 B/param: three bf16 averages
    assert nbytes("adamw_torch", shape=MATRIX, place="host") == 4  # `step`


def test_paged_states_are_managed_from_100_000_elements_on():
    assert nbytes("paged_adamw_32bit", shape=(100_000,), place="managed") == 800_000
    assert nbytes("paged_adamw_32bit", shape=(99_999,), place="managed") == 0
    assert nbytes("paged_adamw_32bit", shape=(99_999,)) == 799_992
    assert nbytes("paged_adamw_8bit", shape=(100_000,), place="managed") == 200_000
    assert nbytes("paged_adamw_8bit", shape=(100_000,)) == 3_128  # absmax stays: 8·⌈100,000/256⌉ = 8·391


def test_embeddings_keep_32_bit_states_with_8_bit_optimizers():
    # Llama-3.1-8B's 128,256 × 4096 embedding: 8 B/param = 4,202,692,608 against 2n + 8⌈n/256⌉ = 1,067,089,920 + tables
    table = (128_256, 4096)
    assert nbytes("adamw_8bit", shape=table, in_embedding=True, shared=True) == 4_202_692_608
    assert nbytes("adamw_8bit", shape=table) == 1_067_089_920


def test_code_tables_are_shared_once():
    allocations = states("adamw_8bit", shape=MATRIX, dtype="bf16") + states("adamw_8bit", shape=(512, 512), dtype="bf16")
    assert [(table.name, table.nbytes) for table in shared_states("adamw_8bit", states=allocations)] == [
        ("qmap1", 1024),
        ("qmap2", 1024),
    ]
    assert shared_states("adamw_8bit", states=states("adamw_8bit", shape=(64,), dtype="bf16")) == ()
    assert shared_states("adamw_torch", states=allocations) == ()


@pytest.mark.parametrize(
    ("optim", "dtype", "optim_args", "device_bytes"),
    [
        # 4096 × 1024, rank 128, right side: moments 2·(4096·128) elements; bf16 keeps 128 rows of Vh, 128·1024
        ("galore_adamw", "bf16", {}, 2 * 1_048_576 + 2 * 131_072),
        # fp32 keeps all of Vh: 1024·1024
        ("galore_adamw", "fp32", {}, 4 * 1_048_576 + 4 * 1_048_576),
        # the fp32 SVD again, rows 4096 and columns 128 of the projected gradient, RMS
        ("galore_adafactor", "bf16", {}, 4 * 1_048_576 + 4 * 4096 + 4 * 128 + 4),
        # 8-bit moments of 524,288 elements, absmax 2·2048 fp32, two tables, unorm_vec
        ("galore_adamw_8bit", "bf16", {}, 2 * 131_072 + 2 * 524_288 + 2 * 4 * 2048 + 2048 + 4),
        ("galore_adamw_8bit_layerwise", "bf16", {}, 2 * 131_072 + 2 * 524_288 + 2 * 4 * 2048 + 2048 + 4),
        ("apollo_adamw", "bf16", {"rank": "1", "scale_type": "tensor"}, 2 * (2 * 4096 + 1024 + 1)),
        ("apollo_adamw", "fp32", {"proj": "svd", "rank": "1"}, 4 * (2 * 4096 + 1024 * 1024 + 1)),
    ],
)
def test_low_rank_targets(optim, dtype, optim_args, device_bytes):
    assert nbytes(optim, shape=MATRIX, dtype=dtype, in_target=True, optim_args=optim_args, shared=True) == device_bytes


def test_muon_of_dion_has_a_momentum_of_matrices_inside_layers():
    """A second moment, and a step of 4 bytes on the device, of all else (dion 0.1.0, megabatch_base.py:198)."""
    of = {name: nbytes("dion_muon", shape=MATRIX, name=name) for name in ("model.layers.{}.mlp.up_proj.weight", "lm_head.weight")}
    assert [*of.values()] == [2 * 4_194_304, 4 * 4_194_304 + 4]


def test_muon_of_axolotl_counts_steps_on_the_host():
    """axolotl 0.19.0, contribs/mit/muon/dist_muon.py (`_get_or_initialize_state`): zeros like a parameter, one or two."""
    names = ("model.layers.{}.mlp.up_proj.weight", "model.embed_tokens.weight")
    assert [nbytes("axolotl_muon", shape=MATRIX, name=name) for name in names] == [2 * 4_194_304, 4 * 4_194_304]


@pytest.mark.parametrize(
    ("dtype", "optim_args", "of_master"),
    [
        ("bf16", {}, 0),
        ("bf16", {"master_weights": "True"}, 4),
        ("bf16", {"master_weights": "True", "store_param_remainders": "True"}, 2),
        ("fp32", {"master_weights": "True", "store_param_remainders": "True"}, 4),
    ],
)
def test_fused_adam_of_transformer_engine_has_master_weights_or_what_these_have_beside_bf16(dtype, optim_args, of_master):
    """transformer-engine 2.20.2, pytorch/optimizers/fused_adam.py (`_initialize_state`): two moments in fp32."""
    assert nbytes("te_fused_adam", shape=(1000,), dtype=dtype, optim_args=optim_args) == (8 + of_master) * 1000
    in_bf16 = optim_args | dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), "torch.bfloat16")  # and a scale of each moment
    assert nbytes("te_fused_adam", shape=(1000,), dtype=dtype, optim_args=in_bf16) == (4 + of_master) * 1000 + 8


@pytest.mark.parametrize(
    ("dtype", "optim_args", "of_master"), [("bf16", {}, 1), ("bf16", {"master_weight_bits": "32"}, 2), ("fp32", {}, 0)]
)
def test_flash_adamw_completes_weights_of_16_bits(dtype, optim_args, of_master):
    """Two moments of a byte each, a 16-bit scale per 32 elements of either, and the rest of a master weight of 24 or 32 bits."""
    n = 1000
    assert nbytes("flash_adamw", shape=(n,), dtype=dtype, optim_args=optim_args) == 2 * n + 2 * 2 * 32 + of_master * n


@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_twice_the_rows_never_cost_less(optim):
    small, large = ((rows, 512) for rows in (64, 128))
    for place in ("device", "host", "managed"):
        options = {"in_target": False, "place": place}
        assert nbytes(optim, shape=small, **options) <= nbytes(optim, shape=large, **options)


def test_every_name_of_transformers_is_known_or_refused():
    names = pytest.importorskip("transformers.training_args").OptimizerNames
    assert {name.value for name in names} == OPTIMIZERS.keys() | REFUSED.keys()
    assert not OPTIMIZERS.keys() & REFUSED.keys()
    assert parse_optim(names("adamw_torch_fused")).step_implementation == "fused"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_names_say_why(name):
    with pytest.raises(RefusedError, match=f"{name} is refused: ."):
        parse_optim(name)


@pytest.mark.parametrize("name", ["adamw", "adam8bit", "muon", ""])
def test_unknown_names(name):
    with pytest.raises(UnknownNameError):
        parse_optim(name)
    with pytest.raises(UnknownNameError, match="did you mean adamw_torch"):
        parse_optim("adamw_torhc")


def test_frozen_parameters_have_no_states_but_with_adalomo():
    assert states("adamw_torch_fused", shape=(8_388_608, 1), dtype="uint8", frozen=True) == ()
    # a packed 4-bit 4096 × 4096 weight: 8,388,608 × 1 bytes, hence 4·8,388,608 + 4·1
    assert nbytes("adalomo", shape=(8_388_608, 1), dtype="uint8", frozen=True) == 33_554_436


def test_low_rank_optimizers_must_know_the_targets():
    with pytest.raises(InputError, match="optim_target_modules"):
        states("galore_adamw", shape=MATRIX, dtype="bf16")
    with pytest.raises(InputError, match="matrix"):
        states("galore_adamw", shape=(8,), dtype="bf16", in_target=True)


@pytest.mark.parametrize(
    ("optim", "optim_args", "error", "message"),
    [
        ("adamw_torch", {"foo": "1"}, InputError, "takes none"),
        ("rmsprop_bnb", {"alpha": "0.9"}, InputError, "takes none"),
        ("galore_adamw", {"rnak": "8"}, UnknownNameError, "did you mean rank"),
        ("galore_adamw", {"rank": "8.5"}, InputError, "reads it as int"),
        ("galore_adamw", {"rank": "0"}, InputError, "1 or more"),
        ("galore_adamw", {"proj_type": "middle"}, UnknownNameError, "reverse_std"),
        ("apollo_adamw", {"proj_type": "full"}, RefusedError, "proj_type=full"),
        ("apollo_adamw", {"proj_type": "reverse_std"}, RefusedError, "scale_type=channel"),
        ("sgd", {"momentum": "-1"}, InputError, "0 or more"),
        ("sgd", {"nesterov": "true"}, RefusedError, "nesterov"),
        ("adamw_torch_8bit", {"block_size": "128"}, RefusedError, "as a string"),
        ("adamw_torch_8bit", {"bf16_stochastic_round": "maybe"}, InputError, "truth"),
    ],
)
def test_optim_args_that_would_fail(optim, optim_args, error, message):
    with pytest.raises(error, match=message):
        states(optim, shape=MATRIX, dtype="bf16", in_target=True, optim_args=optim_args)


def test_galore_refuses_what_fails_there():
    # reverse_std projects a wide m × n gradient to m × r and, for r = m, multiplies back from the wrong side
    with pytest.raises(RefusedError, match="rank < 64"):
        states("galore_adamw", shape=(64, 96), dtype="bf16", in_target=True, optim_args={"proj_type": "reverse_std"})


def test_parse_optim_args():
    assert parse_optim_args("rank=64, scale=0.5") == {"rank": "64", "scale": "0.5"}
    assert parse_optim_args(None) == parse_optim_args("") == {}
    for text in ("rank", "rank=1=2", "rank=1,"):
        with pytest.raises(InputError, match="key=value"):
            parse_optim_args(text)
